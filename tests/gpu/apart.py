"""Pytest in a process of its own, for what must be set before the operators are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The names of the tests, every one of which must have passed: none skipped, none failed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # A plugin is imported before pytest has read pyproject.toml.
        path = os.pathsep.join([str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider", f"--junitxml={report}"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-10_000:]
        (suite,) = ElementTree.parse(report).getroot()
    assert {name: suite.get(name) for name in ("failures", "errors", "skipped")} == {"failures": "0", "errors": "0", "skipped": "0"}
    return [case.get("name", "") for case in suite]


def assert_files_took_part(names: Sequence[str], files: Sequence[str]) -> None:
    """Each of the files of cases, by its stem."""
    assert files
    for file in files:
        assert any(name.startswith(f"test_case[{file}-") for name in names), file
