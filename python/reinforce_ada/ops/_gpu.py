"""Whether GPU forms can run here, and on which tensors, or the reason why they cannot.

There are two ways to run them without a GPU, both for tests: Triton's interpreter (TRITON_INTERPRET=1) takes tensors on the CPU, and so
does a module `reinforce_ada._cuda` that was compiled for the CPU (`build_info()["emulated"]`).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforce_ada.ops._torch import run_when_traced

if TYPE_CHECKING:
    from reinforce_ada import _cuda as cuda

_OLDEST_TRITON = (3, 3)  # 3.3.1, 3.4.0 and 3.5.1 ran in the interpreter, 3.2.0 did not

__all__ = ["cuda", "cuda_devices", "cuda_missing", "guard", "stream", "triton_devices", "triton_missing"]


def _load_cuda() -> tuple[Any, str | None]:
    if find_spec("reinforce_ada._cuda") is None:
        return None, "not built (REINFORCE_ADA_CUDA=ON pip install . builds it)"
    try:
        return import_module("reinforce_ada._cuda"), None
    except ImportError as error:
        return None, f"reinforce_ada._cuda does not import: {error}"


if not TYPE_CHECKING:
    cuda, _cuda_reason = _load_cuda()
else:
    _cuda_reason: str | None = None


def cuda_devices() -> tuple[str, ...]:
    """Return the device types whose tensors the CUDA forms take."""
    return ("cpu",) if cuda is not None and cuda.build_info()["emulated"] else ("cuda",)


@run_when_traced
def cuda_missing() -> str | None:
    """Return why the CUDA forms cannot run; None if they can."""
    return _cuda_missing()


@cache
def _cuda_missing() -> str | None:
    if _cuda_reason is not None or cuda_devices() == ("cpu",):
        return _cuda_reason
    if torch.version.hip is not None:
        return "they are for NVIDIA devices, torch is built for ROCm"
    return _no_device() or cuda.unusable_device(torch.cuda.current_device())


def triton_devices() -> tuple[str, ...]:
    """Return the device types whose tensors the Triton forms take."""
    return ("cpu",) if _interpreted() else ("cuda",)


@run_when_traced
def triton_missing() -> str | None:
    """Return why the Triton forms cannot run; None if they can."""
    return _triton_missing()


@cache
def _triton_missing() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreted() and (reason := _no_device()):
        return reason
    try:
        version = str(import_module("triton").__version__)
    except ImportError as error:
        return f"triton does not import: {error}"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton {version} is too old: the kernels need 3.3, which takes records as arguments"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_device() -> str | None:
    return None if torch.cuda.is_available() else "torch finds no GPU"


def stream(tensor: Tensor) -> int:
    """Return the address of torch's current stream on the tensor's device; 0 on the CPU."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which the tensor's device is the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
