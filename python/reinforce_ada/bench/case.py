"""The definition of a benchmark: an operator at one shape and dtype, its baselines, and its goals. It imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from reinforce_ada.bench.record import Record

Run = Callable[[], Any]
Kind = Literal["speedup", "time", "extra_mb", "us", "gelem_per_s"]

SHORT = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on one measured quantity.

    speedup: time of `against` / ours, at least.   time: ours / that of `against`, at most.   extra_mb: peak memory beyond inputs and
    results in 10^6 bytes, at most.   us: microseconds per call, at most.   gelem_per_s: 10^9 logits per second, at least.

    `against` names a candidate, or a family by its first word ("inductor": the fastest of "inductor logsumexp", "inductor
    cross_entropy", ...), or "best": the fastest baseline.
    """

    kind: Kind
    bound: float
    against: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A function that is timed beside the operator: a baseline that computes the same, or a floor that computes less."""

    name: str
    run: Run  # returns tensors
    floor: bool = False


@dataclass(frozen=True, slots=True)
class Setup:
    """A case with its inputs in memory.

    `check` raises AssertionError unless the results are right; `loose` allows the larger errors of baselines (TRL's bf16 logprobs are
    off by 7e-2). `held` are the tensors that exist before and after a call. `reset` runs before every timing, untimed.
    """

    subject: Run
    others: Sequence[Candidate]
    check: Callable[[Any, bool], None]
    held: Sequence[Tensor]
    moved_bytes: int  # bytes that must at least be read and written
    absent: Mapping[str, str] = field(default_factory=dict)  # baseline -> why it cannot run here
    elements: int = 0  # logits
    flops: int = 0
    reset: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the benchmark. `build` puts the inputs on a device; `quick_shape` is that of --quick, or None if that omits the case."""

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: str
    build: Callable[[Case, str], Setup]
    goals: tuple[Goal, ...] = ()
    naive: str = ""  # the baseline that a trainer would write without regard to speed
    quick_shape: Mapping[str, int] | None = None

    def __str__(self) -> str:
        return "/".join(label_of(self))


def label_of(case: Case | Record) -> tuple[str, str, str, str]:
    """Return operator, name, dtype and shape as texts, such as "token_logprobs", "forward", "bf16", "T=256,V=151936"."""
    return case.op, case.name, SHORT[case.dtype], ",".join(f"{letter}={size}" for letter, size in case.shape.items())
