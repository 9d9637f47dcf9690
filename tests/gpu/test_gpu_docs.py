"""docs/gpu.md and benchmarks/gpu_static.json belong to the sources, name every kernel, and hide nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from catalogue import CUDA_KERNELS, TRITON_KERNELS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def write_gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_gpu", ROOT / "benchmarks/write_gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["write_gpu"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def facts(write_gpu: ModuleType) -> dict:
    return write_gpu.load()


def test_the_facts_belong_to_the_sources(write_gpu, facts):
    assert facts["sources"] == write_gpu.sources(), "kernels, or what checks them, have changed: make gpu-docs"


def test_there_is_a_line_for_every_kernel_dtype_and_target(write_gpu, facts):
    lines = [tuple(line[key] for key in ("form", "op", "kernel", "dtype", "target")) for line in facts["kernels"]]
    assert len(lines) == len(set(lines))
    assert set(lines) == write_gpu.expected()


def test_every_check_holds(facts):
    failing = {f"{line['form']} {line['kernel']} {line['dtype']} {line['target']}": line["failed"] for line in facts["kernels"]}
    assert {name: failed for name, failed in failing.items() if failed} == {}


def test_the_page_is_the_generated_one(write_gpu, facts):
    page = (ROOT / "docs/gpu.md").read_text()
    assert write_gpu.render(page, facts) == page
    for kernels in (*TRITON_KERNELS.values(), *CUDA_KERNELS.values()):
        for name in kernels:
            assert f"| `{name}` |" in page


def test_comments_make_no_facts_stale(write_gpu):
    """The hash is of the code alone."""
    import ast

    one, other = '"""Doc."""\nx = 1  # why\n', "x = (\n    1\n)\n"
    assert write_gpu._meaning(ast.parse(one)) == write_gpu._meaning(ast.parse(other))
    assert write_gpu._meaning(ast.parse(one)) != write_gpu._meaning(ast.parse("x = 2\n"))
