"""`reinforce-ada bench`: runs the cases, shows its progress, writes JSON and figure, prints the table of goals."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from reinforce_ada import heartbeat
from reinforce_ada.bench import figure, machine, memory, tables
from reinforce_ada.bench.case import Case
from reinforce_ada.bench.catalogue import choose
from reinforce_ada.bench.measure import Session, WrongResultError, settings
from reinforce_ada.bench.record import Record, Results, number
from reinforce_ada.errors import InputError
from reinforce_ada.outside import is_installed, literal_names, show


def listing(ops: Sequence[str], pattern: str, quick: bool) -> None:
    """Print the names of the cases."""
    for case in choose(ops, pattern, quick=quick):
        show(str(case))


def run(ops: Sequence[str], pattern: str, *, device: str, quick: bool, to: Path) -> int:
    """Measure the cases that `choose` finds, and write JSON and, beside it, a figure.

    Returns: 0, or 1 if an operator's results were wrong; such a case is not timed.
    Raises: InputError for a choice without cases, or a device that does not exist.
    """
    cases = choose(ops, pattern, quick=quick)
    if to.is_dir() or not to.absolute().parent.is_dir():
        raise InputError("bench", f"--json {to}", "a file in a folder that exists")
    to.touch()  # so that a file that cannot be written fails now and not after half an hour of measuring
    with settings(device):
        results, wrong = _measure(cases, device, quick, to)
    show("\n".join(_report(results, wrong)))
    show(f"\n{to}")
    if is_installed("matplotlib"):
        with literal_names():
            figure.draw(results, to.with_suffix(".png"))
        show(str(to.with_suffix(".png")))
    else:
        show("no figure: matplotlib is not installed (extra `bench`)")
    return 1 if wrong else 0


def _measure(cases: Sequence[Case], device: str, quick: bool, to: Path) -> tuple[Results, list[str]]:
    """Return the results and the errors in results of ours. The file is written after every case, so an interrupted run keeps it."""
    start = time.monotonic()
    about = {"started": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "quick": quick, **machine.about(device)}
    _warn(about["load"], device)
    records: list[Record] = []
    wrong: list[str] = []
    for i, case in enumerate(cases, 1):
        seconds = int(time.monotonic() - start)
        heartbeat.begins(str(case))
        _say(f"[{i:>{len(str(len(cases)))}}/{len(cases)}] {seconds // 60}:{seconds % 60:02} {case}", end=" ")
        try:
            records.append(Session(case, device).run())
            _say(_brief(records[-1]))
        except WrongResultError as e:
            wrong.append(str(e))
            _say(f"WRONG: {e}")
        results = Results({**about, "seconds": round(time.monotonic() - start)}, records)
        results.save(to)
    return results, wrong


def _warn(load: float, device: str) -> None:
    if reason := memory.missing(device):
        _say(f"peak memory is not measured: {reason}")
    if load > 0.5:
        _say(f"other programs are running here (load {load:.1f}): they take memory bandwidth from the measured ones")


def _brief(r: Record) -> str:
    name = r.fastest("best")
    beside = f", {number(r.others[name].ratio)} × as fast as {name}" if name else ""
    return f"{tables.duration(r.ours.ms)}{beside}"


def _report(results: Results, wrong: Sequence[str]) -> list[str]:
    records = results.records
    lines = ["", tables.as_text(tables.GOALS, tables.goal_rows(records)), tables.tally(records)] if tables.goal_rows(records) else []
    if rows := tables.slower_rows(records):
        lines += ["\nbaselines that are faster", tables.as_text(tables.SLOWER, rows)]
    if reasons := tables.absent_reasons(records):
        lines += ["\nnot measured", *reasons]
    if results.about["quick"]:
        lines += ["\n--quick: the goals are meant for the full shapes; these are not the numbers to quote"]
    return [*lines, *(f"\nWRONG RESULTS, not timed: {text}" for text in wrong)]


def _say(text: str, end: str = "\n") -> None:
    show(text, end=end, file=sys.stderr)
