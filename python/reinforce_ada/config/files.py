"""Configurations from files and flags, and back to files."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reinforce_ada.config.keys import OTHER_NAMES, Config, ModelConfig, TrainingConfig, section_of, sections
from reinforce_ada.config.paths import FILE_KINDS, RECORDS, beside, suffix_of
from reinforce_ada.config.values import convert, shown
from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.outside import GarbageError, one_line, read_text, server_url

_MOST_BYTES = 1 << 20  # of a configuration file


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file as nested dictionaries."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(read_text(path, _MOST_BYTES))
    except GarbageError as e:
        raise InputError("config", f"cannot read {path}: {e}", "a readable TOML file") from e
    except RecursionError as e:
        raise InputError("config", f"{path} is nested too deeply", "a valid TOML file") from e
    except ValueError as e:  # TOMLDecodeError, and Python's error for an integer of 5000 digits
        raise InputError("config", f"{path} is not TOML: {one_line(str(e))}", "a valid TOML file") from e


class Budget(NamedTuple):
    """The amount that a run may spend of what `unit` counts, one of BUDGET_UNITS."""

    amount: int
    unit: str


BUDGET_UNITS = ("generated_completions", "generated_tokens", "trained_completions", "trained_tokens")


def budget_of(training: TrainingConfig) -> Budget | None:
    """Return the budget of a run; None if `steps` alone ends it. Raises: InputError for a text that is no budget."""
    if not training.budget:
        return None
    found = re.fullmatch(r"0*([1-9][0-9]{0,14}) ((?:generated|trained) (?:completions|tokens))", training.budget)
    if found is None:
        needed = 'a number of generated or trained completions or tokens, such as "20000 generated completions"'
        raise InputError("config", f"budget = {shown(training.budget)}", needed)
    return Budget(int(found[1]), found[2].replace(" ", "_"))


def load(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the defaults, overridden by the file at `path`, then by `overrides` (key -> value or its text).

    Paths of questions and of code in the file start from its folder; see `beside`.

    Raises: InputError for an unknown section or key (naming the nearest valid one) and for a value of the wrong type.
    """
    if path is None:
        return _configured("config", {}, overrides)
    if suffix_of(path) in FILE_KINDS:  # an empty one would be read as a configuration that sets nothing
        raise InputError("config", f"{path} is named like a file of questions", "a TOML file", f"--task {path}")
    tables = {name: beside(path.parent, table) if isinstance(table, Mapping) else table for name, table in read_toml(path).items()}
    return _configured(str(path), tables, overrides)


def _configured(where: str, tables: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> Config:
    merged: dict[str, dict[str, Any]] = {name: {} for name, _ in sections()}
    for section, values in tables.items():
        _merge_section(merged, where, section, values)
    homes, given = section_of(), overrides or {}
    for key in given:
        if key not in homes:
            raise unknown_key("config", key, homes)
    tables_of = {}
    for name, cls in sections():
        of_file = {key: value for key, value in merged[name].items() if key not in given}
        own = {key: value for key, value in given.items() if homes[key] == name}
        tables_of[name] = cls(**convert(f"{where} [{name}]", cls, of_file), **convert(f"config [{name}]", cls, own))
    config = Config(**tables_of)
    _check(config)
    return config


def load_saved(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the configuration in a run's folder, then `overrides`, with the meaning that it had for an older run.

    A run without a data_seed took its data from `seed`. Its paths are absolute already; records that it keeps itself are found wherever the
    folder has been moved.
    """
    tables = read_toml(path)
    task, own = tables.get("task"), (path.parent / RECORDS).absolute()
    if isinstance(task, dict) and Path(str(task.get("task"))).name == RECORDS and own.is_file():
        task["task"] = str(own)
    run = tables.get("run")
    kept = {"data_seed": run["seed"]} if isinstance(run, Mapping) and "seed" in run and "data_seed" not in run else {}
    return _configured(str(path), tables, {**kept, **(overrides or {})})


def dump(config: Config) -> str:
    """Return the configuration as TOML that `load` reads back to an equal one (keys that are None are left out).

    Raises: InputError for a task option that TOML cannot hold.
    """
    import tomli_w

    sections = dataclasses.asdict(config).items()
    try:
        return tomli_w.dumps({name: {k: v for k, v in values.items() if v is not None} for name, values in sections})
    except TypeError as e:
        raise InputError("config", f"task_options = {config.task.task_options}", "values that TOML can hold") from e


def _merge_section(merged: dict[str, dict[str, Any]], where: str, section: str, values: Any) -> None:
    if section not in merged and (home := section_of().get(section)):
        raise InputError(where, f"{section} above the first table", f"the table [{home}] for it")
    if section not in merged:
        raise unknown_name(where, "section", section, merged)
    if not isinstance(values, Mapping):
        raise InputError(where, f"{section} = {shown(values)}", f"a table [{section}]")
    known = [f.name for f in dataclasses.fields(dict(sections())[section])]
    for key, value in values.items():
        if key not in known:
            raise unknown_key(f"{where} [{section}]", key, known)
        merged[section][key] = value


def unknown_key(where: str, key: str, known: Collection[str]) -> InputError:
    """Return an InputError for a key that is not `known`, naming the one that is meant: by its name in other trainers, or the nearest."""
    home = section_of().get(meant := OTHER_NAMES.get(key, key))
    if home is None:
        return unknown_name(where, "key", key, known)
    hint = f"did you mean {meant!r}?" if meant in known else f"{meant!r} belongs to the table [{home}]"
    return InputError(where, f"unknown key {key!r}", f"known: {', '.join(sorted(known))}", hint)


def check_room(config: Config, max_tokens: int) -> None:
    """Raise InputError if completions of max_tokens leave no room for a prompt, or are shorter than the overlong buffer."""
    if max_tokens >= config.engine.max_model_len:
        given = f"max_tokens = {max_tokens} with max_model_len = {config.engine.max_model_len}"
        raise InputError("config", given, "room for the prompt", "raise --max-model-len")
    if config.task.overlong_buffer > max_tokens:
        given = f"overlong_buffer = {config.task.overlong_buffer} with max_tokens = {max_tokens}"
        raise InputError("config", given, "a buffer of at most max_tokens")


def _check(config: Config) -> None:
    """Check the values that depend on each other; each of them has been held to its type."""
    if budget_of(config.training) is not None and config.training.lr_schedule != "constant":
        given = f"lr_schedule {config.training.lr_schedule} with a budget"
        raise InputError("config", given, "a run whose last step is known", "end it by --steps alone, or use lr_schedule constant")
    model, sampling = config.model, config.sampling
    if not model.lora_rank and (model.lora_alpha is not None or model.lora_targets != ModelConfig().lora_targets):
        raise InputError("config", "lora_alpha or lora_targets with lora_rank 0", "a rank above 0", "--lora-rank 16")
    if sampling.window is not None and sampling.schedule == "rounds":
        raise InputError("config", f"window {sampling.window} with schedule 'rounds'", "rounds have no window", "leave it out")
    if sampling.max_tokens is not None:
        check_room(config, sampling.max_tokens)
    if config.task.template_options and config.task.template == "plain":
        raise InputError("config", "template_options with template = 'plain'", "a chat template to pass them to", "leave one of them out")
    if "" in sampling.stop:
        raise InputError("config", f"stop = {shown(sampling.stop)}", "strings that are not empty")
    try:
        for url in filter(None, map(str.strip, config.engine.servers.split(","))):
            server_url(url)
    except GarbageError as e:
        raise InputError("config", f"servers: {e}", "URLs such as http://host:8000", "VLLM_API_KEY holds the key") from None
