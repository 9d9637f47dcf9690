"""The CUDA sources compiled for the CPU: g++ on csrc/ops/*/*_cuda.cu and csrc/bindings_cuda.cpp against cuda_on_cpu.h.

Objects and modules are kept in build/cuda_on_cpu by the hash of what goes into them, so a repeated build costs milliseconds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path

import pybind11

from gpu_proof import ROOT

HERE = Path(__file__).resolve().parent
KEPT = ROOT / "build/cuda_on_cpu"
CXX = os.environ.get("CXX", "g++")

# Tensors are read as words, which strict aliasing forbids and nvcc does not assume. Warnings are nvcc's to give, with all of them errors.
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
PLAIN = ("-O2",)
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WATCHED = ("-fsanitize=thread,alignment",)  # the callbacks are accesses.cpp's, so it is not linked with this option

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def build(name: str, kernels: Sequence[Path], rest: Sequence[Path], folders: Sequence[Path], *, sanitized: bool = False) -> Path:
    """The shared library `name` of `kernels`, which are watched while they run, and `rest`; headers are looked for in `folders`."""
    flags = (*COMMON, *(SANITIZED if sanitized else PLAIN))
    jobs = [((*flags, *(() if sanitized else WATCHED)), source) for source in kernels]
    jobs += [(flags, source) for source in (*rest, *sorted(HERE.glob("*.cpp")))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _object(job[0], job[1], (*folders, HERE)), jobs))
    path = KEPT / _key(*(o.name for o in objects)) / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    return _make(path, [CXX, "-shared", *(SANITIZED if sanitized else ()), *map(str, objects)])


def build_module(csrc: Path = ROOT / "csrc", *, sanitized: bool = False) -> Path:
    """The module reinforce_ada._cuda of the sources in `csrc`."""
    kernels = sorted([*csrc.glob("common/*.cu"), *csrc.glob("ops/*/*_cuda.cu")])
    assert kernels, f"no CUDA sources in {csrc}"
    return build("_cuda", kernels, [csrc / "bindings_cuda.cpp"], [csrc], sanitized=sanitized)


def _object(flags: Sequence[str], source: Path, folders: Sequence[Path]) -> Path:
    key = _key(_compiler(), *flags, source.name, *(path.read_text() for path in _with_includes(source, folders)))
    system = (sysconfig.get_path("include"), pybind11.get_include())
    search = [*(f"-I{folder}" for folder in folders), *(f"-isystem{folder}" for folder in system)]
    return _make(KEPT / f"{source.stem}-{key}.o", [CXX, *flags, *search, "-x", "c++", "-c", str(source)])


def _make(path: Path, command: Sequence[str]) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{path.name}.{os.getpid()}")  # whole or absent, also when two build at once
        done = subprocess.run([*command, "-o", str(written)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{command[-1]} does not build for the CPU:\n{done.stderr[:4000]}")
        written.replace(path)
    return path


def _with_includes(source: Path, folders: Sequence[Path]) -> list[Path]:
    """The source and every file of ours that it includes, directly or not, each once."""
    found = [source]
    for path in found:  # grows while it is read
        for name in _INCLUDE.findall(path.read_text()):
            found += [p for p in _first_existing(name, folders) if p not in found]
    return found


def _first_existing(name: str, folders: Iterable[Path]) -> list[Path]:
    return [folder / name for folder in folders if (folder / name).exists()][:1]


def _key(*parts: str) -> str:
    return sha256("\0".join(parts).encode()).hexdigest()[:20]


@cache
def _compiler() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
