"""Evaluate a model as the command line names it: model, tasks, engine and rewards, in the order that fails fastest."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from reinforce_ada.config import Config
from reinforce_ada.engines.base import Engine
from reinforce_ada.errors import InputError
from reinforce_ada.rewards import RewardPool
from reinforce_ada.rewards.names import answer_of_reward
from reinforce_ada.rewards.protocol import Answer
from reinforce_ada.sampling import configured
from reinforce_ada.training import adapters, built_in, distributed, lineage, models
from reinforce_ada.training.display import Display
from reinforce_ada.training.eval_results import TaskResult, in_short
from reinforce_ada.training.evaluate import evaluate
from reinforce_ada.training.launch import (
    longest_prompt,
    make_engine,
    make_rewards,
    pick_device,
    pick_engine,
    precision_of,
    quiet_libraries,
    with_dtype,
)
from reinforce_ada.training.task_defaults import completed
from reinforce_ada.training.tasks import Records, Task, load_records, render


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """One task before its evaluation."""

    name: str
    config: Config
    records: Records
    rewards: RewardPool
    answer: Answer | None
    note: str  # about questions that are left out


def evaluate_model(configs: Mapping[str, Config], model_name: str) -> list[TaskResult]:
    """Evaluate a model on the held-out prompts of each task; model and engine are loaded once.

    Args:
        configs: name of a task -> its configuration. They may differ in the table [task] alone.
        model_name: smollm2, a folder or a hub id. Questions that the run beside a folder was trained on are left out.
    Raises: InputError before the model is loaded for whatever the settings, the records or the rewards of any task show.
    """
    if distributed.world_size() > 1:
        raise InputError("eval", f"WORLD_SIZE={distributed.world_size()}", "one process: only train works with several", "no torchrun")
    quiet_libraries(model_name, *(each.task for each in configs.values()))
    display = Display(stderr=True)
    config = next(iter(configs.values()))
    engine_name, device = pick_engine(config.engine.engine), pick_device(config.model.device)
    precision = precision_of(config.model.dtype, device)
    filled = {name: completed(with_dtype(each, device)) for name, each in configs.items()}
    configs = {name: each for name, (each, _) in filled.items()}
    _check_one_length(configs)
    config = next(iter(configs.values()))
    if model_name == "tiny":
        raise InputError("eval", "the model 'tiny'", "a model folder", "train --model tiny writes one")
    built_in.check_template(model_name, config.task.template)
    found = {name: _records(each) for name, each in configs.items()}
    folder, dtype = Path(model_name), config.model.dtype
    are_adapters = models.is_adapters(folder)
    path = adapters.base_of(folder) if are_adapters else models.path_of(model_name, display.line)
    history = model_name if lineage.run_beside(model_name) else path
    with ExitStack() as stack:
        work = [_work(stack, name, each, found[name], history) for name, each in configs.items()]
        model = adapters.load(folder, dtype, device) if are_adapters else models.load(path, dtype, device)
        tasks = [render(w.records, w.config.task, model.tokenizer, longest=longest_prompt(config)) for w in work]
        for w, task in zip(work, tasks, strict=True):
            for note in filter(None, (filled[w.name][1], *task.notes, w.note)):
                display.line(note if len(work) == 1 else f"{w.name}: {note}")
        scratch = Path(stack.enter_context(_scratch(config.engine.weights_dir)))
        display.line(f"model {model_name} ({precision})")
        engine = stack.enter_context(make_engine(engine_name, config, path, model, device, scratch, display))
        engine.sync_weights(model.named_tensors(), 0)
        results: list[TaskResult] = []
        for w, task in zip(work, tasks, strict=True):
            results.append(_result(w, task, engine, display))
            if len(work) > 1:  # said at once: a later task may fail
                display.line(f"{w.name}: {in_short(results[-1].evaluation)}")
        return results


def _check_one_length(configs: Mapping[str, Config]) -> None:
    """Refuse tasks whose own defaults differ in max_tokens, which the one engine has for all of them."""
    found = {each.sampling.max_tokens: name for name, each in configs.items()}
    if len(found) > 1:
        given = " and ".join(f"{name} has max_tokens {length}" for length, name in found.items())
        raise InputError("eval", f"by default {given}", "one length for all tasks", "--max-tokens")


def _records(config: Config) -> Records:
    records = load_records(config.task, config.run.seed, config.run.data_seed, trains=False)
    if not records.held_out:
        raise InputError("eval", "no held-out prompts", "at least one", "raise --eval-prompts")
    return records


def _work(stack: ExitStack, name: str, config: Config, records: Records, model: str) -> _Work:
    records, left_out = lineage.without_trained(records, model)
    rewards = stack.enter_context(make_rewards(config, records))  # its workers start with the first completion
    return _Work(name, config, records, rewards, answer_of_reward(records.reward), left_out)


def _result(work: _Work, task: Task, engine: Engine, display: Display) -> TaskResult:
    config = work.config
    with display.sampling(f"{task.name} held-out") as on_progress:
        e = evaluate(
            engine, work.rewards, task.held_out, k=config.task.eval_k, seed=config.run.seed, policy_version=0,
            positive_threshold=configured(config.sampling).positive_threshold, request_timeout_s=config.engine.request_timeout_s or None,
            on_progress=on_progress, answer=work.answer if config.task.eval_k > 1 else None,
        )  # fmt: skip
    return TaskResult(work.name, e, tuple(prompt.key for prompt in task.held_out))


@contextmanager
def _scratch(weights_dir: str) -> Iterator[str]:
    """Yield a folder for the weights of an evaluation, inside the one that servers can read."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="eval-", dir=weights_dir or None)
    except OSError as e:
        raise InputError("engine", f"cannot write weights to {weights_dir}: {e.strerror}", "a writable folder", "--weights-dir") from e
    with folder as scratch:
        os.chmod(scratch, 0o755)
        yield scratch
