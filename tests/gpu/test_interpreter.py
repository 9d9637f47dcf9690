"""The Triton forms without a GPU. The interpreter must be chosen before Triton is imported, so it runs in a process of its own."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from apart import HERE, assert_files_took_part, run


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.process(run, [str(HERE / "interpreted.py")], {"TRITON_INTERPRET": "1"})
def test_every_case_passes_in_the_interpreter(result: list[str]) -> None:
    assert_files_took_part(result, [file.stem for file in HERE.glob("cases_*.py")])
