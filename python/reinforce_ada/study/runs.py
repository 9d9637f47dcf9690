"""The runs of a study: each is a run folder that a process of its own trains; what is finished is skipped, what has begun goes on."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from reinforce_ada import config as configuration
from reinforce_ada import heartbeat
from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_file
from reinforce_ada.outside import one_line
from reinforce_ada.study.plan import Cell, Run
from reinforce_ada.study.settings import WHERE
from reinforce_ada.training.log import read_log

_PR_SET_PDEATHSIG = 1
_LOCK = ".lock"  # held by the process that evaluates the untrained model
_TAIL_BYTES = 1 << 16
_POLL_S = 0.05


class RunError(Exception):
    """A run ended with an error; the message is one line."""


def is_finished(out: Path, run: Run) -> bool:
    """Return whether a run has ended: it writes its model last."""
    return (out / run.name / "model").is_dir()


class Training:
    """A run that is trained to its end, from the start or from where it was, in a process of its own that ends with this one."""

    def __init__(self, out: Path, run: Run, num_jobs: int = 1) -> None:
        self._out, self._run = out, run
        folder = out / run.name
        self._printed = folder.with_name(f"{folder.name}.txt")
        if (folder / "config.toml").is_file():
            arguments = ["train", "--resume", str(folder)]
        else:
            file = folder.with_name(f"{folder.name}.toml")
            folder.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, configuration.dump(run.config(out)), where=WHERE)
            arguments = ["train", "--config", str(file)]
        with self._printed.open("ab") as output:
            self._began = output.tell()
            self.process = start(arguments, output.fileno(), num_jobs)

    def error(self) -> str:
        """Return why the run, whose process has ended, is not finished, with the last line that it printed; "" if it is."""
        status = self.process.wait()
        if status == 0 and is_finished(self._out, self._run):
            return ""
        return f"{_how(status)}: {_last_line(self._printed, self._began)} (all that it printed: {self._printed})"


def start(arguments: Sequence[str], output: int, num_jobs: int) -> subprocess.Popen[bytes]:
    """Start a command of this package that ends with this process and has its share of the processor's threads."""
    command = [sys.executable, "-m", "reinforce_ada", *arguments]
    parent = os.getpid()

    def end_with_parent() -> None:
        with contextlib.suppress(AttributeError, OSError):  # Linux only; elsewhere the run goes on, and its folder is in use until it ends
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)

    threads = {} if num_jobs == 1 else {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_jobs))}
    environment = {**threads, **os.environ}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=end_with_parent, env=environment
    )  # fmt: skip


def execute_once(out: Path, run: Run) -> None:
    """Train a run that every process of a study needs: one of them does, the others wait for its end. Raises: RunError."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: the run's own folder refuses a second process
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_finished(out, run) and (error := Training(out, run).error()):
            raise RunError(error)


def pass_rates(out: Path, run: Run) -> list[float]:
    """Return the held-out pass rates of the untrained model. Raises: InputError if its log does not have them."""
    path = out / run.name / "log.jsonl"
    for record in read_log(path):
        if record["kind"] == "eval" and record["step"] == 0:
            rates = [float(rate) for rate in record.get("per_prompt") or () if rate is not None]
            if rates and all(0 <= rate <= 1 for rate in rates):
                return rates
    raise InputError(WHERE, f"{path} has no evaluation of the untrained model", "held-out prompts and their pass rates")


def shard_of(cells: Sequence[Cell], shard: tuple[int, int]) -> list[Cell]:
    """Return every n-th run from the i-th on; the shards (1, n), .. (n, n) have every run exactly once."""
    return list(cells[shard[0] - 1 :: shard[1]])


def execute_all(out: Path, cells: Sequence[Cell], tell: Callable[[str], None], num_jobs: int = 1) -> int:
    """Train every run that is not finished, `num_jobs` at a time, and return how many failed; each end is told, with the time left."""
    waiting = [cell.run for cell in cells if not is_finished(out, cell.run)]
    num_runs, num_ended, num_failed, started = len(waiting), 0, 0, time.monotonic()
    tell(f"{len(cells)} runs: {len(cells) - num_runs} are finished, {num_runs} to go")
    running: dict[str, tuple[Training, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                run = waiting.pop(0)
                what = f"[{num_runs - len(waiting)}/{num_runs}] {run.name}"
                tell(f"{what} {'goes on' if (out / run.name / 'config.toml').is_file() else 'begins'}")
                running[what] = Training(out, run, num_jobs), time.monotonic()
            heartbeat.begins(f"{num_ended} of {num_runs} ended; {', '.join(running)}")
            for what, (training, began) in list(running.items()):
                if training.process.poll() is None:
                    continue
                del running[what]
                error, num_ended, now = training.error(), num_ended + 1, time.monotonic()
                num_failed += error != ""
                left = (now - started) / num_ended * (num_runs - num_ended)
                how = f"failed: {error}" if error else "finished"
                tell(f"{what} {how} · {_clock(now - began)} · elapsed {_clock(now - started)}, about {_clock(left)} left")
            time.sleep(_POLL_S if running else 0)
    finally:
        for training, _ in running.values():
            training.process.kill()
    return num_failed


def _how(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def _last_line(printed: Path, began: int) -> str:
    with printed.open("rb") as file:
        file.seek(max(began, printed.stat().st_size - _TAIL_BYTES))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "it printed nothing"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
