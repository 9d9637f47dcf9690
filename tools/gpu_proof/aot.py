"""Triton kernels compiled ahead of time: no driver and no device is needed, only what the triton package brings."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from gpu_proof import HERE
from gpu_proof.launches import STORE, Launch, digest
from gpu_proof.machine_code import Facts, of_amd, of_cubin
from gpu_proof.targets import TARGETS

__all__ = ["compile_all", "compiled"]

PROCESSES = 2


def compiled(launch: Launch, target_name: str) -> Any:
    """Triton's CompiledKernel of one entry of the catalogue."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # what 3.9 does unasked; 3.10 does not
    os.environ["TRITON_CACHE_DIR"] = str(STORE / "triton")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # the text is then the same wherever the sources lie
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[target_name]
    assert launch.backend == target.backend
    source = ASTSource(
        fn=getattr(import_module(launch.module), launch.kernel),
        signature=dict(launch.signature),
        constexprs=dict(launch.constexprs),
        attrs={path: [list(pair) for pair in found] for path, found in launch.attributes},
    )
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=dict(launch.options))


def _facts(launch: Launch, target_name: str) -> Facts | str:
    """What the machine code holds, or why there is none."""
    try:
        kernel = compiled(launch, target_name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    # The version of what reads the machine code is part of the name; that of what wrote it is in Triton's own hash.
    file = STORE / f"facts/{kernel.hash}-{digest(HERE / 'machine_code.py')}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(asdict(_read(kernel, target_name))))
        new.replace(file)
    return Facts(**json.loads(file.read_text()))


def _read(kernel: Any, target_name: str) -> Facts:
    metadata = kernel.metadata
    if TARGETS[target_name].backend == "hip":
        return of_amd(kernel.asm["amdgcn"], metadata.num_warps)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        arch = TARGETS[target_name].arch
        assert isinstance(arch, int)
        return of_cubin(Path(file.name), arch, {metadata.name: metadata.num_warps}, {metadata.name: metadata.shared})[metadata.name]


def _job(job: tuple[Launch, str]) -> Facts | str:
    return _facts(*job)


def compile_all(jobs: Iterable[tuple[Launch, str]]) -> Iterator[tuple[tuple[Launch, str], Facts | str]]:
    """Every job with its facts, or with the reason why it does not compile; two at a time."""
    wanted = list(jobs)
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(_job, wanted, chunksize=4), strict=True)
