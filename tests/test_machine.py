"""Which dtype a machine computes in is asked of it; a run keeps the answer."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from reinforce_ada import config, machine

KINDS = {
    "AVX-512 with bfloat16": ("x86_64", {"flags": "avx2 avx512f avx512_bf16"}, "AVX512", "bfloat16"),
    "AMX": ("x86_64", {"flags": "avx2 avx512f amx_bf16"}, "AVX512", "bfloat16"),
    "AVX-512 without bfloat16": ("x86_64", {"flags": "avx2 avx512f"}, "AVX512", "float32"),
    "AVX2": ("x86_64", {"flags": "avx2 fma"}, "AVX2", "float32"),
    "AVX-512 that torch is told not to use": ("x86_64", {"flags": "avx2 avx512f avx512_bf16"}, "AVX2", "float32"),
    "ARM with bfloat16": ("aarch64", {"Features": "asimd bf16"}, "DEFAULT", "bfloat16"),
    "ARM without": ("aarch64", {"Features": "asimd"}, "DEFAULT", "float32"),
    "no /proc/cpuinfo": ("arm64", {}, "DEFAULT", "float32"),
}


@pytest.mark.parametrize(("platform", "info", "capability", "dtype"), KINDS.values(), ids=KINDS.keys())
def test_native_dtype(monkeypatch, platform, info, capability, dtype):
    monkeypatch.setattr(machine.platform, "machine", lambda: platform)
    monkeypatch.setattr(machine, "_cpu_info", lambda: info)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert machine.native_dtype("cpu") == dtype
    assert machine.cpu_arithmetic() == (f"{capability} with bfloat16" if dtype == "bfloat16" else capability)


def test_the_switch_that_takes_avx512_away_from_torch_takes_bfloat16_away():
    code = "from reinforce_ada import machine; print(machine.native_dtype('cpu'))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    if machine.platform.machine() in ("x86_64", "AMD64"):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["float32"]
    assert machine.native_dtype("cpu") in ("bfloat16", "float32")


@pytest.mark.parametrize(("given", "used"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")])
def test_auto_becomes_the_native_dtype_and_a_dtype_that_is_asked_for_stays(monkeypatch, given, used):
    from reinforce_ada.training import launch

    monkeypatch.setattr(machine, "native_dtype", lambda device: "float32")
    before = config.load(overrides={"dtype": given, "seed": "3"})
    after = launch.with_dtype(before, torch.device("cpu"))
    assert after == dataclasses.replace(before, model=dataclasses.replace(before.model, dtype=used))
