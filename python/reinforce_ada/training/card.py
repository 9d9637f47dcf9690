"""The model card of a run: README.md in its model folder, written from the configuration and the log. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.config import Config, EngineConfig, RunConfig
from reinforce_ada.outside import GarbageError, is_installed, one_line, read_text
from reinforce_ada.rewards import names
from reinforce_ada.training import built_in
from reinforce_ada.training.costs import costs_until
from reinforce_ada.training.evaluate import paired_difference
from reinforce_ada.training.lineage import run_beside

CARD = "README.md"
_PATHS = ("model", "task", "eval_task", "memory_from")  # keys of the configuration
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]+)['\"]?[ \t]*$", re.MULTILINE)
_MOST_BYTES = 1 << 20  # of the base model's card
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#|~&$:@])")  # the last three begin formulas, links and mentions
_COSTS = {
    "steps": "steps", "generated_completions": "completions generated", "generated_tokens": "tokens generated",
    "trained_completions": "completions trained on", "trained_tokens": "tokens trained on", "seconds": "seconds",
}  # fmt: skip


def write_card(folder: Path, name: str, config: Config, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the card of the model in `folder`, in the place of any that another library left there; see `card_text`."""
    is_adapter = (folder / built_in.ADAPTER_CONFIG).is_file()
    (folder / CARD).write_text(card_text(name, config, records, is_adapter=is_adapter), encoding="utf-8")


def card_text(name: str, config: Config, records: Sequence[Mapping[str, Any]], *, is_adapter: bool = False) -> str:
    """Return the card: YAML front matter for the hub, then what was trained on what, what it reached, what it cost, and how to repeat it.

    Args:
        name: of the run.
        records: of its log.
        is_adapter: the folder holds a peft adapter, not a whole model.
    """
    base, licence = base_of(config)
    header: Mapping[str, Any] = next((r for r in records if r["kind"] == "run"), {})
    parts = (
        _front_matter(base, licence, is_adapter=is_adapter),
        f"# {_plain(name)}\n\n{_what(config, base, header, is_adapter=is_adapter)}",
        _evaluation([r for r in records if r["kind"] == "eval"]),
        _cost(records),
        _repeat(config, header),
        f"## Licence\n\n{_licence_text(base, licence)}",
    )
    return "\n\n".join(part for part in parts if part) + "\n"


# -------------------- the base model


def base_of(config: Config) -> tuple[str, str]:
    """Return the hub id, or the name, of the model with which training began, through earlier runs; and its licence, "" if unknown."""
    model = config.model.model
    seen: set[Path] = set()
    while (run := run_beside(model)) is not None and run not in seen:
        seen.add(run)
        model = configuration.load_saved(run / "config.toml").model.model
    if model in built_in.MODELS:
        return built_in.MODELS[model].hub_id, built_in.MODELS[model].licence
    if model == "tiny" or os.path.isdir(model):
        return os.path.basename(os.path.normpath(model)), _licence_in(Path(model) / CARD)
    return model, _licence_in(_cached_card(model))


def _cached_card(model: str) -> Path | None:
    """Return the card of a model that was downloaded from the hub, if it was downloaded with its card."""
    if not _HUB_ID.fullmatch(model) or not is_installed("huggingface_hub"):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, CARD)
    except HFValidationError:  # the hub has further rules for names
        return None
    return Path(found) if isinstance(found, str) else None


def _licence_in(card: Path | None) -> str:
    try:
        text = read_text(card, _MOST_BYTES) if card is not None else ""
    except GarbageError:
        return ""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    found = _LICENCE.search(front[1]) if front else None
    return found[1] if found else ""


def _licence_text(base: str, licence: str) -> str:
    if licence:
        return f"The base model {_plain(base)} has the licence {_plain(licence)}. See what it asks of a model made from it."
    return f"The licence of the base model {_plain(base)} is not known here. Look it up before you pass this model on."


# -------------------- parts


def _front_matter(base: str, licence: str, *, is_adapter: bool) -> str:
    lines = [f"library_name: {'peft' if is_adapter else 'transformers'}", "pipeline_tag: text-generation"]
    if _HUB_ID.fullmatch(base):
        lines.append(f"base_model: {_yaml(base)}")
    if licence:
        lines.append(f"license: {_yaml(licence)}")
    tags = ["reinforcement-learning", "reinforce-ada", *(["lora"] if is_adapter else [])]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _what(config: Config, base: str, header: Mapping[str, Any], *, is_adapter: bool) -> str:
    version = _plain(str(header.get("reinforce_ada", "")))
    task, reward = _shared(config.task.task), names.without_folders(config.task.reward)
    scored = f"scored by {_plain(reward)}" if reward else "scored by the task's own rule"
    kind = "An adapter for" if is_adapter else "This is"
    loads = "AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM"
    return (
        f"{kind} {_plain(base)}, trained by reinforcement learning on the task {_plain(Path(task).stem)}, {scored}. Rollouts were sampled "
        f"adaptively with the preset {_plain(config.sampling.preset)} of reinforce\\_ada {version}.\n\n"
        f"{'peft' if is_adapter else 'transformers'} loads it with `{loads}.from_pretrained`. Prompts were rendered "
        f"{'by its chat template' if config.task.template == 'chat' else 'as plain lines of text'}, with the system prompt and as many "
        f"worked examples as the configuration below says."
    )


