"""Guards around the tensors of a launch in Triton's interpreter, which by itself reads and writes wherever a pointer leads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from gpu_proof.records import leaves


class Extent(NamedTuple):
    """Where the elements of a tensor lie: `row` bytes of every `step`, from `start` over `span` bytes."""

    start: int
    span: int
    row: int
    step: int

    @staticmethod
    def of(x: Tensor) -> Extent:
        size = x.element_size()
        span = (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1) * size
        apart = x.dim() == 2 and x.stride(0) > x.shape[1]
        return Extent(x.data_ptr(), span, (x.shape[1] if apart else span) * (size if apart else 1), x.stride(0) * size if apart else span)


_extents: list[Extent] = []


def install() -> None:
    """From now on an access outside of every tensor of the launch is an error."""
    call, load, store = GridExecutor.__call__, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def guarded_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {str(place): value for place, value in enumerate(args)} | kwargs
        values = [leaf.value for leaf in leaves(given)]
        _extents[:] = [Extent.of(x) for x in values if isinstance(x, Tensor) and x.numel()]
        return call(self, *args, **kwargs)

    def guarded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        _check("reads", pointers.data, mask.data)
        return load(self, pointers, mask, *rest)

    def guarded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _check("writes", pointers.data, mask.data)
        return store(self, pointers, value, mask, *rest)

    GridExecutor.__call__ = guarded_call
    InterpreterBuilder.create_masked_load = guarded_load
    InterpreterBuilder.create_masked_store = guarded_store


def _check(what: str, pointers: Any, mask: Any) -> None:
    addresses = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.int64)
    if not addresses.size:
        return
    low, high = addresses.min(), addresses.max()
    if any(e.start <= low and high < e.start + e.span and e.row == e.span for e in _extents):
        return
    inside = np.zeros(addresses.shape, bool)
    for e in _extents:
        offsets = addresses - e.start
        inside |= (offsets >= 0) & (offsets < e.span) & (offsets % e.step < e.row)
    if not inside.all():
        raise IndexError(f"the kernel {what} outside of every tensor it was given, at {np.count_nonzero(~inside)} addresses")
