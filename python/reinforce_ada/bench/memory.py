"""The peak memory of one call: that of the process on Linux, native scratch included, and that of the allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def missing(device: str) -> str | None:
    """Return why the peak cannot be measured here, or None if it can."""
    if device == "cuda":
        return None
    try:
        _CLEAR.write_text("5")  # 5: start the peak of the resident set anew
    except OSError as e:
        return f"needs a writable {_CLEAR}: {e.strerror}"
    return None


def peak_extra_bytes(run: Callable[[], Any], held: Iterable[Tensor], device: str) -> tuple[int, Any]:
    """Return the peak memory of `run` in bytes beyond `held` and its results, at least 0, and these results.

    On a CPU this is the peak of the resident set above that before the call, less the results: every allocator counts, including the
    scratch of native code, and pages count once they are touched. Memory that malloc keeps for later is given back first, since reused
    memory would not be seen. It is exact to about .3 MB, because the kernel adds up pages in batches.

    Args:
        run: the call, which returns tensors.
        held: tensors that exist before and after; a result that shares memory with one of them (a gradient in place) is not new.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    let_malloc_keep(False)
    _give_back()
    with holes_filled((8 << 20, 1 << 20, 256 << 10, 129 << 10), device):
        before = _start(device)
        results = run()
        peak = _peak(device)
    let_malloc_keep(True)
    new = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors(results)) if s.data_ptr() not in known}
    return max(0, peak - before - sum(new.values())), results


def resident_bytes(device: str) -> int:
    """Return the anonymous memory of the process once all unused memory is given back; on a GPU the memory of tensors."""
    if device == "cuda":
        return int(torch.cuda.memory_allocated())
    _give_back()
    return _status("RssAnon")


def tensors(results: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested results."""
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, dict | list | tuple):
        for item in results.values() if isinstance(results, dict) else results:
            yield from tensors(item)


def _start(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    _CLEAR.write_text("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def let_malloc_keep(blocks: bool) -> None:
    """Set whether the process keeps freed blocks of up to 32 MiB, as one that has run for a while does, or returns them at once.

    glibc adapts to the largest block that was freed. Until then it maps and zeroes each block above 128 KiB anew: TRL's loop over rows
    took 52 ms in one run and 25 in the next, depending on what was freed before. So blocks are kept for timing, but not for measuring
    memory, where kept blocks would be counted beside those that replace them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        threshold = 32 << 20 if blocks else 128 << 10
        mallopt(-3, threshold)  # M_MMAP_THRESHOLD
        mallopt(-1, 2 * threshold)  # M_TRIM_THRESHOLD


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2. `hblks` counts the blocks that are mapped separately; the last four fields are not read."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", *"abcd"))


@contextmanager
def holes_filled(sizes: Sequence[int], device: str) -> Iterator[None]:
    """Fill the holes in the heap, so that malloc maps blocks of min(sizes) bytes or more separately if its threshold says so.

    Holes that earlier calls left in the heap would serve them otherwise. They are filled with blocks that are never touched. Without
    this, a gradient of 78 MB in such a hole took 32 ms instead of 66, and 36 MB were counted for a loop that holds .4.
    """
    libc = ctypes.CDLL(None)
    blocks: list[int] = []
    if device == "cpu" and hasattr(libc, "mallinfo2"):  # glibc from 2.33 on
        libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
        libc.mallinfo2.restype = _MallocInfo
        for size in sizes:
            mapped = libc.mallinfo2().hblks
            while libc.mallinfo2().hblks == mapped:
                blocks.append(libc.malloc(size))
    try:
        yield
    finally:
        for block in blocks:
            libc.free(block)


def _give_back() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
