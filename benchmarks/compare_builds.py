"""Times this build's operators beside those of another one: `python benchmarks/compare_builds.py ../before/.venv/bin/python`.

Two builds in one process would share native symbols, so each has a process of its own, both pinned to one core; they take turns case by
case, and a pair of processes gives the median over turns of (this build's seconds / the other's). The memory that a process happens to get
moves the fastest cases by 7 % for as long as it lives, so all is done in several pairs: the last lines print each case's median over pairs,
and the smallest and largest. Every case is checked before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TURNS = 15
TURN_S = 0.03  # at least this long, so that one interruption by the system is not the whole turn


def serve(pattern: str) -> None:
    """Run one build's process: a line of stdin is the number of a case to prepare, or "time"; each answer is a line of JSON."""
    from reinforce_ada.bench.case import Case, Setup
    from reinforce_ada.bench.catalogue import choose
    from reinforce_ada.bench.measure import Session, settings

    def alone(case: Case, device: str) -> Setup:
        return dataclasses.replace(build(case, device), others=())

    cases = choose([], pattern)
    answer([str(case) for case in cases])
    session, repeats = None, 1
    with settings("cpu"):
        for line in sys.stdin:
            if line.strip() == "time":
                assert session is not None
                answer(min(session.subject() for _ in range(repeats)))
                continue
            session = None  # its tensors go before the next ones come
            case = cases[int(line)]
            build = case.build
            session = Session(dataclasses.replace(case, build=alone), "cpu")
            repeats = max(1, int(TURN_S / max(session.subject() * session._calls[""], 1e-9)))
            answer("ready")


def answer(value: object) -> None:
    """Print one line for the process that asked."""
    print(json.dumps(value), flush=True)


class Build:
    """The process of one build."""

    def __init__(self, python: str, pattern: str) -> None:
        command = [python, str(Path(__file__).resolve()), "--serve", "--case", pattern]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.cases: list[str] = self._answer()

    def prepare(self, case: int) -> None:
        """Wait until the inputs of a case are in memory and its results are checked."""
        self._ask(str(case))

    def seconds(self) -> float:
        """Return the seconds of a call of the prepared case."""
        return float(self._ask("time"))

    def _ask(self, question: str) -> Any:
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} ended with exit code {self.process.wait()}")
        return json.loads(line)


@contextmanager
def both(python: str, pattern: str) -> Iterator[tuple[Build, Build]]:
    """Yield (the other build, this one), on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    builds = Build(python, pattern), Build(sys.executable, pattern)
    try:
        yield builds
    finally:
        for build in builds:
            build.process.kill()


def ratios(python: str, pattern: str) -> dict[str, float]:
    """Return (this build's seconds / the other's) of each case from one pair of processes, and print each as it comes."""
    found = {}
    with both(python, pattern) as (other, this):
        if other.cases != this.cases:
            raise SystemExit("the two builds have different cases; choose common ones by --case")
        for i, case in enumerate(this.cases):
            for build in (other, this):
                build.prepare(i)
            turns = [(other.seconds(), this.seconds()) for _ in range(TURNS)]
            before, now = (statistics.median(side) for side in zip(*turns, strict=True))
            found[case] = statistics.median(b / a for a, b in turns)
            print(f"{found[case]:6.3f} {1e3 * before:10.4f} ms {1e3 * now:10.4f} ms  {case}", flush=True)
    return found


def main() -> int:
    """Compare the builds; return 1 if any case is slower than the limit, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="?", help="the interpreter of an environment with the other build")
    parser.add_argument("--case", default="", help="only cases with this in their names")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of processes (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=1.03, help="the ratio above which a case counts as slower (default: %(default)s)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.case)
        return 0
    if not args.python:
        parser.error("name the interpreter of the other build, such as ../before/.venv/bin/python")
    if args.pairs < 1:
        parser.error("--pairs: at least 1")
    pairs = []
    for number in range(1, args.pairs + 1):
        print(f"pair {number} of {args.pairs}", flush=True)
        pairs.append(ratios(args.python, args.case))
    slower = 0
    print("median over pairs [smallest, largest]")
    for case in pairs[0]:
        of_pairs = [pair[case] for pair in pairs]
        ratio = statistics.median(of_pairs)
        slower += ratio > args.limit
        print(f"{ratio:6.3f} [{min(of_pairs):.3f}, {max(of_pairs):.3f}]  {case}{'  SLOWER' if ratio > args.limit else ''}")
    print(f"{slower} of {len(pairs[0])} cases are more than {args.limit - 1:.0%} slower than the other build")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
