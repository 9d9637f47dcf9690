"""Values of the configuration: what a key's type accepts, from the command line as text or from TOML.

A type is declared where the key is, as `Annotated[int, Range(1, 100)]` or `Literal["cpu", "cuda"] | None`. Conversion, errors, `--help`
and shell completion all read it there.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from reinforce_ada.errors import InputError, did_you_mean
from reinforce_ada.outside import GarbageError, is_utf8, one_line, parse_json, without_credentials

_DEEPEST = 16  # tables in tables of task_options
_LONGEST = 100_000  # characters of a text
_SWITCH = {"true": True, "1": True, "false": False, "0": False}


# -------------------- declarations


@dataclass(frozen=True, slots=True)
class Range:
    """The annotation of a number that is from `least` to `most`, or above `least` and up to `most`."""

    least: float
    most: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        least, most = (str(bound) if isinstance(bound, int) else f"{bound:g}" for bound in (self.least, self.most))
        return f"above {least} and up to {most}" if self.above else f"from {least} to {most}"


Count = Annotated[int, Range(1, 10**6)]
CountOrNone = Annotated[int, Range(0, 10**6)]  # 0 is none
Steps = Annotated[int, Range(0, 10**9)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Seconds = Annotated[float, Range(0.001, 10**6)]  # poll() takes its milliseconds as a C int, which ends at 2 147 483 s
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, above=True)]
Coefficient = Annotated[float, Range(0, 10**6)]
PositiveCoefficient = Annotated[float, Range(0, 10**6, above=True)]
Processes = Annotated[int, Range(1, 1024)]
Requests = Annotated[int, Range(1, 65536)]
ContextLength = Annotated[int, Range(2, 10**7)]  # tokens
Dtype = Literal["auto", "bfloat16", "float32"]


def option(default: Any, about: str, *, unset: str = "", metavar: str = "") -> Any:
    """Declare a value with a flag: its default and its line of `--help`.

    Args:
        unset: what holds where the default is None or empty.
        metavar: what stands for the value in `--help`, where the type alone says too little.
    """
    metadata = {"about": about, "unset": unset, "metavar": metavar}
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def hints_of(cls: type) -> dict[str, Any]:
    """Return the declared type of every field, with its annotations."""
    return typing.get_type_hints(cls, include_extras=True)


def kinds_of(hint: Any) -> list[Any]:
    """Return the members of a union without None; of any other type, the type alone."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [kind for kind in kinds if kind is not type(None)]


def choices_of(hint: Any) -> list[str]:
    """Return the words that a type accepts by name."""
    if hint is bool:
        return ["true", "false"]
    return [word for kind in kinds_of(hint) if plain_of(kind) is Literal for word in typing.get_args(kind)]


def range_of(kind: Any) -> Range | None:
    """Return the range of a number's type, None for any other type."""
    return next((note for note in getattr(kind, "__metadata__", ()) if isinstance(note, Range)), None)


def plain_of(kind: Any) -> Any:
    """Return a member of a union without its annotations and parameters: int, str, list, Literal, .."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else typing.get_origin(kind) or kind


# -------------------- conversion


def convert(where: str, cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return these values as the types of their keys. Raises: InputError for one that its key's type does not accept."""
    hints = hints_of(cls)
    out: dict[str, Any] = {}
    for key, value in values.items():
        try:
            out[key] = converted(value, hints[key])
        except ValueError as e:
            raise InputError(where, f"{key} = {shown(value)}", str(e), nearest_choice(value, hints[key])) from None
    return out


def converted(value: Any, hint: Any) -> Any:
    """Return `value` as a type. Text comes from the command line, where "10" is the integer; TOML has its own types.

    Raises: ValueError that says what is needed.
    """
    if value is None and type(None) in typing.get_args(hint):
        return None
    for kind in kinds_of(hint):
        if (found := _as(kind, value)) is not None:
            return found
    raise ValueError(needed(hint))


