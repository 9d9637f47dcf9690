"""Set before anything imports torch or transformers."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is built on the spot
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns in every forked or spawned child
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: a second thread mostly waits for the first

# Their files share what is costly: real vLLM, the import of TRL, and processes that run two at a time; what both of the latter build lies
# in build/.
TOGETHER = {"tests/engines/": "engines", "tests/integrations/": "integrations", "tests/gpu/": "gpu", "tools/gpu_proof/": "gpu"}


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several workers run the suite, one of them runs all tests of a file, and all those of a scope above."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return next((scope for folder, scope in TOGETHER.items() if path.startswith(folder)), path)

    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where operators were tested, the forms and instruction sets that no test could run."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ())]
    if any(report.nodeid.startswith("tests/ops") for report in reports):
        from conformance import left_out

        terminalreporter.section("what the tests of the operators leave out", sep="-")
        terminalreporter.line("\n".join(left_out()))
