"""A pytest plugin for `make test-sanitize`: puts the sanitized native module in the place of the normal one, and says so.

    python -m pytest -p sanitized tests/ops

with build/sanitize built, this folder on PYTHONPATH and the sanitizer's library preloaded.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch  # noqa: F401  brings its libgomp first, as in ops._native

FOLDER = Path(__file__).parents[2] / "build/sanitize"


def _load() -> Path:
    path = next(FOLDER.glob("_cpu.*.so"))
    spec = spec_from_file_location("reinforce_ada._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["reinforce_ada._cpu"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return path


PATH = _load()


def pytest_sessionstart() -> None:
    from reinforce_ada.ops._native import cpu

    assert cpu.__file__ == str(PATH), f"the operators took {cpu.__file__}"
    assert cpu.build_info()["sanitized"], f"{PATH} is not sanitized"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from reinforce_ada.ops._native import cpu

    info = cpu.build_info()
    terminalreporter.write_line(f"sanitized: {info['sanitized']} ({cpu.__file__}; {info['compiler']}; {', '.join(info['usable_isas'])})")
