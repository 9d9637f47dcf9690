"""What a pass on a CPU has freed goes back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

# In bytes that a pass may leave in the heap. After trimming the next pass has to fault its pages in again: a pass of a model of 100 000
# weights, which leaves 10 MB, took 22 ms with it and 15 ms without.
WORTH_TRIMMING = 100_000_000


@cache
def _malloc_trim() -> Any:
    """Return glibc's function; None where the C library has none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Return the freed blocks of glibc's heap to the system; nothing with another C library.

    glibc keeps freed blocks of up to 32 MB, between which new ones do not fit, so that the heap grows from pass to pass. After
    passes of 1024 tokens of SmolLM2 this takes .03 to .08 s of 2 to 3 s, and a peak of 3.8 GB becomes 2.6 GB (LoRA), one of 5.0
    GB with all weights 4.3 GB.
    """
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)
