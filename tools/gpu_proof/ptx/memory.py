"""Memory of the PTX machine: the caller's buffers, where they lie, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gpu_proof.ptx.program import PtxError

Array = npt.NDArray[Any]
_MOST_WATCHED = 1 << 26  # bytes of a buffer whose writers are remembered: 4 bytes each


class Buffer:
    """Bytes that a kernel may touch, at their own address; which block of the launch has written them."""

    def __init__(self, content: Array) -> None:
        self.start, self.size = content.ctypes.data, content.size
        assert content.dtype == np.uint8
        assert self.start % 16 == 0, "an allocation begins on 16 bytes"
        self._content = content
        self._views: dict[int, Array] = {}
        self.writer = np.full(self.size, -1, np.int32) if self.size <= _MOST_WATCHED else None

    def of_width(self, width: int) -> Array:
        """The bytes as unsigned numbers of this many bytes."""
        if width not in self._views:
            self._views[width] = self._content[: self.size // width * width].view(f"u{width}")
        return self._views[width]


class Memory:
    """All buffers of a launch."""

    def __init__(self, buffers: Sequence[Buffer], constants: dict[str, bytes]) -> None:
        self._constants = {name: _aligned(content) for name, content in constants.items()}
        self.constants = {name: array.ctypes.data for name, array in self._constants.items()}
        self._buffers = sorted([*buffers, *map(Buffer, self._constants.values())], key=lambda b: b.start)
        self._starts = np.array([b.start for b in self._buffers], np.int64)

    def parts(self, addresses: Array, size: int) -> Iterator[tuple[Buffer, Any, Array]]:
        """(buffer, which of the accesses of `size` bytes are in it, their offsets); nearly always one buffer has them all."""
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        for index in (at[:1] if (at == at[0]).all() else np.unique(at)).tolist():
            which: Any = slice(None) if (at == index).all() else np.flatnonzero(at == index)
            offsets = addresses[which] - (self._starts[index] if index >= 0 else 0)
            if index < 0 or (offsets + size > self._buffers[index].size).any():
                raise PtxError(f"address {addresses[which][0]:#x} is in no buffer")
            yield self._buffers[index], which, offsets


def _aligned(content: bytes) -> Array:
    room = np.zeros(len(content) + 16, np.uint8)
    begin = -room.ctypes.data % 16
    room[begin : begin + len(content)] = np.frombuffer(content, np.uint8)
    return room[begin : begin + len(content)]