def _as(kind: Any, value: Any) -> Any:
    """Return `value` as one plain type, or None if it cannot be one."""
    plain = plain_of(kind)
    if plain is Literal:
        return value if value in typing.get_args(kind) and isinstance(value, str) else None
    if plain is dict:
        found = parse_json(value) if isinstance(value, str) else value
        return _checked_table(found, _DEEPEST) if isinstance(found, dict) else None
    if plain is list:
        return _texts(value)
    if plain is str:
        return _text(value) if isinstance(value, str) else None
    if plain is bool:
        return value if isinstance(value, bool) else _SWITCH.get(value.lower()) if isinstance(value, str) else None
    limits, found = range_of(kind), _number(plain, value)
    return found if found is None or limits is None or found in limits else None


def _texts(value: Any) -> list[str] | None:
    """Return stop strings: one text, or a list of them, which the command line writes as JSON."""
    try:
        given = [value] if isinstance(value, str) and not value.startswith("[") else parse_json(value) if isinstance(value, str) else value
    except GarbageError:
        return None
    return [_text(item) for item in given] if isinstance(given, list) and all(isinstance(item, str) for item in given) else None


def _text(value: str) -> str:
    """Return a text. Raises: ValueError for one that no file can hold, or that no system call accepts as a name."""
    if not is_utf8(value):
        raise ValueError("text that UTF-8 can hold")
    if "\0" in value:
        raise ValueError("text without a NUL character")
    if len(value) > _LONGEST:
        raise ValueError(f"text of at most {_LONGEST} characters")
    return value


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


def check(where: str, name: str, value: float, hint: Any) -> None:
    """Raise InputError for a number outside the range of its type."""
    for kind in kinds_of(hint):
        if (limits := range_of(kind)) is not None and value not in limits:
            raise InputError(where, f"{name} = {shown(value)}", _in_words(kind))


def check_fields(where: str, record: Any) -> None:
    """Raise InputError for a field of a record whose number is outside the range of its type."""
    for name, hint in hints_of(type(record)).items():
        check(where, name, getattr(record, name), hint)


# -------------------- in words


def needed(hint: Any) -> str:
    """Return what a type accepts, for an error: "an integer from 1 to 1000000, or posterior"."""
    plain = [_in_words(kind) for kind in kinds_of(hint) if plain_of(kind) is not Literal]
    return ", or ".join(filter(None, [*plain, _named(hint)]))


def allowed(hint: Any) -> str:
    """Return the range and the choices of a type, for a line of help; "" if it has neither."""
    if str in kinds_of(hint):
        words = choices_of(hint)
        return f"{', '.join(words)}, or your own" if words else ""
    ranges = [str(found) for kind in kinds_of(hint) if (found := range_of(kind)) is not None]
    return ", or ".join(filter(None, [*ranges, _named(hint)]))


def nearest_choice(value: Any, hint: Any) -> str:
    """Return the question that names the choice nearest to a text; "" if none is near."""
    return did_you_mean(value, choices_of(hint)) if isinstance(value, str) else ""


def _named(hint: Any) -> str:
    """Return the choices of a type; those of a switch are in its words and its metavar."""
    words = [] if hint is bool else choices_of(hint)
    return f"one of {', '.join(words)}" if len(words) > 1 else "".join(words)


def _in_words(kind: Any) -> str:
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text (in quotes in a file)",
        list: 'text, or a list of texts such as ["</answer>", "[end]"]',
        dict: 'a table such as {"max_terms": 3}',
    }[plain_of(kind)]
    found = range_of(kind)
    return words if found is None else f"{words} {found}"


def shown(value: Any) -> str:
    """Return a value of unknown size in one short line."""
    try:
        return one_line(without_credentials(repr(value)))
    except (RecursionError, ValueError):  # nested too deeply; an integer of 5000 digits
        return f"a {type(value).__name__} too large to show"