def _evaluation(evals: Sequence[Mapping[str, Any]]) -> str:
    if not evals:
        return "## Evaluation\n\nNothing was held out, so nothing was evaluated."
    first, last = evals[0], evals[-1]
    shown = [first] if first is last else [first, last]
    rows = [["", *(f"after step {e['step']}" for e in shown)]]
    rows.append([f"Avg@{last['k']}", *(f"{_number(e.get('avg_at_k'))} ± {_number(e.get('stderr'))}" for e in shown)])
    several = sorted(map(int, last.get("pass_at_k") or ()))[1:]  # pass@1 is Avg@k
    rows += [[f"pass@{k}", *(_number((e.get("pass_at_k") or {}).get(str(k))) for e in shown)] for k in several]
    shares = [[math.nan if share is None else float(share) for share in e.get("per_prompt") or ()] for e in shown]
    difference = ""
    if len(shown) == 2 and len(shares[0]) == len(shares[1]) > 0:
        mean, stderr = paired_difference(*shares)
        difference = f" The difference, paired by prompt, is {mean:+.3f} ± {stderr:.3f}."
    return (
        f"## Evaluation\n\n{_table(rows)}\n\nAvg@k is the mean share of correct completions over {len(shares[-1])} held-out prompts of the "
        f"same task, which were never trained on; ± is its standard error over these prompts.{difference} Nothing else was measured."
    )


def _cost(records: Sequence[Mapping[str, Any]]) -> str:
    last = max((r["step"] for r in records if r["kind"] == "step"), default=0)
    costs = costs_until(records, last)
    return f"## Cost\n\n{_table([['', 'in all'], *([text, f'{costs[name]:,.0f}'] for name, text in _COSTS.items())])}"


def _repeat(config: Config, header: Mapping[str, Any]) -> str:
    toml = configuration.dump(_shareable(config)).strip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", toml)), default=0))
    own = "" if not _is_of_a_program(config) else " The reward was a function of the program that called `reinforce_ada.train`."
    versions = ", ".join(_plain(f"{key} {header[key]}") for key in ("torch", "engine", "device", "cpu", "ranks") if header.get(key))
    return (
        f"## Configuration\n\nWith this text as `config.toml`, and the files that it names, `reinforce-ada train --config config.toml` "
        f"repeats the run.{own} It ran with {versions or 'unknown versions'}.\n\n{fence}toml\n{toml}\n{fence}"
    )


def _is_of_a_program(config: Config) -> bool:
    return any(names.is_of_a_program(part.reward) for part in names.parts_of(config.task.reward)) if config.task.reward else False


def _shareable(config: Config) -> Config:
    """Return the configuration without what belongs to one machine: folders, servers, limits, trackers."""
    sections = {name: getattr(config, name) for name, _ in configuration.sections()}
    bare = {name: dataclasses.replace(section, **dict(_without_folders(section))) for name, section in sections.items()}
    run, engine = config.run, config.engine
    bare["run"] = RunConfig(seed=run.seed, data_seed=run.data_seed)
    bare["engine"] = EngineConfig(engine=engine.engine, max_model_len=engine.max_model_len)
    return Config(**bare)


def _without_folders(section: Any) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if f.name in ("reward", "loss"):
            value = names.without_folders(value) if ":" in value else value
        yield f.name, _shared(value) if f.name in _PATHS else value


def _shared(value: str) -> str:
    """Return an absolute path without its folder: that of one machine is nobody else's business."""
    return os.path.basename(value) if os.path.isabs(value) else value


# -------------------- text


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"


def _plain(text: str) -> str:
    """Return text of unknown content on one line, as Markdown that shows it literally."""
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def _yaml(text: str) -> str:
    """Return a YAML scalar in double quotes. JSON's are YAML's, but for two characters that YAML does not take."""
    return json.dumps(one_line(text).replace("\ufffe", "").replace("\uffff", ""), ensure_ascii=False)
