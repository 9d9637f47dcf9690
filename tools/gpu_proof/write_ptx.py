"""Writes the PTX of every kernel, and a manifest of how to launch it, to build/ptx; `make gpu-ptx` calls it.

For whoever wants to run the kernels elsewhere than from Python: in a simulator, from another language. manifest.json is a list; each entry
has the file, the entry point, its parameters in order (type, name, and in `recorded` what one launch gave), the grid in words, threads of
a block, and the bytes of dynamic shared memory that a launch has to ask for. What parameters mean is in `documentation`.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from inspect import getdoc
from pathlib import Path
from typing import Any

from gpu_proof import ROOT, nvcc
from gpu_proof.aot import compiled
from gpu_proof.catalogue import Variant, cuda_kernel, due, entries

TARGETS = ("sm_80", "sm_90", "sm_100")
FOLDER = ROOT / "build/ptx"


def main(targets: list[str]) -> None:
    """Writes everything for these targets."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    manifest = [triton_entry(v) for v in entries() if v.target in targets]
    for target in targets:
        manifest += [entry for source in nvcc.SOURCES for entry in cuda_entries(source, target)]
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=1))
    print(f"{len(manifest)} kernels in {FOLDER.relative_to(ROOT)}")


def triton_entry(variant: Variant) -> dict[str, Any]:
    """Compiles and writes one Triton kernel."""
    launch = variant.launch
    kernel = compiled(launch, variant.target)
    file = FOLDER / f"triton-{variant.op}-{launch.kernel}-{variant.target}-{kernel.hash[:12]}.ptx"
    file.write_text(kernel.asm["ptx"])
    module = import_module(launch.module)
    given = {argument.name: argument for argument in launch.arguments}
    parameters = [{"type": kind, "name": name, "recorded": given[name].value} for name, kind in launch.kinds.items() if kind != "constexpr"]
    # Triton 3.9 ends every kernel with two pointers of its own, which are null where metadata asks for no memory behind them.
    parameters += [{"type": "*i8", "name": name, "recorded": None} for name in ("global_scratch", "profile_scratch")]
    return {
        "form": "triton",
        "operator": variant.op,
        "kernel": launch.kernel,
        "dtype": due(variant)[0],
        "target": variant.target,
        "file": file.name,
        "entry": kernel.metadata.name,
        "parameters": parameters,
        "constants": {
            name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in launch.constants.items()
        },
        "divisible_by_16": [name for name in launch.kinds if name in launch.divisible],
        "grid_recorded": list(launch.grid),
        "threads": 32 * kernel.metadata.num_warps,
        "shared_bytes": kernel.metadata.shared,
        "scratch_bytes": kernel.metadata.global_scratch_size,
        "documentation": [getdoc(module) or "", getdoc(getattr(module, launch.kernel).fn) or ""],
    }


def cuda_entries(source: Path, target: str) -> list[dict[str, Any]]:
    """Compiles and writes one CUDA source, a file with all its entry points."""
    unit = nvcc.compile_unit(source, target)
    assert not unit.failed, unit.messages
    file = FOLDER / f"cuda-{source.parent.name}-{target}.ptx"
    file.write_text(unit.ptx)
    header = source.with_suffix(".h").read_text()
    found = []
    for entry in unit.entries:
        kernel, dtype = cuda_kernel(source.parent.name, entry.name)
        found.append(
            {
                "form": "cuda",
                "operator": source.parent.name,
                "kernel": kernel,
                "dtype": dtype,
                "target": target,
                "file": file.name,
                "entry": entry.name,
                "parameters": [{"type": kind, "name": name, "ptx": ptx, "bytes": size} for kind, name, ptx, size in entry.parameters],
                "constants": {},
                "threads": entry.threads,
                "shared_bytes": 0,  # all of it is static
                "documentation": [re.sub(r"^// ?", "", header.partition("#pragma once")[0], flags=re.M)],
            }
        )
    return found


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
