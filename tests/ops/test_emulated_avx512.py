"""What `make test-avx512` runs in the place of AVX-512 gives the same bits as AVX-512."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent / "avx512"
CSRC = Path(__file__).parents[2] / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-w", "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="this CPU has no AVX-512 to compare its emulation with")
def test_every_intrinsic_as_the_processor_does_it(tmp_path: Path) -> None:
    subprocess.run([CXX, *FLAGS, str(HERE / "compare.cpp"), "-o", str(tmp_path / "compare")], check=True)
    result = subprocess.run([str(tmp_path / "compare")], stdout=subprocess.PIPE, text=True)
    assert result.stdout == ""
    assert result.returncode == 0


def test_every_intrinsic_of_the_kernels_is_emulated_and_compared() -> None:
    text = "".join(path.read_text() for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp"))
    used = set(re.findall(r"\b(_mm512_\w+|_mm_\w+_mask)\(", text)) - {"_mm512_permutexvar_epi16"}  # beside AVX512_BF16 only
    emulated = set(re.findall(r"^#define (_mm\w+)", (HERE / "instead.h").read_text(), re.MULTILINE))
    assert emulated == used
    compared = (HERE / "compare.cpp").read_text()
    assert [name for name in sorted(emulated) if name.split("_", 2)[2] not in compared] == []
