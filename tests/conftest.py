"""Set before anything imports torch or transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is built on the spot
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns in every forked or spawned child
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: a second thread mostly waits for the first

TESTS = Path(__file__).parent
TOGETHER = ("engines", "gpu")  # folders whose files share costly fixtures: real vLLM, and processes that run two at a time


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several workers run the suite, the tests of a file stay together, and those of the folders above."""
    for item in items:
        top, *below = item.path.relative_to(TESTS).parts if item.path.is_relative_to(TESTS) else ("elsewhere",)
        item.add_marker(pytest.mark.xdist_group(top if top in TOGETHER else "/".join((top, *below))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where operators were tested, the forms and instruction sets that no test could run."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    if any(report.nodeid.startswith("tests/ops") for report in reports):
        from conformance import left_out

        terminalreporter.section("what the tests of the operators leave out", sep="-")
        terminalreporter.line("\n".join(left_out()))
