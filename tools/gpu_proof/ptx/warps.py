"""What threads tell each other, where they wait, and where they go."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_proof.ptx.machine import TYPES, Machine, leave, wait
from gpu_proof.ptx.memory import Array
from gpu_proof.ptx.program import Instruction, PtxError, target
from gpu_proof.ptx.steps import Build, Step, Values, kind_of, together


def _shfl(m: Machine, i: Instruction) -> Step:
    how = i.opcode[2]
    out, _, flag = i.operands[0].partition("|")
    x, b, c = m.reader(i.operands[1], "b32"), m.reader(i.operands[2], "u32"), m.reader(i.operands[3], "u32")
    mask = m.reader(i.operands[4], "u32")

    def act(lanes: Array) -> None:
        shape = lanes.shape
        value, amount, limit = (np.broadcast_to(np.asarray(r(lanes)), shape) for r in (x, b, c))
        lane = m.laneid[lanes]
        segment = (limit >> np.uint32(8)) & np.uint32(31)
        clamp = limit & np.uint32(31)
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        amount = amount & np.uint32(31)
        source = {"bfly": lane ^ amount, "idx": first | (amount & ~segment), "down": lane + amount, "up": lane - amount}[how].astype(
            np.int64
        )
        inside = source >= last.astype(np.int64) if how == "up" else source <= last.astype(np.int64)
        if how == "up":
            inside &= lane >= amount
        source = np.where(inside, source, lane)
        register = np.zeros(m.lanes, np.uint32)
        known = np.zeros(m.lanes, np.bool_)
        register[lanes], known[lanes] = value, True
        of = (lanes - lane + source).astype(np.int64)
        if not known[of].all():
            raise PtxError("a shuffle reads a lane that is not taking part")
        m.write(out, lanes, register[of])
        if flag:
            m.write(flag, lanes, inside)

    return together(m, mask, act)


def _vote(m: Machine, i: Instruction) -> Step:
    read, mask, how = m.reader(i.operands[1], "pred"), m.reader(i.operands[2], "u32"), i.opcode[2]

    def act(lanes: Array) -> None:
        votes = np.zeros(m.lanes, np.bool_)
        votes[lanes] = np.broadcast_to(read(lanes), lanes.shape)
        taking = np.zeros(m.lanes, np.bool_)
        taking[lanes] = True
        by_warp = votes.reshape(-1, 32)
        if how == "ballot":
            result: Values = (by_warp * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)
        elif how == "any":
            result = by_warp.any(1)
        elif how == "all":
            result = (by_warp | ~taking.reshape(-1, 32)).all(1)
        else:
            raise PtxError(f"no vote {how} in this machine")
        m.write(i.operands[0], lanes, result[lanes // 32])

    return together(m, mask, act)


def _redux(m: Machine, i: Instruction) -> Step:
    read, mask, kind = m.reader(i.operands[1], kind_of(i)), m.reader(i.operands[2], "u32"), TYPES[kind_of(i)]
    f: Any = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}[i.opcode[2]]

    def act(lanes: Array) -> None:
        result = np.zeros(m.lanes, kind)
        values = np.broadcast_to(read(lanes), lanes.shape)
        for warp in np.unique(lanes // 32):
            result[warp * 32 : warp * 32 + 32] = f.reduce(values[lanes // 32 == warp])
        m.write(i.operands[0], lanes, result[lanes])

    return together(m, mask, act)


def _elect(m: Machine, i: Instruction) -> Step:
    out, _, flag = i.operands[0].partition("|")

    def act(lanes: Array) -> None:
        first = np.full(m.lanes // 32, 32)
        np.minimum.at(first, lanes // 32, m.laneid[lanes])
        m.write(out, lanes, first[lanes // 32].astype(np.uint32))
        m.write(flag, lanes, m.laneid[lanes] == first[lanes // 32])

    return together(m, m.reader(i.operands[1], "u32"), act)


def _bar(m: Machine, i: Instruction) -> Step:
    if i.opcode[1] == "warp":
        return together(m, m.reader(i.operands[0], "u32"), lambda lanes: None)
    if len(i.operands) > 1 or (i.operands and i.operands[0] != "0") or "red" in i.opcode or "arrive" in i.opcode:
        raise PtxError(f"only barrier 0 of all threads: {i.text!r}")
    return lambda a: wait


def _bra(m: Machine, i: Instruction) -> Step:
    to = target(m.program, i)

    def go(machine: Machine, pc: int, lanes: Array, stuck: dict[int, Array]) -> list[tuple[int, Array]]:
        return [(to, lanes)]

    return lambda a: go


def _ret(m: Machine, i: Instruction) -> Step:
    return lambda a: leave


INSTRUCTIONS: dict[str, Build] = {
    "shfl": _shfl,
    "vote": _vote,
    "redux": _redux,
    "elect": _elect,
    "bar": _bar,
    "barrier": _bar,
    "bra": _bra,
    "ret": _ret,
    "exit": _ret,
}
