"""The timing of cases: candidates take turns in one process, on one thread and by CPU time, after their results have been compared."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from reinforce_ada.bench import memory
from reinforce_ada.bench.case import Candidate, Case, Run
from reinforce_ada.bench.record import Record, Timing
from reinforce_ada.errors import InputError
from reinforce_ada.ops import _dispatch

MIN_ROUNDS, MAX_ROUNDS = 5, 15
_CASE_S = 4.0  # time for the rounds of a case with more than MIN_ROUNDS
_TIMING_S = 5e-3  # shortest timing, so that the clock's own microsecond does not show
_MAX_CALLS = 2000
_L2_BYTES = 256 << 20  # more than any GPU caches


class WrongResultError(Exception):
    """The error of an operator with wrong results, which is not timed."""


class CpuClock:
    """Process CPU time, since wall time on a shared machine includes other programs. Freeing the results is part of a call."""

    def seconds(self, run: Run, calls: int) -> float:
        """Return the mean time of a call over `calls` of them."""
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls


class CudaClock:
    """Events on the stream around each call, with the L2 cache flushed before."""

    def __init__(self) -> None:
        self._flush = torch.empty(_L2_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, run: Run, calls: int) -> float:
        """Return the mean time of a call over `calls` of them."""
        total_ms = 0.0
        for _ in range(calls):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._flush.zero_()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            total_ms += start.elapsed_time(stop)
        return 1e-3 * total_ms / calls


@contextmanager
def settings(device: str) -> Iterator[None]:
    """Use one thread, fixed random numbers, no compiler processes, and libraries that are warmed up."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench", "--device cuda", "a CUDA device that torch can use", "see reinforce-ada doctor")
    import torch._inductor.config as inductor  # its compile workers would outlive the measurement

    before = torch.get_num_threads(), inductor.compile_threads
    torch.set_num_threads(1)
    inductor.compile_threads = 1
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # baselines have some
            _warm_up(device)
            yield
    finally:
        torch.set_num_threads(before[0])
        inductor.compile_threads = before[1]


def _warm_up(device: str) -> None:
    """Run the libraries once, so that their set-up is not counted in the memory of the first case."""
    memory.let_malloc_keep(True)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
        torch.mm(x, x.T).log_softmax(-1).sum().backward()  # type: ignore[no-untyped-call]


