"""Stub of the native CUDA module. Tensors are passed as addresses (Tensor.data_ptr()); 0 stands for "not given"."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    architectures: list[str]
    emulated: bool

def build_info() -> BuildInfo: ...

# Why kernels cannot run on a device of this index (no driver, an architecture that was not built for), None when they can.
def unusable_device(index: int) -> str | None: ...
