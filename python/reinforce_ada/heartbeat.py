"""A sign of life: where a command's output is no terminal, a line every 30 s in which it has said nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

EVERY_S = 30.0

_heard_at = time.monotonic()
_work = ""


def heard() -> None:
    """Note that the user has just been told something, so that the next line is due `EVERY_S` from now."""
    global _heard_at
    _heard_at = time.monotonic()


def begins(work: str) -> None:
    """Note what the command does from now on, such as "step 3 training"; the next line says so."""
    global _work
    _work = work


@contextmanager
def beating(say: Callable[[str], None], every_s: float | None = None) -> Iterator[None]:
    """Call `say` in a thread of its own, with seconds and work, whenever nothing was `heard` for `every_s` (by default `EVERY_S`)."""
    every_s = EVERY_S if every_s is None else every_s
    is_over = threading.Event()
    started = time.monotonic()
    begins("")
    heard()

    def beat() -> None:
        while not is_over.wait(max(0.0, _heard_at + every_s - time.monotonic())):
            if (now := time.monotonic()) >= _heard_at + every_s:
                heard()
                with suppress(OSError, ValueError):  # nobody reads the output any more, which the command itself will notice
                    say(f"{now - started:.0f} s: {_work or 'still running'}")

    thread = threading.Thread(target=beat, name="reinforce-ada-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(1.0)  # not for ever on a reader that has stopped
