"""Starts toy runs in processes of their own, and reads what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toy_training import beside

from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.training.log import read_log
from reinforce_ada.types import Scored


class Runner:
    """The process that forks toy runs."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("toy_process.py"))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, out: Path, *, kill: tuple[str, int] | None = None, resume: bool = False, **overrides: Any) -> int:
        """The run's exit status: 0, or -9 where it was killed."""
        (status,) = self.several(1, out, kill=kill, on_ranks=(0,), resume=resume, **overrides)
        return status

    def several(
        self, ranks: int, out: Path, *, kill: tuple[str, int] | None = None, on_ranks: Sequence[int] = (), resume: bool = False,
        **overrides: Any,
    ) -> list[int]:  # fmt: skip
        """The exit status of each rank of a run; `kill` is played on `on_ranks`."""
        line = json.dumps(
            {"out": str(out), "ranks": ranks, "kill": kill, "on_ranks": [*on_ranks], "resume": resume, "overrides": overrides}
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return [int(status) for status in self._process.stdout.readline().split()]

    def close(self) -> None:
        self._process.communicate()


def scored(out: Path) -> list[tuple[Any, ...]]:
    """Every scored completion of the journal, in its order."""
    if not (out / "rollouts.sqlite").exists():
        return []
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        events = [e for step in range(1, (store.last_step() or 0) + 1) for e in store.events(step)]
    return [(e.id, e.policy_version, tuple(e.completion.token_ids), e.reward) for e in events if isinstance(e, Scored)]


def submitted(out: Path) -> list[str]:
    path = beside(out, "submitted")
    return path.read_text().splitlines() if path.exists() else []


def said(out: Path) -> str:
    """What the last process of the run told the person watching."""
    return beside(out, "said").read_text()


def error(out: Path, rank: int = 0) -> str:
    """What the run's last failure on this rank said."""
    return beside(out, f"error-{rank}").read_text()


def pools(out: Path) -> list[tuple[Any, ...]]:
    """Correct, wrong and void completions of every pool; how many were issued beyond them is a matter of timing."""
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        return [tuple(row[:5]) for row in store.pool_counts()]


TRAINED = ("step", "loss", "grad_norm", "learning_rate", "first_round_reward", "pool_reward", "kept_reward", "signal_fraction")


def trained(out: Path) -> list[tuple[Any, ...]]:
    return [tuple(r[k] for k in TRAINED) for r in read_log(out / "log.jsonl") if r["kind"] == "step"]


def evaluations(out: Path) -> dict[int, list[float]]:
    found = [(r["step"], r["per_prompt"]) for r in read_log(out / "log.jsonl") if r["kind"] == "eval"]
    assert len(dict(found)) == len(found)  # once each
    return dict(found)
