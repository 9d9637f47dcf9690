"""A pytest plugin for `make test-sanitize` and `make test-avx512`: puts another native module in the place of the normal one, and says so.

    NATIVE_BUILD=sanitize|avx512 python -m pytest -p other_build tests/ops

with build/$NATIVE_BUILD built and this folder on PYTHONPATH; a sanitized module needs the sanitizer's library preloaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  brings its libgomp first, as in ops._native

ROOT = Path(__file__).parents[2]
BUILD = os.environ["NATIVE_BUILD"]
SAYS = {"sanitize": "sanitized", "avx512": "emulated_avx512"}[BUILD]


sys.path.append(str(ROOT / "tools"))  # a plugin is imported before pytest sets its pythonpath
from gpu_proof.native_module import load_as  # noqa: E402

PATH = next((ROOT / "build" / BUILD).glob("_cpu.*.so"))
load_as("reinforce_ada._cpu", PATH)


def pytest_sessionstart() -> None:
    from reinforce_ada.ops._native import cpu

    assert cpu.__file__ == str(PATH), f"the operators took {cpu.__file__}"
    assert cpu.build_info()[SAYS], f"{PATH} is not {SAYS}"  # type: ignore[literal-required]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from reinforce_ada.ops._native import cpu

    info = cpu.build_info()
    says = f"{SAYS}: {info[SAYS]}"  # type: ignore[literal-required]
    terminalreporter.write_line(f"{says} ({cpu.__file__}; {info['compiler']}; {', '.join(info['usable_isas'])})")
