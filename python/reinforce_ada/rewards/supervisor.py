"""The keeper of one reward worker: a process that runs no code but this, so it can always end the processes that the worker started.

It is started by its path with `python -I -S`, needs the standard library alone and is ready after some 20 ms. It starts the worker and
adopts the processes that the worker leaves behind (on Linux it is a subreaper: orphans below it become its children, even in sessions of
their own). It ends all of them when the worker ends, when its own standard input is closed, or when the process that started it is gone. If
the keeper itself is killed, the kernel ends the worker (PR_SET_PDEATHSIG). It ends as the worker did: by that exit code or signal.

    supervisor.py PARENT_PID FD,FD,.. COMMAND [ARGUMENT ..]      the file descriptors are the worker's and are not kept here
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(arguments: Sequence[str]) -> None:
    """Keep the worker until it ends or is no longer wanted; never return."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; the worker inherits this
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    children_changed, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(children_changed, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    worker = _start(arguments[2:], [int(fd) for fd in arguments[1].split(",")])
    status = _watch(worker, int(arguments[0]), children_changed)
    _end_descendants()
    _end_like(status)


def _prctl(option: int, value: int) -> None:
    """Call prctl. Other systems than Linux have none; there only the worker's own process group is ended with it."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _start(command: Sequence[str], fds: Sequence[int]) -> int:
    keeper = os.getpid()
    worker = os.fork()  # this process has one thread
    if worker:
        for fd in fds:
            os.close(fd)
        return worker
    try:
        os.setpgid(0, 0)
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == keeper:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)  # output of a reward must not mix with that of the program
            os.execv(command[0], list(command))
    finally:
        os._exit(127)


def _watch(worker: int, parent: int, children_changed: int) -> int:
    """Return the wait status of the worker, which is killed when it is no longer wanted."""
    poller = select.poll()
    poller.register(children_changed, select.POLLIN)
    poller.register(0, select.POLLIN)  # readable when it is closed
    if hasattr(os, "pidfd_open"):  # a process forked from the parent may hold the other end of standard input open
        with contextlib.suppress(OSError):
            poller.register(os.pidfd_open(parent), select.POLLIN)
    while True:
        if (status := _reap(worker)) is not None:
            return status
        if any(fd != children_changed for fd, _ in poller.poll()) or os.getppid() != parent:
            os.killpg(worker, signal.SIGKILL)
            return os.waitpid(worker, 0)[1]
        with contextlib.suppress(BlockingIOError):
            os.read(children_changed, 4096)


def _reap(worker: int) -> int | None:
    """Reap every child that has ended; return the status of the worker if it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                found = ended[1]
    return found


def _end_descendants() -> None:
    """Kill all children until none is left: the children of a killed one become children of this process."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, os.WNOHANG)  # raises when there is no child left
            for child in _children():
                with contextlib.suppress(OSError):  # gone, or another user's
                    os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> list[int]:
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                if int(stat.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def _end_like(status: int) -> None:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


if __name__ == "__main__":
    main(sys.argv[1:])
