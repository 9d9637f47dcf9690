"""Work that is killed, or of which a call fails, at the n-th call that touches the disk."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

from reinforce_ada import files
from reinforce_ada.errors import InputError

# Of os: all that touches the disk, but for writes.
_CALLS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "chmod", "pwrite", "ftruncate")
KILLED, WHOLE, REFUSED, IN_SPITE = -9, 0, 2, 3  # IN_SPITE: a failure that did not matter


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "as asked")


def in_a_child(work: Callable[[], object], n: int, what: Callable[[], None]) -> int:
    """The status of a process that does `work` and is disturbed at call n (from 1): one of those above, or 1 for any other error."""
    child = os.fork()
    if child == 0:
        calls = _interfere(n, what)
        try:
            work()
        except InputError:
            os._exit(REFUSED)
        except BaseException:
            os._exit(1)
        os._exit(WHOLE if calls() < n else IN_SPITE)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _interfere(n: int, what: Callable[[], None]) -> Callable[[], int]:
    """Do `what` before the n-th call; how many there were is returned when asked."""
    count = 0

    def wrapped(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == n:
                what()
            return original(*args, **kwargs)

        return call

    for name in _CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    files._exchange = wrapped(files._exchange)  # type: ignore[assignment]
    return lambda: count
