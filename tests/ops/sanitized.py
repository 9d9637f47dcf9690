"""A pytest plugin for `make test-sanitize`: the sanitized native module in the place of the normal one, and what cannot run with it.

    python -m pytest -p sanitized tests/ops

with build/sanitize built, this folder on PYTHONPATH and the sanitizer's library preloaded.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch  # noqa: F401  its libgomp first, as in ops._native

FOLDER = Path(__file__).parents[2] / "build/sanitize"
CANNOT_RUN: dict[str, str] = {}  # a test's name, without its parameters, and why


def _load() -> Path:
    path = next(FOLDER.glob("_cpu.*.so"))
    spec = spec_from_file_location("reinforce_ada._cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["reinforce_ada._cpu"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.build_info()["sanitized"], f"{path} is not sanitized"
    return path


PATH = _load()


def pytest_report_header() -> str:
    from reinforce_ada.ops._native import cpu

    assert cpu.__file__ == str(PATH), "the operators took another native module"
    return f"sanitized native module: {PATH.relative_to(Path.cwd())}, builds {', '.join(cpu.build_info()['usable_isas'])}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if item.name.partition("[")[0] in CANNOT_RUN]
    items[:] = [item for item in items if item not in out]
    config.hook.pytest_deselected(items=out)
    for name in sorted({item.name.partition("[")[0] for item in out}):
        print(f"deselected {name}: {CANNOT_RUN[name]}")
