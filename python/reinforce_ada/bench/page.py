"""The generation of docs/benchmarks.md from committed results and a template. It imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reinforce_ada.bench import tables
from reinforce_ada.bench.record import Record, Results
from reinforce_ada.errors import InputError

_QUICK = "**`--quick`: small shapes, not the numbers to quote**"


def render(template: str, main: Results, others: Sequence[Results] = ()) -> str:
    """Return the template with every {{name}} filled in: the main machine, and the others below it.

    Raises: InputError for a template that lacks a part, or names an unknown one.
    """
    parts = {
        "machine": machine(main.about),
        "tally": tables.tally(main.records),
        "summary": tables.as_markdown(tables.SUMMARY, tables.summary_rows(main.records)),
        "goals": _goals(main.records),
        "slower": _slower(main.records),
        "measured": _measured(main.records, "###"),
        "absent": "\n".join(f"- {line}" for line in tables.absent_reasons(main.records)) or "Nothing.",
        "others": "\n\n".join(map(_other, others)) or "None yet.",
    }
    names = set(re.findall(r"{{(\w+)}}", template))
    if names != parts.keys():
        raise InputError("bench", f"the template has {sorted(names)}", f"each of {sorted(parts)}")
    return re.sub(r"{{(\w+)}}", lambda match: parts[match[1]], template)


def machine(about: Mapping[str, Any]) -> str:
    """Return a list of the machine, system and versions of a measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"device: {about['device']}" + (", one thread" if about["device"] == "cpu" else ""),
        f"processor: {about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB"
        + (f", kernels for {about['isa']}" if about["device"] == "cpu" else ""),
        f"{about['system']}, huge pages: {about['huge_pages']}, Python {about['python']}, {versions}",
        f"commit `{about['commit'] or 'unknown'}`, {about['started']}, {about['seconds'] / 60:.0f} min in all",
    ]
    if about["quick"]:
        lines.append(_QUICK)
    return "\n".join(f"- {line}" for line in lines)


def _goals(records: Sequence[Record]) -> str:
    rows = [(*row[:-1], f"**{row[-1]}**" if row[-1] != "hit" else row[-1]) for row in tables.goal_rows(records)]
    return tables.as_markdown(tables.GOALS, rows)


def _slower(records: Sequence[Record]) -> str:
    rows = tables.slower_rows(records)
    return tables.as_markdown(tables.SLOWER, rows) if rows else "No baseline was faster in any case."


def _other(results: Results) -> str:
    about = results.about
    return f"### {about['device']}, {about['cpu']}\n\n{machine(about)}\n\n{_measured(results.records, '####')}"


def _measured(records: Sequence[Record], heading: str) -> str:
    of = {op: [r for r in records if r.op == op] for op in dict.fromkeys(r.op for r in records)}
    return "\n\n".join(f"{heading} {op}\n\n{tables.as_markdown(tables.MEASURED, tables.measured_rows(found))}" for op, found in of.items())
