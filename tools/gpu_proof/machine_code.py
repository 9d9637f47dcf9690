"""What machine code holds: registers, memory, spills and instructions, read from cubin files and from AMD's assembler text."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["Facts", "disassemble", "of_amd", "of_cubin", "tool"]


@dataclass(frozen=True, slots=True)
class Facts:
    """One kernel as it was compiled for one target. Bytes, and instructions as they stand in the code (not as often as they run)."""

    registers: int  # 32-bit, of one thread
    scalar_registers: int  # of one wavefront; 0 on NVIDIA, whose uniform registers are not allocated
    shared_bytes: int  # of one block
    local_bytes: int  # of one thread: stack and spilled registers
    spills: int  # registers (AMD) or instructions (NVIDIA) that move something to or from local memory
    warps: int  # of one block
    code_bytes: int
    instructions: int
    loads: dict[str, int] = field(default_factory=dict)  # global to register or to shared memory, by bits of one access
    stores: dict[str, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)  # tensor-core instructions, by name
    fma: int = 0  # fp32 multiply-adds outside the tensor cores
    atomics: int = 0  # on global memory
    barriers: int = 0


@cache
def tool(name: str) -> Path:
    """A program of NVIDIA's that the triton package brings."""
    spec = find_spec("triton")
    origin = spec.origin if spec else None
    assert origin is not None, "triton is not installed; it is part of what the tests need"
    path = Path(origin).parent / "backends/nvidia/bin" / name
    assert path.is_file(), f"{path} is missing: this triton brings no {name}"
    return path


def _run(*command: str | os.PathLike[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed: {done.stderr}{done.stdout}"
    return done.stdout


# -------------------- NVIDIA

_SECTION = re.compile(r"^\.text\.(\S+):$", re.M)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_USAGE = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_NVIDIA_MATRIX = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "OMMA")
_GENERIC = {"LD": "loads", "ST": "stores"}  # an access whose memory the compiler could not tell: it must not occur


def disassemble(cubin: Path) -> dict[str, list[str]]:
    """The instructions of every kernel in a file, with their modifiers and without operands."""
    text = _run(tool("nvdisasm"), "-c", "-ndf", cubin)  # without analysing data flow it takes 0.27 s instead of 0.37
    starts = [(found.group(1), found.end()) for found in _SECTION.finditer(text)]
    ends = [*(start for _, start in starts[1:]), len(text)]
    return {name: _INSTRUCTION.findall(text, start, end) for (name, start), end in zip(starts, ends, strict=True)}


def of_cubin(cubin: Path, arch: int, warps: dict[str, int], dynamic_shared: dict[str, int] | None = None) -> dict[str, Facts]:
    """Every kernel in a file.

    Args:
        cubin: a file for one architecture.
        arch: that architecture: 90 for sm_90.
        warps: of a block, by kernel.
        dynamic_shared: bytes of shared memory that the launch adds, by kernel.
    """
    usage = {name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(_run(tool("cuobjdump"), "-res-usage", cubin))}
    code = disassemble(cubin)
    system = 1024 if arch >= 90 else 0  # what cuobjdump counts for the system; Target.warps adds it for every architecture
    found = {}
    for name, (registers, stack, shared, local) in usage.items():
        opcodes = [opcode for opcode in code[name] if opcode != "NOP"]
        found[name] = Facts(
            registers=registers,
            scalar_registers=0,
            shared_bytes=max(shared - system, 0) + (dynamic_shared or {}).get(name, 0),
            local_bytes=stack + local,
            spills=sum(opcode.split(".")[0] in ("LDL", "STL") for opcode in opcodes),
            warps=warps[name],
            code_bytes=16 * len(code[name]),
            instructions=len(opcodes),
            loads=_widths(opcode for opcode in opcodes if opcode.split(".")[0] in ("LDG", "LDGSTS", "LD", "UTMALDG", "UBLKCP")),
            stores=_widths(opcode for opcode in opcodes if opcode.split(".")[0] in ("STG", "ST", "UTMASTG")),
            matrix=dict(Counter(opcode.split(".")[0] for opcode in opcodes if opcode.startswith(_NVIDIA_MATRIX))),
            fma=sum(opcode.split(".")[0] in ("FFMA", "FFMA2") for opcode in opcodes),
            atomics=sum(opcode.split(".")[0] in ("ATOM", "ATOMG", "RED", "REDG") for opcode in opcodes),
            barriers=sum(opcode.split(".")[0] == "BAR" for opcode in opcodes),
        )
    return found


def _widths(opcodes: Iterable[str]) -> dict[str, int]:
    """How many accesses are how wide: "tma" for a tile at once, "generic" for an access of unknown memory."""
    widths: Counter[str] = Counter()
    for opcode in opcodes:
        base, *modifiers = opcode.split(".")
        if base.startswith(("UTMA", "UBLKCP")):
            widths["tma"] += 1
        elif base in _GENERIC:
            widths["generic"] += 1
        else:
            widths[next((m for m in ("256", "128", "64") if m in modifiers), _narrow(modifiers))] += 1
    return dict(widths)


def _narrow(modifiers: list[str]) -> str:
    return next((bits for name, bits in (("U8", "8"), ("S8", "8"), ("U16", "16"), ("S16", "16")) if name in modifiers), "32")


# -------------------- AMD

_AMD_WIDTH = {"x4": "128", "x3": "96", "x2": "64", "": "32"}
_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer|flat)_(load|store)_(?:dword(x\d)?|(\w+))\b", re.M)


def of_amd(assembly: str, warps: int) -> Facts:
    """The one kernel of an assembler text."""

    def number(key: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{key}:\s+(\d+)", assembly, re.M)
        assert found, f"the assembler text does not say {key}"
        return int(found.group(1))

    size = re.search(r"codeLenInByte = (\d+)", assembly)
    assert size
    accesses = Counter(
        (kind, _AMD_WIDTH[wide or ""] if not narrow else "16" if "short" in narrow or "16" in narrow else "8")
        for kind, wide, narrow in _AMD_ACCESS.findall(assembly)
    )
    opcodes = re.findall(r"^\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)", assembly, re.M)
    return Facts(
        registers=number("vgpr_count"),  # the accumulation registers are in it
        scalar_registers=number("sgpr_count"),
        shared_bytes=number("group_segment_fixed_size"),
        local_bytes=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count") + sum(o.startswith("scratch_") for o in opcodes),
        warps=warps,
        code_bytes=int(size.group(1)),
        instructions=len(opcodes),
        loads={width: count for (kind, width), count in accesses.items() if kind == "load"},
        stores={width: count for (kind, width), count in accesses.items() if kind == "store"},
        matrix=dict(Counter(opcode for opcode in opcodes if opcode.startswith("v_mfma"))),
        fma=sum(o.startswith(("v_fma_f32", "v_fmac_f32", "v_pk_fma_f32", "v_mac_f32")) for o in opcodes),
        atomics=sum("_atomic_" in o for o in opcodes if not o.startswith("ds_")),
        barriers=sum(o.startswith("s_barrier") for o in opcodes),
    )
