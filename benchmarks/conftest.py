"""Timing that can be trusted: candidates take turns in one process, one thread and CPU time, and only after they agree."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[[], object]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@pytest.fixture(scope="session")
def read_ceiling() -> float:
    """What one thread can read, GB/s: the best of a few sums over 128 MiB."""
    x = torch.ones(1 << 25)
    torch.set_num_threads(1)
    return x.nbytes / min(_seconds(x.sum) for _ in range(7)) / 1e9


@pytest.fixture
def interleave(benchmark: Any, commit: str, read_ceiling: float) -> Callable[..., dict[str, float]]:
    """Times `subject` by pytest-benchmark, and between its rounds each baseline once.

    Call it with `subject`, `baselines` by name, `moved_bytes` (what the subject must read and write at least), `reset` (run before
    every timing, not timed) and whatever else describes the case. `extra_info` receives the medians, for each baseline the ratio
    baseline / subject with its quartiles over the rounds, and GB/s with the share of the read ceiling. Returns the ratios.
    """

    def run(
        subject: Run, baselines: Mapping[str, Run], *, moved_bytes: int, reset: Run = lambda: None, rounds: int = 9, **case: object
    ) -> dict[str, float]:
        seconds: dict[str, list[float]] = {name: [] for name in baselines}

        def turn() -> None:
            for name, baseline in baselines.items():
                reset()
                seconds[name].append(_seconds(baseline))
            reset()

        benchmark._timer = time.process_time  # the machine may be shared: wall time would measure the neighbours
        benchmark.pedantic(subject, setup=turn, rounds=rounds, warmup_rounds=1)
        own = benchmark.stats.stats.data
        median = statistics.median(own)
        info = benchmark.extra_info
        info.update({key: str(value) for key, value in case.items()})
        info.update(device="cpu", torch=torch.__version__, commit=commit, threads=1, subject_ms=1e3 * median)
        info.update(gb_per_s=moved_bytes / median / 1e9, of_read_ceiling=moved_bytes / median / 1e9 / read_ceiling)
        ratios = {}
        for name, times in seconds.items():
            rounds_ratio = [b / s for b, s in zip(times[-rounds:], own, strict=True)]
            ratios[name] = statistics.median(times[-rounds:]) / median
            info[name] = {"ms": 1e3 * statistics.median(times[-rounds:]), "ratio": ratios[name]}
            info[name]["ratio_quartiles"] = statistics.quantiles(rounds_ratio, n=4)[::2]
        print({key: round(value, 2) for key, value in ratios.items()}, f"{1e3 * median:.2f} ms, {info['gb_per_s']:.1f} GB/s")
        return ratios

    return run


def _seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
