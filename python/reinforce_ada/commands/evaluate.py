"""`reinforce-ada eval`: scores a model on held-out prompts of one task or several."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.commands.flags import Typed, add_command, add_config_flag, add_key_flags, import_from_here, overrides
from reinforce_ada.config import Config, ModelName, TaskConfig
from reinforce_ada.errors import InputError
from reinforce_ada.outside import show

# The keys about model, task and engine that an evaluation does not read, or has a flag of its own for, and those of other tables that it
# reads.
_NOT_OF_EVAL = {"model", "eval_every", "task", "lora_rank", "lora_alpha", "lora_targets"}
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "stop")
_OF_EVAL = {*_OF_SAMPLING, "positive_threshold", "preset", "seed", "data_seed"}

_NOT_GREEDY = ("temperature", "top_p", "top_k", "min_p", "eval_k")
_EXAMPLES = """\
examples:
  the held-out prompts of a run, with its settings
    reinforce-ada eval runs/example/model
  two tasks with the same settings, in one table
    reinforce-ada eval MODEL --task sums.jsonl --task gcd --max-tokens 64
  tasks with the table [task] of their own files
    reinforce-ada eval MODEL --task gsm8k.toml --task sums.toml
  two models, prompt by prompt
    reinforce-ada eval MODEL --task test.jsonl --greedy --json > before.json
    reinforce-ada eval OTHER --task test.jsonl --greedy --compare before.json

docs/evaluation.md says what the numbers are.
"""
# Where questions come from, and their columns: those of a run say nothing of another task.
_OF_THE_SOURCE = ("split", "eval_task", "eval_split", "prompt_column", "answer_column")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Measure a model on held-out prompts: Avg@k, unbiased pass@k and maj@k with standard errors."
    parser = add_command(
        commands,
        "eval",
        "measure a model on held-out prompts",
        about,
        _EXAMPLES,
        usage="reinforce-ada eval MODEL [--task NAME ...] [FLAGS]",
    )
    parser.add_argument(
        "model", type=Typed(ModelName | str), metavar="MODEL", help="smollm2, gemma3-270m, a model folder (such as RUN/model) or a hub id"
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.add_argument("--greedy", action="store_true", help="decode greedily: temperature 0, one completion per prompt")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="also give the paired difference from what --json printed earlier")
    parser.add_argument(
        "--task", action="append", dest="tasks", metavar="NAME",
        help="a generator, a file, a folder or a dataset of the hub, as for train, or a .toml file whose table [task] describes the task; "
        "give the flag again for each further task (default: the task of the run whose model it is, else chain_sum)",
    )  # fmt: skip
    homes = configuration.section_of()
    whole = {key for key, section in homes.items() if section in ("model", "task", "engine")}
    add_config_flag(parser)
    add_key_flags(parser, whole - _NOT_OF_EVAL | _OF_EVAL)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Evaluate the model on every task, print the table or the JSON object, and return 0."""
    beside = Path(given.model).parent / "config.toml"
    if given.config is None and Path(given.model).is_dir() and beside.is_file():
        show(f"task and engine as in {beside}", file=sys.stderr)
        given.config = beside
    configs = _configs(given, is_run=given.config == beside)
    import_from_here()
    with _prints_aside() if given.json else nullcontext():
        from reinforce_ada.training import eval_results, launch_eval

        earlier = eval_results.Earlier(given.compare) if given.compare else None
        if earlier:
            earlier.check(list(configs))
        results = launch_eval.evaluate_model(configs, given.model)
        differences = earlier.differences(results) if earlier else []
    sampling, seed = next(iter(configs.values())).sampling, next(iter(configs.values())).run.seed
    if given.json:
        settings = {**{key: getattr(sampling, key) for key in _OF_SAMPLING}, "seed": seed}
        show(json.dumps(eval_results.json_object(given.model, settings, results, differences), allow_nan=False))
        return 0
    for line in [*eval_results.table(results), *eval_results.lines_of(differences, given.compare)]:
        show(line)
    drawn = ", one greedy completion each: it is about other prompts, not about other completions" if given.greedy else ""
    show(f"± is one standard error over the prompts{drawn}")
    return 0


def _configs(given: argparse.Namespace, *, is_run: bool) -> dict[str, Config]:
    """Return name of a task -> its configuration; they differ in the table [task] alone."""
    load = configuration.load_saved if is_run else configuration.load
    flags = overrides(given)
    if given.greedy and (wrong := [key for key in _NOT_GREEDY if key in flags]):
        raise InputError("eval", f"--greedy and --{wrong[0].replace('_', '-')}", "one of them: greedy is temperature 0 and k 1")
    names = given.tasks or []
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise InputError("eval", f"--task {twice} twice", "each task once")
    if not names:
        config = load(given.config, flags)
        configs = {config.task.task: config}
    else:
        source = dict.fromkeys(_OF_THE_SOURCE, "") if is_run else {}
        configs = {name: load(given.config, flags if _is_toml(name) else {**source, **flags, "task": name}) for name in names}
        configs.update({n: dataclasses.replace(c, task=_own_task(Path(n), flags)) for n, c in configs.items() if _is_toml(n)})
    return {name: _greedy(config) for name, config in configs.items()} if given.greedy else configs


def _is_toml(task: str) -> bool:
    return task.lower().endswith(".toml")


def _own_task(path: Path, flags: Mapping[str, str]) -> TaskConfig:
    """Return the task that the table [task] of a file and the flags describe."""
    found = configuration.read_toml(path)
    own = found.get("task")
    if not isinstance(own, Mapping):
        raise InputError("eval", f"{path} has no table [task]", 'one with at least task = "NAME"')
    own = configuration.beside(path.parent, own)
    known = [field.name for field in dataclasses.fields(TaskConfig)]
    if unknown := next((key for key in own if key not in known), None):
        raise configuration.unknown_key(f"{path} [task]", unknown, known)
    if others := ", ".join(f"[{name}]" for name in found if name != "task"):
        show(f"{path}: only its table [task] is read, not {others}", file=sys.stderr)
    return configuration.load(None, {**own, **{key: value for key, value in flags.items() if key in known}}).task


def _greedy(config: Config) -> Config:
    """Return the configuration at temperature 0, where an engine ignores what would truncate, and with one completion per prompt."""
    sampling = dataclasses.replace(config.sampling, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
    return dataclasses.replace(config, sampling=sampling, task=dataclasses.replace(config.task, eval_k=1))


@contextmanager
def _prints_aside() -> Iterator[None]:
    """Send all that libraries, rewards and their processes print to standard error, so that the output is only the result."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)
