"""The one shape of every error a user can cause: `<where>: <what was given>; <what is needed>[; what to do]`."""

from __future__ import annotations

import copyreg
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one line and says what would be right."""

    def __init__(self, where: str, given: str, needed: str, hint: str = "") -> None:
        super().__init__(f"{where}: {given}; {needed}" + (f"; {hint}" if hint else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        """From another process the message comes as it is, not the parts that it was made of."""
        return copyreg.__newobj__, (type(self), str(self))  # type: ignore[attr-defined]


class EngineLost(RuntimeError):  # noqa: N818 - an end, not a mistake
    """No replica of an engine has been there for too long; what was scored is in the journal."""


def unknown_name(where: str, kind: str, name: str, known: Iterable[str]) -> InputError:
    """An InputError for `name` not among `known`, naming the nearest valid one."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else ""
    return InputError(where, f"unknown {kind} {name!r}", f"known: {', '.join(names)}", hint)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "lr=1e-05 (now 1e-06)", for the first three keys of two configurations that differ; "" where none does."""
    before, after = dict(_flat(then)), dict(_flat(now))
    keys = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    shown = ", ".join(f"{k}={before.get(k, 'absent')} (now {after.get(k, 'absent')})" for k in keys[:3])
    return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
