"""The description of the machine and of the software that are measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from reinforce_ada import machine
from reinforce_ada.ops import _native

_PACKAGES = ("reinforce-ada", "torch", "numpy", "triton", "liger-kernel", "cut-cross-entropy", "flash-attn")


def about(device: str) -> dict[str, Any]:
    """Return device, threads, processor, instruction set in use, cores, load, memory, huge pages, versions and commit."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "cpu": machine.cpu_name(),
        "isa": _native.missing() or str(_native.cpu.build_info()["selected_isa"]),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # that of the last minute, before anything is measured
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def _huge_pages() -> str:
    """Return when the system provides 2 MiB pages: "always", "madvise" or "never". Fresh gradients cost mostly page faults."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().partition("[")[2].partition("]")[0] if setting.is_file() else "unknown"


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit of the checkout that holds this file, with "-dirty" for uncommitted changes; "" for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        top = _git(here, "rev-parse", "--show-toplevel")
        if top and Path(top, "python", "reinforce_ada", "bench").resolve() == here:
            return _git(here, "describe", "--always", "--dirty", "--exclude=*")
    except OSError:  # no git
        pass
    return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
