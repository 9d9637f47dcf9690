"""What instructions of every kind are made of: operands, formats of 16 bits, threads that have to act together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_proof.ptx.machine import TYPES, Lanes, Machine
from gpu_proof.ptx.memory import Array
from gpu_proof.ptx.program import Instruction, PtxError

Step = Callable[[Lanes], Any]  # None, or what becomes of the threads
Build = Callable[[Machine, Instruction], Step]
Values = Any  # a number for each active thread, or one for all of them


def elements(operand: str) -> list[str]:
    """Returns the parts of `{a, b}`, or the operand alone."""
    return [part.strip() for part in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]


def kind_of(i: Instruction) -> str:
    """Returns the last part of the opcode that is a type."""
    for part in reversed(i.opcode):
        if part in TYPES or part in ("bf16", "bf16x2", "f16x2", "f32x2"):
            return part
    raise PtxError(f"no type in {i.text!r}")


def float_of_bf16(bits: Array) -> Array:
    """Converts bfloat16, given in bits, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bf16_of_float(x: Array) -> Array:
    """Rounds float32 to the nearest bfloat16, in bits, ties to even; NaN becomes the canonical 0x7FFF."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def flushed(i: Instruction, x: Array) -> Array:
    """Replaces subnormal float32 by 0 of their sign where the instruction says .ftz."""
    if "ftz" not in i.opcode or np.asarray(x).dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def whole_warps(m: Machine, a: Lanes) -> Array:
    """Returns the active lanes, which must be all of their warps."""
    lanes = np.arange(m.lanes)[a]
    if len(lanes) % 32 or (lanes.reshape(-1, 32)[:, 0] + 31 != lanes.reshape(-1, 32)[:, 31]).any():
        raise PtxError("not all lanes of the warp are here")
    return lanes


def together(m: Machine, mask: Callable[[Lanes], Any], act: Callable[[Array], None]) -> Step:
    """Acts on the warps of which all lanes in the mask (that have not left) are here; the others wait for theirs."""

    def step(a: Lanes) -> Any:
        lanes = np.arange(m.lanes)[a]
        masks = np.broadcast_to(np.asarray(mask(a)), lanes.shape)
        here = np.zeros(m.lanes, np.bool_)
        here[lanes] = True
        named = np.zeros(m.lanes // 32, np.uint32)
        named[lanes // 32] = masks
        if (named[lanes // 32] != masks).any():
            raise PtxError("lanes of one warp give different masks")
        if not ((masks >> m.laneid[lanes]) & np.uint32(1)).all():
            raise PtxError("a lane is not in its own mask")
        wanted = ((named[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)).astype(bool) & m.alive.reshape(-1, 32)
        whole: Array = np.asarray(~(wanted & ~here.reshape(-1, 32)).any(1))
        ready = whole[lanes // 32]
        if ready.all():
            act(lanes)
            return None

        def outcome(machine: Machine, pc: int, all_lanes: Array, stuck: dict[int, Array]) -> list[tuple[int, Array]]:
            if ready.any():
                act(lanes[ready])
            stuck[pc] = lanes[~ready]
            return [(pc + 1, lanes[ready])] if ready.any() else []

        return outcome

    return step


def nothing(m: Machine, i: Instruction) -> Step:
    """Builds an instruction without effect."""
    return lambda a: None
