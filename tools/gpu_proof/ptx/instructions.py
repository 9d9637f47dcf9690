"""What each PTX instruction computes (PTX ISA 8.8), as numpy operations over the active threads."""

from __future__ import annotations

from gpu_proof.ptx import arithmetic, conversions, tensor_cores, transfers, warps
from gpu_proof.ptx.machine import Machine
from gpu_proof.ptx.program import Instruction, PtxError
from gpu_proof.ptx.steps import Build, Step, nothing

# Order between threads that the machine keeps anyway, and hints.
_WITHOUT_EFFECT = ("membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "createpolicy")

_INSTRUCTIONS: dict[str, Build] = {
    **arithmetic.INSTRUCTIONS,
    **conversions.INSTRUCTIONS,
    **transfers.INSTRUCTIONS,
    **tensor_cores.INSTRUCTIONS,
    **warps.INSTRUCTIONS,
    **dict.fromkeys(_WITHOUT_EFFECT, nothing),
}


def compiled(m: Machine, i: Instruction) -> Step:
    """The instruction as a function of the active threads."""
    build = _INSTRUCTIONS.get(i.opcode[0])
    if build is None:
        raise PtxError(f"{m.program.name}: no {i.opcode[0]} in this machine: {i.text!r}")
    return build(m, i)
