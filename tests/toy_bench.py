"""Cases and records of benchmarks, for their tests."""

from __future__ import annotations

import torch

from reinforce_ada.bench.case import Case, Goal, Setup
from reinforce_ada.bench.checks import close
from reinforce_ada.bench.record import Record, Timing

MB = 1_000_000


def timing(ratio: float, *, ms: float = 2.0, floor: bool = False, extra_mb: float | None = 3.0) -> Timing:
    return Timing(ms, 0.9 * ms, 1.1 * ms, ratio, 0.95 * ratio, 1.05 * ratio, extra_mb, floor)


def a_record(*goals: Goal, **changes: object) -> Record:
    others = {
        "eager": timing(10.0, ms=20),
        "inductor a": timing(4.0, ms=8),
        "inductor b": timing(3.4999, ms=6.9998),
        "numpy": timing(0.8, ms=1.6),
        "reading its bytes": timing(0.9, ms=1.8, floor=True),
    }
    given = {
        "op": "policy_loss", "name": "ppo", "dtype": "float32", "shape": {"N": 4, "L": 8}, "backend": "cpu", "rounds": 5, "calls": 1,
        "ours": timing(1.0), "others": others, "absent": {"liger": "needs a GPU"}, "moved_bytes": 2_000_000, "elements": 8_000_000,
        "flops": 0, "naive": "eager", "goals": goals,
    }  # fmt: skip
    return Record(**{**given, **changes})


def a_case(subject=None, others=(), check=None, reset=None) -> Case:
    """Ours is a square; the check wants one."""
    x = torch.arange(4.0)

    def wants_square(results: torch.Tensor, loose: bool) -> None:
        close("square", results, x * x, 0.5 if loose else 0.0)

    setup = Setup(subject or (lambda: x * x), others, check or wants_square, [x], moved_bytes=32, absent={"gone": "why"}, reset=reset)
    return Case("policy_loss", "square", {"N": 4}, "float32", lambda case, device: setup, (Goal("extra_mb", 1),))
