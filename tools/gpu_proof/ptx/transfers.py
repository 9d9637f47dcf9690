"""Loads and stores: one number or several, matrices of 8 by 8, and copies that arrive later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_proof.ptx.machine import TYPES, Lanes, Machine
from gpu_proof.ptx.program import Instruction, PtxError
from gpu_proof.ptx.steps import Build, Step, elements, kind_of, whole_warps


def _space(i: Instruction) -> str:
    space = next((p.split("::")[0] for p in i.opcode if p.split("::")[0] in ("global", "shared", "const", "local", "param")), "generic")
    if space == "local":
        raise PtxError(f"local memory: {i.text!r}")
    return space


def _ld(m: Machine, i: Instruction) -> Step:
    kind, space = kind_of(i), _space(i)
    to = elements(i.operands[0])
    dtype = TYPES["b16" if kind == "bf16" else kind]
    if space == "param":
        return _ld_param(m, i, to, dtype)
    where, _ = m.address(i.operands[1])

    def step(a: Lanes) -> None:
        for name, values in zip(to, m.load(space, where(a), a, len(to), dtype), strict=True):
            m.write(name, a, values)

    return step


def _ld_param(m: Machine, i: Instruction, to: list[str], dtype: Any) -> Step:
    base, _, offset = i.operands[1].strip("[] ").partition("+")
    start = next(p.offset for p in m.program.params if p.name == base.strip()) + (int(offset, 0) if offset.strip() else 0)
    values = np.frombuffer(m.arguments, dtype, len(to), start)

    def step(a: Lanes) -> None:
        for name, value in zip(to, values, strict=True):
            m.write(name, a, np.broadcast_to(value, m.block[a].shape))

    return step


def _st(m: Machine, i: Instruction) -> Step:
    kind, space = kind_of(i), _space(i)
    kind = "b16" if kind == "bf16" else kind
    width = int(kind[1:]) // 8
    where, _ = m.address(i.operands[0])
    readers = [m.reader(o, f"b{width * 8}") if o[0] == "%" else m.reader(o, kind) for o in elements(i.operands[1])]

    def step(a: Lanes) -> None:
        shape = m.block[a].shape
        values = [np.broadcast_to(np.asarray(read(a)), shape) for read in readers]
        m.store(space, where(a), a, [v.view(f"u{width}") if v.dtype.kind == "f" else v.astype(f"u{width}") for v in values], width)

    return step


def _cp(m: Machine, i: Instruction) -> Step:
    """cp.async: what is copied appears with the wait for its group."""
    if i.opcode[1] != "async" or "bulk" in i.opcode:
        raise PtxError(f"no {i.text!r} in this machine")
    if i.opcode[2] == "commit_group":
        return lambda a: m.copies.append([])
    if i.opcode[2] in ("wait_group", "wait_all"):
        left = int(i.operands[0], 0) if i.operands else 0
        return lambda a: _arrive(m, left)
    to, _ = m.address(i.operands[0])
    source, _ = m.address(i.operands[1])
    size = int(i.operands[2], 0)
    given = m.reader(i.operands[3], "u32") if len(i.operands) > 3 else None

    def step(a: Lanes) -> None:
        places = m.in_shared(to(a), a, size)
        count = np.broadcast_to(np.asarray(given(a)) if given else np.uint32(size), m.block[a].shape)
        rows = np.zeros((len(places), size), np.uint8)
        full = count == size
        if (count[~full] != 0).any():
            raise PtxError("a partial cp.async")
        if full.any():
            lanes = np.arange(m.lanes)[a][full]
            words = m.load("global", source(a)[full], lanes, size // 4, np.uint32)
            rows[full] = np.stack(words, axis=1).view(np.uint8)
        m.copies[-1].append((places, rows))

    return step


def _arrive(m: Machine, left: int) -> None:
    committed = m.copies[:-1]
    done, kept = committed[: len(committed) - left], committed[len(committed) - left :]
    for group in done:
        for places, rows in group:
            at = places[:, None] + np.arange(rows.shape[1])
            m.shared[at] = rows
    m.copies = [*kept, m.copies[-1]]


class _Rows(NamedTuple):
    """The rows of up to four matrices of 8 x 8 halves, in the order of the matrices."""

    lanes: Lanes
    starts: list[NDArray[Any]]  # of each matrix's rows
    owners: NDArray[Any]  # the lanes to which these belong


def _matrices(m: Machine, i: Instruction, memory: int) -> tuple[list[str], bool, Callable[[Lanes], _Rows]]:
    """Return the registers of 8 x 8 matrices, whether they are transposed, and what gives the lanes their places in memory.

    Args:
        memory: which operand is the address.
    """
    count = {"x1": 1, "x2": 2, "x4": 4}[next(p for p in i.opcode if p in ("x1", "x2", "x4"))]
    where, _ = m.address(i.operands[memory])

    def places(a: Lanes) -> _Rows:
        lanes = whole_warps(m, a)
        rows = where(lanes).reshape(-1, 32)
        starts = [np.ascontiguousarray(rows[:, n : n + 8]).ravel() for n in range(0, 8 * count, 8)]
        return _Rows(lanes, starts, lanes.reshape(-1, 32)[:, :8].ravel())

    return elements(i.operands[1 - memory]), "trans" in i.opcode, places


# The lane r * 4 + c / 2 of a warp holds the elements (r, c) and (r, c + 1) of a matrix.
_R, _C = np.arange(32) // 4, np.arange(32) % 4 * 2


def _ldmatrix(m: Machine, i: Instruction) -> Step:
    to, transposed, places = _matrices(m, i, 1)

    def step(a: Lanes) -> None:
        rows = places(a)
        for register, starts in zip(to, rows.starts, strict=True):
            eight = np.stack(m.load("shared", starts, rows.owners, 8, np.uint16), axis=-1).reshape(-1, 8, 8)
            low, high = (eight[:, _C, _R], eight[:, _C + 1, _R]) if transposed else (eight[:, _R, _C], eight[:, _R, _C + 1])
            m.write(register, rows.lanes, (low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))).ravel())

    return step


def _stmatrix(m: Machine, i: Instruction) -> Step:
    values, transposed, places = _matrices(m, i, 0)

    def step(a: Lanes) -> None:
        rows = places(a)
        for value, starts in zip(values, rows.starts, strict=True):
            raw = m.register(value)[rows.lanes].reshape(-1, 32)
            eight = np.zeros((len(raw), 8, 8), np.uint16)
            for h in (0, 1):
                half = (raw >> np.uint32(16 * h)).astype(np.uint16)
                eight[(slice(None), _C + h, _R) if transposed else (slice(None), _R, _C + h)] = half
            m.store("shared", starts, rows.owners, list(eight.reshape(-1, 8).T), 2)

    return step


INSTRUCTIONS: dict[str, Build] = {
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "cp": _cp,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
}
