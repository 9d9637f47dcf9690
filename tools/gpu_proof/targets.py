"""The GPUs that kernels are compiled for, and how many warps of a kernel fit on one of their multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NVCC_TARGETS", "TARGETS", "TRITON_TARGETS", "Target"]


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture; "warp" and "multiprocessor" are AMD's wavefront and compute unit.

    Sources: CUDA C++ Programming Guide, table "Technical specifications per compute capability"; AMD CDNA 3 ISA guide, section 3.
    """

    name: str
    device: str
    backend: str  # as Triton names it
    arch: int | str
    warp_size: int
    max_warps: int  # resident on a multiprocessor
    max_blocks: int
    registers: int  # 32-bit registers of one of the 4 partitions, over all lanes
    max_registers: int  # of one thread
    shared_bytes: int  # of a multiprocessor
    block_shared_bytes: int  # the most that one block may have
    reserved_shared_bytes: int  # taken by the system from every block

    def warps(self, block_warps: int, registers: int, shared_bytes: int) -> int:
        """How many warps are resident on a multiprocessor: whole blocks, as far as warps, registers and shared memory last."""
        of_one_warp = -(-max(registers, 1) // 8) * 8 * self.warp_size  # allocated in steps of 8 registers a thread
        by_registers = self.registers // of_one_warp * 4 // block_warps
        by_shared = self.shared_bytes // max(shared_bytes + self.reserved_shared_bytes, 1)
        return min(self.max_blocks, self.max_warps // block_warps, by_registers, by_shared) * block_warps


_KB = 1024
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100", "cuda", 80, 32, 64, 32, 16384, 255, 164 * _KB, 163 * _KB, _KB),
        Target("sm_90", "H100, H200", "cuda", 90, 32, 64, 32, 16384, 255, 228 * _KB, 227 * _KB, _KB),
        Target("sm_100", "B200", "cuda", 100, 32, 64, 32, 16384, 255, 228 * _KB, 227 * _KB, _KB),
        Target("sm_120", "RTX 50", "cuda", 120, 32, 48, 24, 16384, 255, 100 * _KB, 99 * _KB, _KB),
        Target("gfx942", "MI300X", "hip", "gfx942", 64, 32, 32, 512 * 64, 512, 64 * _KB, 64 * _KB, 0),
    )
}
TRITON_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NVCC_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