class Session:
    """One case, ready to be timed: inputs in memory, every candidate checked, its memory measured and its calls counted.

    A baseline that fails or gives other results is left out, with the reason in `absent`.
    """

    def __init__(self, case: Case, device: str) -> None:
        torch.compiler.reset()
        self.case, self.device = case, device
        self.clock = CudaClock() if device == "cuda" else CpuClock()
        self.setup = case.build(case, device)
        self.absent = dict(self.setup.absent)
        self._metered = memory.missing(device) is None
        self._extra: dict[str, int | None] = {}
        self._calls: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}  # one number per turn
        self._turns = 0
        cycle_s = self._prepare_subject()
        self.others = [c for c in self.setup.others if c.name not in self.absent]
        for other in list(self.others):
            cycle_s += self._prepare(other)
        self.others = [c for c in self.others if c.name not in self.absent]
        self.rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(_CASE_S / max(cycle_s, 1e-9))))

    # -------------------- before the timing

    def _prepare_subject(self) -> float:
        """Check and measure the operator. Memory that native code keeps after the first call counts as extra, too."""
        before = memory.resident_bytes(self.device) if self._metered else 0
        self._fresh(self.setup.subject)
        kept = max(0, memory.resident_bytes(self.device) - before) if self._metered else 0
        extra, results, seconds = self._metered_call(self.setup.subject)
        try:
            self.setup.check(results, False)
        except AssertionError as e:
            raise WrongResultError(f"{self.case}: {e}") from e
        self._extra[""] = None if extra is None else extra + kept
        return self._count_calls("", self.setup.subject, seconds)

    def _prepare(self, other: Candidate) -> float:
        try:
            results = self._fresh(other.run)
            if not other.floor:
                self.setup.check(results, True)
            del results
        except AssertionError as e:
            self.absent[other.name] = f"computes something else: {_first_line(e)}"
            return 0.0
        except Exception as e:  # another package may fail in any way on this device
            self.absent[other.name] = f"{type(e).__name__}: {_first_line(e)}"
            return 0.0
        self._extra[other.name], _, seconds = self._metered_call(other.run)
        self._seconds[other.name] = []
        return self._count_calls(other.name, other.run, seconds)

    def _fresh(self, run: Run) -> Any:
        if self.setup.reset is not None:
            self.setup.reset()
        return run()

    def _metered_call(self, run: Run) -> tuple[int | None, Any, float]:
        """Return (extra bytes, results, seconds) of one call."""
        if self.setup.reset is not None:
            self.setup.reset()
        taken: list[Any] = []
        spent: list[float] = []

        def call() -> Any:
            spent.append(self.clock.seconds(lambda: taken.append(run()), 1))
            return taken.pop()

        extra, results = memory.peak_extra_bytes(call, self.setup.held, self.device) if self._metered else (None, call())
        return extra, results, spent[0]

    def _count_calls(self, name: str, run: Run, seconds: float) -> float:
        """Set the calls of one timing: enough for the clock, or one if inputs must be restored. Return the seconds of a timing."""
        calls = 1
        while seconds * calls < _TIMING_S and calls < _MAX_CALLS and self.setup.reset is None:
            calls = min(_MAX_CALLS, int(_TIMING_S / max(seconds, 1e-9)) + 1, 4 * calls)
            seconds = self.clock.seconds(run, calls)
        self._calls[name] = calls
        return seconds * calls

    # -------------------- the timing

    def turn(self) -> None:
        """Time every other candidate once, starting with another one at each turn."""
        first = self._turns % max(1, len(self.others))
        for other in self.others[first:] + self.others[:first]:
            self._seconds[other.name].append(self._time(other.name, other.run))
        self._turns += 1

    def subject(self) -> float:
        """Return the seconds per call of the operator."""
        return self._time("", self.setup.subject)

    def _time(self, name: str, run: Run) -> float:
        if self.setup.reset is not None:
            self.setup.reset()
        with memory.holes_filled((33 << 20,), self.device):  # malloc maps a block above 32 MiB for which there is no hole
            return self.clock.seconds(run, self._calls[name])

    def run(self) -> Record:
        """Run all rounds and return the record."""
        own = []
        for _ in range(self.rounds):
            self.turn()
            own.append(self.subject())
        return self.record(own)

    def record(self, own: Sequence[float]) -> Record:
        """Return the record, given the operator's seconds in each turn."""
        case, setup = self.case, self.setup
        others = {c.name: self._timing(c.name, self._seconds[c.name], own, c.floor) for c in self.others}
        return Record(
            op=case.op,
            name=case.name,
            dtype=case.dtype,
            shape=dict(case.shape),
            backend=_dispatch.resolve(case.op, "auto", torch.device(self.device), getattr(torch, case.dtype)),
            rounds=len(own),
            calls=self._calls[""],
            ours=self._timing("", own, own, False),
            others=others,
            absent=self.absent,
            moved_bytes=setup.moved_bytes,
            elements=setup.elements,
            flops=setup.flops,
            naive=case.naive,
            goals=case.goals if self.device == "cpu" else (),  # the goals are those of one CPU thread
        )

    def _timing(self, name: str, seconds: Sequence[float], own: Sequence[float], floor: bool) -> Timing:
        ms = _quartiles([1e3 * s for s in seconds])
        ratio = _quartiles([theirs / ours for theirs, ours in zip(seconds, own, strict=True)])
        extra = self._extra[name]
        return Timing(*ms, *ratio, None if extra is None else extra / 1e6, floor)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (median, lower quartile, upper quartile)."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def _first_line(e: Exception) -> str:
    return next((line.strip() for line in str(e).splitlines() if line.strip()), "no message")[:160]
