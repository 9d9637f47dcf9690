"""The rules find what they name, the page tells what was tried, and a run has the mutant's sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpu_proof import HERE
from gpu_proof.mutation import report
from gpu_proof.mutation.mutants import Mutant, all_mutants, cuda_changes, triton_changes
from gpu_proof.mutation.report import KILLED, SURVIVED, known, read, render
from gpu_proof.mutation.run import plant


def test_rules_for_cuda() -> None:
    source = """
RA_DEVICE float f(const float* p, int n, bool masked) {  // if (no) comment counts
    if constexpr (kSize > 1) __syncthreads();
    if (!p) return 0;
    for (int i = 0; i < n; i += kStep) {
        if (masked && i < 3 * (n - 1)) continue;
        sum += i + 1 < n ? p[i + 1] : at_least(least, p[i]);
    }
    for (int k = 0; k < kSize; ++k) row[k] = static_cast<float>(masked ? 1 : 2);
    __syncwarp();
    return sum;
}
"""
    changes = {(c.rule, source[c.begin : c.end], c.new) for c in cuda_changes(source)}
    assert changes == {
        ("barrier", "__syncthreads();", ";"),
        ("barrier", "__syncwarp();", ";"),
        ("guard", "!p", "false"),
        ("guard", "masked && i < 3 * (n - 1)", "false"),
        ("part", "masked", "true"),
        ("part", "i < 3 * (n - 1)", "true"),
        ("bound", "<", "<="),
        ("choice", "i + 1 < n", "true"),
        ("choice", "i + 1 < n", "false"),
        ("clamp", "at_least(least, p[i])", "(p[i])"),
    }
    assert {c.function for c in cuda_changes(source)} == {"f"}


def test_rules_for_triton() -> None:
    source = """
@triton.jit
def f(p, n, size, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    if HAS_CAP and BLOCK > 4:
        x = tl.load(p + n, mask=(n < size) & (n >= 0), other=0.0)
    if size > 0:
        tl.store(p, tl.where(x > 0, x, 0.0), mask=n < size)
    return tl.minimum(n, size)


def g(x):
    return tl.where(x > 0, x, 0.0)
"""
    changes = {(c.rule, source[c.begin : c.end], c.new) for c in triton_changes(source)}
    load, store = "tl.load(p + n, mask=(n < size) & (n >= 0), other=0.0)", "tl.store(p, tl.where(x > 0, x, 0.0), mask=n < size)"
    assert changes == {
        ("mask", load, "tl.load(p + n)"),
        ("mask", store, "tl.store(p, tl.where(x > 0, x, 0.0))"),
        ("other", "0.0", 'float("nan")'),
        ("part", "(n < size) & (n >= 0)", "n < size"),
        ("part", "(n < size) & (n >= 0)", "n >= 0"),
        ("guard", "size > 0", "True"),
        ("guard", "size > 0", "False"),
        ("where", "tl.where(x > 0, x, 0.0)", "x"),
        ("limit", "tl.minimum(n, size)", "n"),
        ("limit", "tl.minimum(n, size)", "size"),
    }


def mutant(file: str, old: str) -> Mutant:
    return Mutant(file, "f", "part", 0, len(old), old, "true", 1)


MUTANTS = [mutant("csrc/ops/a/a_cuda.cuh", "x || y"), mutant("csrc/ops/a/a_cuda.cuh", "z"), mutant("python/b.py", "n < 3")]


def test_the_page_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    reasons = {MUTANTS[0].name: "x | y is the same."}
    page = read(render(MUTANTS, reasons))
    assert page.reasons == reasons
    assert known(MUTANTS, page) == {MUTANTS[0].name: SURVIVED, MUTANTS[1].name: KILLED, MUTANTS[2].name: KILLED}


def test_a_source_with_another_mutant_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    page = read(render(MUTANTS, {}))
    assert set(known([*MUTANTS, mutant("python/b.py", "n > 3")], page)) == {MUTANTS[0].name, MUTANTS[1].name}
    report.RESULTS.write_text(f'{{"{MUTANTS[2].name}": "died", "gone": "died"}}')
    assert known([*MUTANTS, mutant("python/b.py", "n > 3")], page)[MUTANTS[2].name] == "died"


IMPORTS = """
import sys
from pathlib import Path
from gpu_proof.mutation.run import FromTree
tree = Path(sys.argv[1])
sys.meta_path.insert(0, FromTree(tree))
from reinforce_ada.ops.token_logprobs import triton
from reinforce_ada import _cpu
assert Path(triton.__file__).is_relative_to(tree), triton.__file__
"""


def test_a_run_imports_the_operators_of_its_tree(tmp_path: Path) -> None:
    """Also where the package is installed in editable mode, with a finder of its own."""
    changed = next(m for m in all_mutants() if m.file.endswith("token_logprobs/triton.py"))
    plant(tmp_path, changed)
    assert changed.new in (tmp_path / changed.file).read_text()
    done = subprocess.run([sys.executable, "-c", IMPORTS, tmp_path], cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
