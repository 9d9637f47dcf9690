"""The table of mutants is that of the sources, and who survived has an argument; the rules find what they name."""

from __future__ import annotations

import json

from gpu_proof.mutation.mutants import all_mutants, cuda_changes, triton_changes
from gpu_proof.mutation.report import ARGUMENTS, DOCS, RESULTS, render

AGAIN = "run `make test-gpu-mutations`"


def test_the_table_is_that_of_the_sources() -> None:
    names = [m.name for m in all_mutants()]
    assert len(set(names)) == len(names)
    results = json.loads(RESULTS.read_text())
    assert not (new := set(names) - set(results)), f"not tried: {sorted(new)}; {AGAIN}"
    assert not (gone := set(results) - set(names)), f"no longer in the sources: {sorted(gone)}; {AGAIN}"
    assert DOCS.read_text() == render(all_mutants(), results), f"{DOCS.name} is older than its numbers; {AGAIN}"


def test_every_survivor_has_an_argument() -> None:
    survivors = {name for name, outcome in json.loads(RESULTS.read_text()).items() if outcome == "survived"}
    assert not (silent := survivors - set(ARGUMENTS)), f"no argument: {sorted(silent)}; make a case that fails, or give one"
    assert not (idle := set(ARGUMENTS) - survivors), f"an argument for who did not survive: {sorted(idle)}"


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
