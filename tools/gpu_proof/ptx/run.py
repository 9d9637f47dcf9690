"""Runs an entry of PTX over its grid."""

from __future__ import annotations

import numpy as np

from gpu_proof.ptx.instructions import compiled
from gpu_proof.ptx.machine import Machine
from gpu_proof.ptx.memory import Memory
from gpu_proof.ptx.program import Program

_LARGEST_BATCH = 16384  # threads at a time


def run(program: Program, grid: tuple[int, int, int], threads: int, arguments: bytes, memory: Memory, *, backwards: bool = False) -> int:
    """Runs every block; returns the number of instructions issued. `backwards` takes the blocks in the opposite order.

    Args:
        program: the entry.
        grid: blocks in x, y and z.
        threads: of a block, in x.
        arguments: the parameter block, pointers already translated.
        memory: what the kernel may touch.
        backwards: no result may depend on the order of blocks.

    Raises:
        PtxError: for an access, a barrier or an instruction that is wrong, with the instruction's text.
    """
    blocks = np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, grid[::-1]), indexing="ij")][::-1], axis=1)
    blocks = blocks[::-1] if backwards else blocks
    # Groups of copies, and tensor memory, are kept for one block.
    pipelined = any(i.opcode[:2] == ("cp", "async") or i.opcode[0] == "tcgen05" for i in program.instructions)
    at_once = 1 if pipelined else max(1, _LARGEST_BATCH // threads)
    return sum(
        Machine(compiled, program, blocks[i : i + at_once], i, grid, threads, arguments, memory).run()
        for i in range(0, len(blocks), at_once)
    )
