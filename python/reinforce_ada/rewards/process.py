"""The pool's side of one worker process: its start behind a keeper, its channel, and its end with all processes it started."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import spawn
from pathlib import Path

from reinforce_ada.rewards import worker
from reinforce_ada.rewards.channel import Channel
from reinforce_ada.rewards.worker import Chunk, Order, TimeLimits, get_progress, set_progress

_KEEPER = str(Path(__file__).with_name("supervisor.py"))
# The path is passed as arguments, and nothing is imported before it is set: the worker must find what this process finds, not a module of
# the same name in the folder in which it is started.
_BOOT = """import sys
fds, sys.path[:] = sys.argv[1:4], sys.argv[4:]
from reinforce_ada.rewards.worker import main
main(*map(int, fds))"""
_WORKER = str(Path(worker.__file__))
_END_S = 5.0  # for a keeper to end its worker; then the keeper is killed, and the kernel ends the worker


class WorkerProcess:
    """A process that loads `reward` ("module:function", or a pickle) and scores what arrives over `channel`.

    The constructor does not wait for the process. Between the two is a keeper (see `supervisor`), to which `pid` belongs.
    Raises: RuntimeError if this process must not start others yet.
    """

    def __init__(self, reward: str | bytes, limits: TimeLimits, *, imports_main: bool = True) -> None:
        preparation = spawn.get_preparation_data("reward-worker")
        preparation.pop("authkey", None)  # it cannot be pickled, and nothing uses it
        if not (imports_main and has_main_file()):
            for name in ("init_main_from_name", "init_main_from_path"):
                preparation.pop(name, None)
        ours, theirs = socket.socketpair()
        self._hang_report, hang_report = os.pipe()
        with tempfile.TemporaryFile() as shared:
            shared.truncate(mmap.PAGESIZE)
            self._progress = mmap.mmap(shared.fileno(), mmap.PAGESIZE)
            fds = [theirs.fileno(), hang_report, shared.fileno()]
            python, numbers = os.fsdecode(spawn.get_executable()), [str(fd) for fd in fds]
            command = [python, "-c", _BOOT, *numbers, *(entry or os.getcwd() for entry in sys.path)]
            keeper = [python, "-I", "-S", _KEEPER, str(os.getpid()), ",".join(numbers), *command]
            self._keeper = subprocess.Popen(keeper, stdin=subprocess.PIPE, pass_fds=fds, start_new_session=True)
        theirs.close()  # otherwise the worker's death would not be an end of file here
        os.close(hang_report)
        self.channel = Channel(ours, is_waiting=False)
        self.pid = self._keeper.pid
        with contextlib.suppress(OSError):  # it is gone already, which the first read of the channel reports
            self.channel.send(Order(dict(preparation), reward, limits))

    @property
    def progress(self) -> int:
        """Return the place in its chunk of the worker's current or last call; -1 if it has not begun the chunk."""
        return get_progress(self._progress)

    def send_chunk(self, chunk: Chunk) -> None:
        """Hand over a chunk, or as much of it as fits now. Raises: OSError when the worker is gone."""
        set_progress(self._progress, -1)
        self.channel.send(chunk)

    def wait(self, seconds: float) -> bool:
        """Return whether it has ended within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(max(0.0, seconds))
        return self._keeper.returncode is not None

    def end(self) -> tuple[int, str]:
        """End the worker and everything it started; return (its exit code, minus the signal; the stack in which it hung, or "")."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        if not self.wait(_END_S):
            self._keeper.kill()
            self._keeper.wait()
        report = _rest_of(self._hang_report)
        os.close(self._hang_report)
        self.channel.close()
        self._progress.close()
        return self._keeper.returncode, report


def has_main_file() -> bool:
    """Return whether a worker can import the program of this process: not what was typed into an interpreter or a notebook."""
    preparation = spawn.get_preparation_data("reward-worker")
    return "init_main_from_name" in preparation or os.path.isfile(preparation.get("init_main_from_path", ""))


def _rest_of(fd: int) -> str:
    """Return the content of a pipe, even if another process still holds its other end."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    ready = poller.poll(0)
    text = os.read(fd, 1 << 16).decode(errors="replace") if ready else ""
    return _readable(text) if text.startswith("Timeout (") else ""  # otherwise a reward wrote it to a descriptor that is not its own


def _readable(report: str) -> str:
    """Return faulthandler's report in the order of a traceback, without the worker's own frames around the reward."""
    stacks = []
    for stack in report.strip().split("\n\n"):
        lines = stack.replace("most recent call first", "most recent call last").split("\n")
        frames = [line for line in lines if line.startswith("  File")]
        shown = [line for line in frames if _WORKER not in line and '"<string>"' not in line]
        stacks += [*(line for line in lines if line not in frames), *reversed(shown)]
    return "\n".join(stacks)


def exit_text(exit_code: int) -> str:
    """Return "SIGKILL", or "exit code 3"."""
    with contextlib.suppress(ValueError):
        if exit_code < 0:
            return signal.Signals(-exit_code).name
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
