"""Values of the configuration: what a key's type accepts, from the command line as text or from TOML, and the ranges of numbers."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from reinforce_ada.errors import InputError
from reinforce_ada.outside import is_utf8, one_line, parse_json, without_credentials

_DEEPEST = 16  # tables in tables of task_options


def convert(section: str, cls: type, values: dict[str, Any]) -> Any:
    """Return a section with these values of its keys. Raises: InputError for one that its key's type does not accept."""
    hints = typing.get_type_hints(cls)
    out: dict[str, Any] = {}
    for key, value in values.items():
        try:
            out[key] = _converted(value, hints[key])
        except ValueError as e:
            needed = _needed(hints[key]) or str(e)
            raise InputError(f"config [{section}]", f"{key} = {shown(value)}", needed) from None
    return cls(**out)


def _converted(value: Any, hint: Any) -> Any:
    """Return `value` as the type of a key. Text comes from the command line, where "10" is the integer; TOML has its own types.

    Raises: ValueError that says what is needed.
    """
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is not type(None) and (found := _as(kind, value)) is not None:
            return found
    raise ValueError(" or ".join(_KIND_NAMES.get(kind, "text") for kind in kinds if kind is not type(None)))


_KIND_NAMES: Mapping[Any, str] = {int: "an integer (int)", float: "a number (float)", str: "text in quotes (str)"}
_LONGEST = 100_000  # characters of a text


def _as(kind: Any, value: Any) -> Any:
    """Return `value` as one plain type, or None if it cannot be one."""
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return value if value in typing.get_args(kind) and isinstance(value, str) else None
    if origin is dict:
        found = parse_json(value) if isinstance(value, str) else value
        return _checked_table(found, _DEEPEST) if isinstance(found, dict) else None
    if origin is list:
        if isinstance(value, str):
            value = parse_json(value) if value.startswith("[") else [value]
        return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
    if kind is str:
        return value if isinstance(value, str) else None
    if kind is bool:
        return value if isinstance(value, bool) else _SWITCH.get(value.lower()) if isinstance(value, str) else None
    return _number(kind, value)


_SWITCH = {"true": True, "1": True, "false": False, "0": False}


def _number(kind: type, value: Any) -> int | float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if kind is float:
            return float(value)
        return int(value) if not isinstance(value, float) or value.is_integer() else None
    except (ValueError, OverflowError):  # not a number; an integer past every float
        return None


def _checked_table(value: Any, depth: int) -> Any:
    """Return a table of settings. Raises: ValueError for values that TOML, JSON or a fingerprint cannot hold."""
    if depth == 0:
        raise ValueError(f"tables in tables are possible {_DEEPEST} deep at most")
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _checked_table(item, depth - 1)
    elif not isinstance(value, (str, bool, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"no {type(value).__name__}, but values that TOML can hold: text, finite numbers, true, false, lists and tables")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("integers of 64 bits")
    return value


def _needed(hint: Any) -> str:
    """Return what a key with its own words or form takes; "" for any other."""
    if typing.get_origin(hint) is list:
        return 'text, or a list of texts such as ["</answer>", "[end]"]'
    if hint is bool:
        return "true or false"
    kinds = [hint] if typing.get_origin(hint) is Literal else typing.get_args(hint)
    words = [value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]
    return f"{'an integer or ' if int in kinds else ''}one of {', '.join(words)}" if words else ""


def shown(value: Any) -> str:
    """Return a value of unknown size in one short line."""
    try:
        return one_line(without_credentials(repr(value)))
    except (RecursionError, ValueError):  # nested too deeply; an integer of 5000 digits
        return f"a {type(value).__name__} too large to show"


class Range(NamedTuple):
    """Numbers from `least` (above it) to `most`."""

    least: float
    most: float
    above: bool = False

    def needed(self, value: float) -> str:
        """Return what is needed instead of `value`; "" if it is in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return "a finite number"
        if value < self.least or (self.above and value == self.least):
            return "a positive number" if self.above else f"at least {self.least:g}"
        return f"at most {self.most:.10g}" if value > self.most else ""


_COUNT, _OPTIONAL_COUNT = Range(1, 10**6), Range(0, 10**6)
_STEPS = Range(0, 10**9)
_SECONDS = Range(0.001, 10**6)  # poll() takes its milliseconds as a C int, which ends at 2 147 483 s
# Every number of the configuration. A preset or an operator with a narrower range checks it itself.
RANGES: Mapping[str, Range] = {
    "lora_rank": Range(0, 65536), "lora_alpha": Range(1, 10**6),
    "num_examples": Range(0, 1000), "eval_prompts": _OPTIONAL_COUNT, "eval_k": Range(1, 2048), "eval_every": _STEPS,
    "overlong_buffer": _OPTIONAL_COUNT, "overlong_penalty": Range(0, 1e6, above=True),
    "prompts_per_step": _COUNT, "group_size": _COUNT, "round_size": _COUNT, "max_rounds": _COUNT, "decide_every": _COUNT,
    "min_pool": _OPTIONAL_COUNT, "mean_budget": _COUNT, "num_completions": _COUNT, "positive_threshold": Range(-1e30, 1e30),
    "alpha": Range(0, 100, above=True), "memory_decay": Range(0, 1, above=True), "window": _COUNT, "max_tokens": _COUNT,
    "temperature": Range(0.01, 100),  # below, vLLM samples at another temperature than requested
    "top_p": Range(0, 1, above=True), "top_k": Range(0, 10**7), "min_p": Range(0, 1),
    "replicas": Range(1, 1024), "cpus_per_replica": Range(1, 4096), "tensor_parallel": Range(1, 1024),
    "hung_after_s": _SECONDS, "give_up_s": _SECONDS, "reward_timeout_s": _SECONDS, "request_timeout_s": Range(0, 10**6),
    "max_num_seqs": Range(1, 65536), "max_model_len": Range(2, 10**7), "memory_fraction": Range(0, 1, above=True),
    "reward_workers": Range(1, 1024),
    "steps": _STEPS, "warmup_steps": _STEPS, "checkpoint_every": _STEPS, "minibatches": _COUNT, "tokens_per_pass": Range(1, 10**9),
    "learning_rate": Range(0, 1, above=True), "lr_min_fraction": Range(0, 1),
    "weight_decay": Range(0, 100), "max_grad_norm": Range(0, 1e30, above=True),
    "clip_low": Range(0, 1), "clip_high": Range(0, 1e6), "entropy_coef": Range(0, 1e6), "kl_coef": Range(0, 1e6),
    "correction_high": Range(0, 1e6, above=True),
    "seed": Range(0, 2**63 - 1), "data_seed": Range(0, 2**63 - 1),
}  # fmt: skip


def check_text(key: str, text: str) -> None:
    """Refuse text that no file can hold, or that no system call accepts as a name."""
    if not is_utf8(text):
        raise InputError("config", f"{key} = {shown(text)}", "text that UTF-8 can hold")
    if "\0" in text:
        raise InputError("config", f"{key} = {shown(text)}", "text without a NUL character")
    if len(text) > _LONGEST:
        raise InputError("config", f"{key} has {len(text)} characters", f"at most {_LONGEST}")
