"""CUDA sources compiled by nvcc with warnings and spills as errors; nvcc is found where CMake finds it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from gpu_proof import HERE, ROOT
from gpu_proof.launches import STORE, digest
from gpu_proof.machine_code import Facts, of_cubin
from gpu_proof.targets import TARGETS

__all__ = ["SOURCES", "Entry", "Unit", "compile_unit", "entry_points", "nvcc", "warm"]

CSRC = ROOT / "csrc"
SOURCES = tuple(sorted(CSRC.glob("ops/*/*_cuda.cu")))
# Everything that there can be a warning about is an error; a spill, local memory or a stack frame is a warning of ptxas.
STRICT = (
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v,-warn-spills,-warn-lmem-usage,-Werror",
    "-Xcompiler",
    "-Wall,-Wextra,-fvisibility=hidden",
)


@cache
def build_flags() -> tuple[str, ...]:
    """Those of the build that the code depends on: what cmake/cuda.cmake says before it names a host compiler."""
    found = re.search(r"set\(RA_NVCC_FLAGS (.*?) -ccbin", (ROOT / "cmake/cuda.cmake").read_text())
    assert found, "cmake/cuda.cmake sets no RA_NVCC_FLAGS ... -ccbin"
    return tuple(found.group(1).split())


@dataclass(frozen=True, slots=True)
class Entry:
    """One __global__ function of a compiled file."""

    name: str
    parameters: tuple[tuple[str, str, str, int], ...]  # in order: type and name in the source, type and bytes in PTX
    threads: int  # of a block, from __launch_bounds__; 0 where it has none
    stack_bytes: int
    spill_bytes: int
    facts: Facts


@dataclass(frozen=True, slots=True)
class Unit:
    """One source file for one target."""

    source: Path
    target: str
    messages: str  # of nvcc, also where it failed
    failed: bool
    ptx: str
    entries: tuple[Entry, ...]


@cache
def nvcc() -> Path | None:
    """The compiler, looked for where cmake/cuda.cmake does: by name, on the system, in the wheels of this environment."""
    spec = find_spec("nvidia")
    wheels = [Path(place) for place in (spec.submodule_search_locations or () if spec else ())]
    found = [
        os.environ.get("CUDACXX"),
        Path(os.environ["CUDA_HOME"]) / "bin/nvcc" if "CUDA_HOME" in os.environ else None,
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
        *(path for wheel in wheels for folder in ("cu*", "cuda_nvcc") for path in sorted(wheel.glob(f"{folder}/bin/nvcc"))),
    ]
    return next((Path(path) for path in found if path and Path(path).is_file()), None)


@cache
def entry_points(source: Path) -> tuple[str, ...]:
    """The __global__ functions of a source file."""
    return tuple(entry.name for entry in compile_unit(source, "sm_90").entries)


def compile_unit(source: Path, target: str) -> Unit:
    """Compiles one file for one target, and reads what came out; from the store where nothing changed."""
    compiler = nvcc()
    assert compiler is not None, "there is no nvcc; `make` installs its wheels into the environment of the tests"
    key = f"{source.stem}-{target}-{digest(CSRC, ROOT / 'cmake/cuda.cmake', HERE / 'nvcc.py', HERE / 'machine_code.py')}"
    record = STORE / f"nvcc/{key}.json"
    if not record.is_file():
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(_compile(compiler, source, target, Path(folder)))
        new = record.with_suffix(f".{os.getpid()}")
        new.write_text(text)
        new.replace(record)
    found = json.loads(record.read_text())
    entries = tuple(
        Entry(**{**entry, "parameters": tuple(map(tuple, entry["parameters"])), "facts": Facts(**entry["facts"])})
        for entry in found.pop("entries")
    )
    return Unit(source=source, target=target, entries=entries, **found)


def warm(jobs: list[tuple[Path, str]]) -> None:
    """Compiles everything, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: compile_unit(*job), jobs))


def _compile(compiler: Path, source: Path, target: str, folder: Path) -> dict[str, object]:
    arch = target.removeprefix("sm_")
    kept = ("--keep", "--keep-dir", str(folder), "-c", "-o", str(folder / "out.o"))
    architecture = ("-gencode", f"arch=compute_{arch},code={target}")
    command: list[str | Path] = [compiler, *build_flags(), *STRICT, *architecture, f"-I{CSRC}", *kept, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    messages = done.stdout + done.stderr
    if done.returncode:
        return {"messages": messages, "failed": True, "ptx": "", "entries": []}
    ptx = next(folder.glob("*.ptx")).read_text()
    cubin = next(folder.glob("*.cubin"))
    written = next(folder.glob("*.cpp1.ii")).read_text()
    signatures = _signatures(ptx)
    warps = {name: max(-(-threads // 32), 1) for name, (threads, _) in signatures.items()}
    facts = of_cubin(cubin, int(TARGETS[target].arch), warps)
    reported = _reported(messages)
    entries = []
    for name, (threads, parameters) in signatures.items():
        stack, spills = reported[name]
        named = [(*one, *of_ptx) for one, of_ptx in zip(_declared(written, name), parameters, strict=True)]
        entry = {"name": name, "parameters": named, "threads": threads, "stack_bytes": stack, "spill_bytes": spills}
        entries.append({**entry, "facts": asdict(facts[name])})
    return {"messages": messages, "failed": False, "ptx": ptx, "entries": entries}


_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{", re.S)
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr)?(?: \.global)?(?: \.align \d+)? \w+?(?:\[(\d+)\])?(?=,|\s*$)", re.M)
_THREADS = re.compile(r"\.(?:maxntid|reqntid) (\d+)")
_BYTES = {"u64": 8, "s64": 8, "b64": 8, "f64": 8, "u32": 4, "s32": 4, "b32": 4, "f32": 4, "u16": 2, "b16": 2, "u8": 1, "b8": 1, "s8": 1}


def _signatures(ptx: str) -> dict[str, tuple[int, list[tuple[str, int]]]]:
    """Threads and parameters of every entry."""
    found = {}
    for name, parameters, directives in _ENTRY.findall(ptx):
        threads = _THREADS.search(directives)
        types = [(kind, _BYTES[kind] * int(count or 1)) for kind, count in _PARAMETER.findall(parameters)]
        found[name] = (int(threads.group(1)) if threads else 0, types)
    return found


def _declared(preprocessed: str, name: str) -> list[tuple[str, str]]:
    """Type and name of each parameter as the source says them."""
    found = re.search(rf"\b{name}\s*\(([^()]*)\)\s*\{{", preprocessed)
    assert found, f"the preprocessed source does not define {name}"
    words = [" ".join(one.replace("std::", "").split()).rpartition(" ")[::2] for one in found.group(1).split(",")]
    return [(kind + "*" * parameter.count("*"), parameter.lstrip("*")) for kind, parameter in words]


_REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


def _reported(messages: str) -> dict[str, tuple[int, int]]:
    """Stack and spills of every entry as ptxas reports them."""
    return {name: (int(stack), int(stores) + int(loads)) for name, stack, stores, loads, _ in _REPORT.findall(messages)}
