"""What came of the mutants: docs/gpu_mutations.md, all that is kept of a run.

The page says how many mutants of each source were killed, and gives a row to each that survived: the reason in it is written by hand, in
the page. The last column of a source stands for the names of its mutants, so whoever reads the page knows whether these are the ones that
were tried; a mutant of such a source which has no row was killed. How each one died is in build/, until that is removed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpu_proof import ROOT
from gpu_proof.mutation.mutants import Mutant
from gpu_proof.mutation.mutants import __doc__ as RULES

PAGE = ROOT / "docs/gpu_mutations.md"
RESULTS = ROOT / "build/gpu_mutants/results.json"
SURVIVED, KILLED = "survived", "killed, as the page says"

_INTRODUCTION = """# Mutations of the GPU kernels

Written by `make test-gpu-mutations`, but for the reasons of the survivors: these are written here, and kept.

Each mutant is the sources with one barrier, bound or mask removed. It is killed when a case of its operator fails: CUDA
sources compiled for the CPU (tools/gpu_proof/cuda_on_cpu), with threads in random order, every access to memory checked for
races, and guards around every tensor; Triton kernels in the interpreter, on tensors inside larger ones full of NaN, where an
access outside of every tensor that the kernel was given is an error. In the table, `names` stands for the names of the mutants that
were tried: a test fails when the sources have others.
"""


class Page(NamedTuple):
    """What the page knows."""

    tried: dict[str, str]  # source -> what stood for the names of its mutants when they were tried
    reasons: dict[str, str]  # survivor -> why it may survive; empty where nobody has said it yet


def read(text: str) -> Page:
    """Reads the page."""
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    tried = {row[0]: row[-1] for row in rows if len(row) == 6 and re.fullmatch("[0-9a-f]{12}", row[-1])}
    return Page(tried, {row[0]: row[1] for row in rows if len(row) == 2 and row[0] != "mutant" and set(row[0]) != {"-"}})


def known(mutants: Sequence[Mutant], page: Page) -> dict[str, str]:
    """What is known of mutants without trying them: by the page, where a source has the mutants that it was tried with."""
    results: dict[str, str] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    vouched = {source for source, own in _by_source(mutants).items() if page.tried.get(source) == _stamp(own)}
    by_page = {m.name: SURVIVED if m.name in page.reasons else KILLED for m in mutants if m.file in vouched}
    names = {m.name for m in mutants}
    return by_page | {name: outcome for name, outcome in results.items() if name in names}


def render(mutants: Sequence[Mutant], survivors: Mapping[str, str]) -> str:
    """The page of a run that tried all mutants, of which these survived, each for its reason."""
    rows, killed = [], 0
    for source, own in _by_source(mutants).items():
        alive = sum(m.name in survivors for m in own)
        killed += len(own) - alive
        rules = ", ".join(f"{sum(m.rule == rule for m in own)} {rule}" for rule in dict.fromkeys(m.rule for m in own))
        rows.append(f"| {source} | {len(own)} | {len(own) - alive} | {alive} | {rules} | {_stamp(own)} |")
    listed = [f"| {_escaped(m.name)} | {_escaped(survivors[m.name])} |" for m in mutants if m.name in survivors]
    return "\n".join(
        [
            *(_INTRODUCTION.splitlines()),
            "",
            "```",
            *(RULES or "").strip().splitlines(),
            "```",
            "",
            "| source | mutants | killed | survived | of which rule | names |",
            "|---|---|---|---|---|---|",
            *rows,
            f"| all | {len(mutants)} | {killed} | {len(mutants) - killed} | | |",
            "",
            "## Survivors, and why each computes the same or cannot be told apart",
            "",
            "| mutant | reason |",
            "|---|---|",
            *listed,
            "",
        ]
    )


def _by_source(mutants: Sequence[Mutant]) -> dict[str, list[Mutant]]:
    return {source: [m for m in mutants if m.file == source] for source in dict.fromkeys(m.file for m in mutants)}


def _stamp(mutants: Sequence[Mutant]) -> str:
    """Stands for the names of these mutants."""
    return hashlib.sha256("\0".join(m.name for m in mutants).encode()).hexdigest()[:12]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
