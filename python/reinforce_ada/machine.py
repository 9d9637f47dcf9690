"""The processor of this machine, and the dtype in which it computes natively: asked of the processor and of torch, never assumed."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one is ARM's


@cache
def _cpu_info() -> dict[str, str]:
    """Return the first processor's entries of /proc/cpuinfo, empty if there is none."""
    found: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found


def cpu_name() -> str:
    """Return the processor's name, with family and model number: cloud machines often hide the rest of the name."""
    info = _cpu_info()
    if "model name" not in info:
        return platform.processor() or "unknown"
    return f"{info['model name']} (family {info.get('cpu family')}, model {info.get('model')})"


def cpu_arithmetic() -> str:
    """Return the widest vectors that torch uses here and whether the processor multiplies bfloat16: "AVX512 with bfloat16" or "AVX2"."""
    import torch

    widest = torch.backends.cpu.get_cpu_capability()
    return f"{widest} with bfloat16" if _cpu_has_bfloat16() else widest


def _cpu_has_bfloat16() -> bool:
    """Return whether it multiplies bfloat16. ATEN_CPU_CAPABILITY=avx2 makes a processor with AVX-512 count as one without."""
    import torch

    flags = {flag for key in ("flags", "Features") for flag in _cpu_info().get(key, "").split()}
    x86 = platform.machine() in ("x86_64", "AMD64")
    return bool(flags & _BFLOAT16_FLAGS) and (not x86 or torch.backends.cpu.get_cpu_capability() == "AVX512")


def device_of(name: str) -> str:
    """Return "cpu" or "cuda" for one of these or for "auto", which is cuda if torch has such a device."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def native_dtype(device: str) -> Literal["bfloat16", "float32"]:
    """Return "bfloat16" if `device` ("cpu" or "cuda") multiplies it in hardware, otherwise "float32".

    Without such hardware, torch and vLLM convert every operand: on a CPU with AVX2 only, bfloat16 is 20 to 40 times slower than float32.
    """
    import torch

    native = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else _cpu_has_bfloat16()
    return "bfloat16" if native else "float32"
