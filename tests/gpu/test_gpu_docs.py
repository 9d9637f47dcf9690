"""docs/gpu.md and benchmarks/gpu_static.json belong to the sources, name every kernel, and hide nothing."""

from __future__ import annotations

import pytest

from gpu_proof import ROOT, static_docs
from gpu_proof.catalogue import CUDA_KERNELS, TRITON_KERNELS


@pytest.fixture(scope="module")
def facts() -> dict:
    return static_docs.load()


def test_the_facts_belong_to_the_sources(facts):
    assert facts["sources"] == static_docs.sources(), "kernels, or what checks them, have changed: make gpu-docs"


def test_there_is_a_line_for_every_kernel_dtype_and_target(facts):
    lines = [tuple(line[key] for key in ("form", "op", "kernel", "dtype", "target")) for line in facts["kernels"]]
    assert len(lines) == len(set(lines))
    assert set(lines) == static_docs.expected()


def test_every_check_holds(facts):
    failing = {f"{line['form']} {line['kernel']} {line['dtype']} {line['target']}": line["failed"] for line in facts["kernels"]}
    assert {name: failed for name, failed in failing.items() if failed} == {}


def test_the_page_is_the_generated_one(facts):
    page = (ROOT / "docs/gpu.md").read_text()
    assert static_docs.render(page, facts) == page
    for kernels in (*TRITON_KERNELS.values(), *CUDA_KERNELS.values()):
        for name in kernels:
            assert f"| `{name}` |" in page
