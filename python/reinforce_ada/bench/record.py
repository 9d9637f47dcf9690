"""The records of measurements, their JSON, and the verdicts on the goals. It imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada.bench.case import Goal, label_of
from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_file

FORMAT = 1
_MORE_IS_BETTER = ("speedup", "gelem_per_s")


@dataclass(frozen=True, slots=True)
class Timing:
    """The timing of one candidate: milliseconds per call, and its time over ours round by round; medians with quartiles."""

    ms: float
    ms_low: float
    ms_high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    extra_mb: float | None  # peak beyond inputs and results, 10^6 bytes
    floor: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """The measurement of one case."""

    op: str
    name: str
    dtype: str
    shape: Mapping[str, int]
    backend: str
    rounds: int
    calls: int  # calls of ours in one timing
    ours: Timing
    others: Mapping[str, Timing]
    absent: Mapping[str, str]
    moved_bytes: int
    elements: int
    flops: int
    naive: str
    goals: tuple[Goal, ...]

    @property
    def label(self) -> str:
        """Return operator, case, dtype and shape in one line."""
        return "/".join(label_of(self))

    @property
    def gb_per_s(self) -> float:
        """Return the rate of the bytes that must at least move, by the median time."""
        return self.moved_bytes / self.ours.ms / 1e6

    @property
    def gflop_per_s(self) -> float:
        """Return the rate of the matrix products, by the median time."""
        return self.flops / self.ours.ms / 1e6

    def baselines(self) -> dict[str, Timing]:
        """Return the candidates that compute the same."""
        return {name: t for name, t in self.others.items() if not t.floor}

    def fastest(self, family: str) -> str | None:
        """Return the fastest candidate of a family (see `Goal`), or None if none was measured."""
        names = self.baselines() if family == "best" else [n for n in self.others if n == family or n.startswith(f"{family} ")]
        return min(names, key=lambda name: self.others[name].ms, default=None)


@dataclass(frozen=True, slots=True)
class GoalVerdict:
    """A goal with the value reached. If it could not be measured, `met` is None and `reached` says why."""

    goal: str
    reached: str
    spread: str
    met: bool | None

    @property
    def word(self) -> str:
        """Return "hit", "miss" or "not measured"."""
        return "not measured" if self.met is None else "hit" if self.met else "miss"


@dataclass(frozen=True, slots=True)
class Results:
    """One run of the benchmarks: machine, versions and settings, and its records."""

    about: Mapping[str, Any]
    records: Sequence[Record]

    def save(self, path: Path) -> None:
        """Write JSON with one record per line."""
        lines = ",\n".join(json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in self.records)
        about = json.dumps({"format": FORMAT, **self.about}, indent=1, ensure_ascii=False)
        replace_file(path, f'{{"about": {about},\n"records": [\n{lines}\n]}}\n', where="bench")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that `save` wrote. Raises: InputError for any other file."""
        try:
            found = json.loads(path.read_text())
            about = found["about"]
            records = [_record(r) for r in found["records"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            given = f"{path} holds no results ({type(e).__name__}: {e})"
            raise InputError("bench", given, "a file that `reinforce-ada bench` wrote") from e
        if about.get("format") != FORMAT:
            raise InputError("bench", f"{path} has format {about.get('format')}", f"format {FORMAT}", "run the benchmarks again")
        return cls(about, records)


def _record(found: dict[str, Any]) -> Record:
    others = {name: Timing(**t) for name, t in found["others"].items()}
    goals = tuple(Goal(**g) for g in found["goals"])
    return Record(**{**found, "ours": Timing(**found["ours"]), "others": others, "goals": goals})


# -------------------- goals


def verdicts(record: Record) -> Iterator[GoalVerdict]:
    """Yield the verdict on every goal of a record. Medians decide; no number is rounded in favour of a goal."""
    yield from (_verdict(record, goal) for goal in record.goals)


def _verdict(record: Record, goal: Goal) -> GoalVerdict:
    name = record.fastest(goal.against) if goal.against else ""
    if name is None:
        reason = "; ".join(f"{n}: {why}" for n, why in record.absent.items()) or "nothing to compare with was measured"
        return GoalVerdict(goal_text(goal, None), reason, "", None)
    text = goal_text(goal, None if not name else record.others[name])
    found = quantity(record, goal, name)
    if found is None:
        return GoalVerdict(text, "cannot be measured on this system", "", None)
    value, low, high = found
    less_is_better = goal.kind not in _MORE_IS_BETTER
    reached = number(value, less_is_better) + ("" if name in ("", goal.against) else f" ({name})")
    spread = "" if low is None or high is None else f"{number(low, less_is_better)}–{number(high, less_is_better)}"
    return GoalVerdict(text, reached, spread, is_met(goal, value))


def is_met(goal: Goal, value: float) -> bool:
    """Return whether a goal is met by the quantity that it bounds."""
    return value >= goal.bound if goal.kind in _MORE_IS_BETTER else value <= goal.bound


def quantity(record: Record, goal: Goal, name: str) -> tuple[float, float | None, float | None] | None:
    """Return median and quartiles of the quantity that the goal bounds; None if it was not measured."""
    ours = record.ours
    if goal.kind == "extra_mb":
        return None if ours.extra_mb is None else (ours.extra_mb, None, None)
    if goal.kind == "us":
        return 1e3 * ours.ms, 1e3 * ours.ms_low, 1e3 * ours.ms_high
    if goal.kind == "gelem_per_s":
        return record.elements / ours.ms / 1e6, record.elements / ours.ms_high / 1e6, record.elements / ours.ms_low / 1e6
    t = record.others[name]
    return (t.ratio, t.ratio_low, t.ratio_high) if goal.kind == "speedup" else (1 / t.ratio, 1 / t.ratio_high, 1 / t.ratio_low)


def goal_text(goal: Goal, against: Timing | None) -> str:
    """Return a goal as a text such as "≥ 3.5 × inductor" or "≤ 10 MB extra"."""
    bound = f"{goal.bound:g}"
    if goal.kind == "speedup":
        return f"≥ {bound} of {goal.against}" if against is not None and against.floor else f"≥ {bound} × {goal.against}"
    if goal.kind == "time":
        return f"≤ {bound} × the time of {goal.against}"
    return {"extra_mb": f"≤ {bound} MB extra", "us": f"≤ {bound} µs", "gelem_per_s": f"≥ {bound} Gelem/s"}[goal.kind]


def number(value: float, up: bool = False) -> str:
    """Return three digits, at most two after the point, rounded down, or up if less is better: never in favour of a goal."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = min(max(0, 2 - math.floor(math.log10(value))), 2)
    step = 10**digits
    # The product may be off in the last bit: 1.1 * 100 = 110.00000000000001.
    cut = math.ceil(value * step - 1e-9) if up else math.floor(value * step + 1e-9)
    return f"{cut / step:.{digits}f}"


def slower(records: Iterable[Record]) -> Iterator[tuple[Record, str, Timing]]:
    """Yield every baseline that took less time than ours, as (record, baseline, timing)."""
    for record in records:
        for name, timing in record.baselines().items():
            if timing.ratio < 1:
                yield record, name, timing
