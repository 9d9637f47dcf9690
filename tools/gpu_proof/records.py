"""Kernels take records, named tuples of tensors, of numbers or of constants, which Triton passes field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Leaf(NamedTuple):
    """One value that is no record."""

    path: tuple[int, ...]  # the position of its parameter, then that in the record, as Triton names it
    name: str  # of the field, or of the parameter
    value: Any


def leaves(arguments: Mapping[str, Any]) -> Iterator[Leaf]:
    """Every value of the parameters of a kernel, in the order in which they are passed."""
    return _below((), arguments)


def _below(path: tuple[int, ...], values: Mapping[str, Any]) -> Iterator[Leaf]:
    for place, (name, value) in enumerate(values.items()):
        if hasattr(value, "_asdict"):
            yield from _below((*path, place), value._asdict())
        else:
            yield Leaf((*path, place), name, value)
