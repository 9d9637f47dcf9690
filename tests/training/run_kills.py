"""Whole runs are killed with SIGKILL at random moments, again and again, and resumed; writes benchmarks/run_kills.json.

`python tests/training/run_kills.py [NUMBER]`: over one and two ranks under torchrun's agent, of the trainer, the other rank, the launcher,
or all of them at once. After every kill nothing of the run may be left running, and every run must end with the pools and the weights, to
the bit, of the one that nobody disturbed. The model is a toy, so that a start is quick; what is written and recovered is the product's.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import toy_process
from test_resume import same_weights
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from toy_runs import pools
from toy_training import beside

from reinforce_ada.training.log import read_log

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "run_kills.json"
SEED, STEPS, KILLS_OF_A_RUN = 0, 40, 6
WHOM = {1: ("trainer", "launcher", "all"), 2: ("trainer", "other rank", "launcher", "all")}
SETTINGS = {"steps": STEPS, "checkpoint_every": 4, "eval_every": 10, "dtype": "float32"}
_LONGEST_END_S = 60.0


@dataclass
class Kill:
    """One kill, and what it left."""

    ranks: int
    whom: str
    after_s: float  # since the trainer was there
    step: int  # the last one logged
    gone_after_s: float  # until nothing of the run was running
    left_running: int


class Run:
    """A run under torchrun's agent, in a session of its own.

    The agent and its ranks are forked from this process, which has imported everything: a start takes a tenth of a second.
    """

    def __init__(self, out: Path, ranks: int, resume: bool) -> None:
        self._out = out
        self._pids = [beside(out, f"pid-{rank}") for rank in range(ranks)]
        for path in (*self._pids, beside(out, "said")):
            path.unlink(missing_ok=True)
        self.launcher = os.fork()
        if self.launcher == 0:
            os.setsid()
            output = os.open(beside(out, "output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                launch(out, ranks, resume)
            except BaseException:
                os._exit(1)
            os._exit(0)

    def ended(self) -> bool:
        """Whether the launcher has."""
        return self.status() is not None

    def status(self) -> int | None:
        """The launcher's, once it has ended."""
        if not hasattr(self, "_status"):
            pid, status = os.waitpid(self.launcher, os.WNOHANG)
            if not pid:
                return None
            self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait_for_step(self) -> bool:
        """Until the trainer says that it goes on, or is about to begin; False when the launcher ends before."""
        said = beside(self._out, "said")
        while not (said.exists() and "a row per prompt" in said.read_text()):
            if self.ended():
                return False
            time.sleep(0.005)
        return True

    def processes(self) -> list[int]:
        """All of the session that run."""
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # gone meanwhile
                fields = (folder / "stat").read_text().rpartition(")")[2].split() if folder.name.isdecimal() else ["Z"]
                if fields[0] != "Z" and int(fields[3]) == self.launcher:
                    found.append(int(folder.name))
        return found

    def kill(self, whom: str) -> bool:
        """False when it was over before."""
        if self.ended():
            return False
        chosen = {"launcher": [self.launcher], "all": self.processes()}.get(whom)
        if chosen is None:
            chosen = [int(self._pids[whom != "trainer"].read_text())]
        for pid in chosen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def wait_until_gone(self) -> tuple[float, int]:
        """Seconds until nothing runs, and how many processes still do after the longest time; those are ended."""
        began = time.monotonic()
        while (them := self.processes()) and time.monotonic() - began < _LONGEST_END_S:
            self.ended()
            time.sleep(0.02)
        for pid in them:
            os.kill(pid, signal.SIGKILL)
        while not self.ended():
            time.sleep(0.02)
        return time.monotonic() - began, len(them)


def launch(out: Path, ranks: int, resume: bool) -> None:
    """As `torchrun --standalone --nproc-per-node RANKS` does, with a function in the place of a program."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=f"{out.name}-{os.getpid()}", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork", monitor_interval=0.05,
    )  # fmt: skip
    elastic_launch(config, play)(str(out), resume)


def play(out: str, resume: bool) -> None:
    """One rank."""
    rank = int(os.environ["RANK"])
    beside(Path(out), f"pid-{rank}").write_text(str(os.getpid()))
    toy_process.play({"out": out, "resume": resume, "kill": None, "on_ranks": [], "overrides": SETTINGS}, rank)


def failed(out: Path) -> SystemExit:
    return SystemExit(f"a run failed: {beside(out, 'output').read_text()[-3000:]}")


def whole(out: Path, ranks: int, resume: bool) -> float:
    """Run to the end; the seconds since the trainer was there."""
    run = Run(out, ranks, resume)
    run.wait_for_step()
    began = time.monotonic()
    while not run.ended():
        time.sleep(0.01)
    if run.status():
        raise failed(out)
    return time.monotonic() - began


def killed_run(out: Path, ranks: int, usual_s: float, draw: random.Random) -> list[Kill]:
    """Start a run, kill and resume it some times, and let it end."""
    kills: list[Kill] = []
    while len(kills) < KILLS_OF_A_RUN:
        run = Run(out, ranks, resume=(out / "config.toml").exists())
        whom = WHOM[ranks][(len(kills) + ranks) % len(WHOM[ranks])]
        if not run.wait_for_step():
            raise failed(out)
        after_s = draw.uniform(0, 1.5 * usual_s / KILLS_OF_A_RUN)
        time.sleep(after_s)
        if not run.kill(whom):
            break
        gone_after_s, left_running = run.wait_until_gone()
        step = max((r["step"] for r in read_log(out / "log.jsonl") if r["kind"] == "step"), default=0)
        kills.append(Kill(ranks, whom, round(after_s, 3), step, round(gone_after_s, 3), left_running))
    whole(out, ranks, resume=(out / "config.toml").exists())
    return kills


def main(count: int) -> int:
    for module in ("msgspec", "rich.progress", "torch._dynamo"):  # imported on first use: once here instead of in every rank
        importlib.import_module(module)
    draw = random.Random(SEED)
    kills: list[Kill] = []
    runs = same = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        usual = {ranks: whole(folder / f"undisturbed-{ranks}", ranks, resume=False) for ranks in WHOM}
        while len(kills) < count:
            ranks, out = 1 + runs % 2, folder / f"run-{runs}"
            kills += killed_run(out, ranks, usual[ranks], draw)
            undisturbed = folder / f"undisturbed-{ranks}"
            runs += 1
            same += pools(out) == pools(undisturbed) and same_weights(out, undisturbed)
            by = Counter(f"{kill.whom} of {kill.ranks}" for kill in kills)
            facts = {"runs": runs, "runs_with_the_same_pools_and_weights": same, "kills_of": dict(sorted(by.items()))}
            RESULTS.write_text(json.dumps({**facts, "kills": [asdict(kill) for kill in kills]}, indent=1) + "\n")
            print(f"{len(kills)} kills, {same} of {runs} runs ended as the undisturbed one", flush=True)
    left = sum(kill.left_running for kill in kills)
    print(f"{len(kills)} kills: {same} of {runs} runs with the same pools and weights, {left} processes left running")
    return 0 if same == runs and not left else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 48))
