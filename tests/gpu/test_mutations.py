"""docs/gpu_mutations.md is that of the sources: whoever changes a kernel has tried its mutants, and each survivor has a reason."""

from __future__ import annotations

from gpu_proof.mutation.mutants import all_mutants
from gpu_proof.mutation.report import PAGE, read, render

AGAIN = "run `make test-gpu-mutations`"


def test_mutants_have_names_of_their_own() -> None:
    names = [m.name for m in all_mutants()]
    assert len(set(names)) == len(names)


def test_the_page_is_that_of_the_sources() -> None:
    text = PAGE.read_text()
    gone = set(read(text).reasons) - {m.name for m in all_mutants()}
    assert not gone, f"no longer in the sources: {sorted(gone)}; {AGAIN}"
    assert render(all_mutants(), read(text).reasons) == text, f"kernels have other mutants than those that were tried; {AGAIN}"


def test_every_survivor_has_a_reason() -> None:
    silent = sorted(name for name, reason in read(PAGE.read_text()).reasons.items() if not reason)
    assert not silent, f"no reason: {silent}; make a case that fails, or write the reason in {PAGE.name}"
