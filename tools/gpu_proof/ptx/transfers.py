"""Loads and stores: one number or several, matrices of 8 by 8, and copies that arrive later."""

from __future__ import annotations

from typing import Any

import numpy as np

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


def _ldmatrix(m: Machine, i: Instruction) -> Step:
    count = {"x1": 1, "x2": 2, "x4": 4}[next(p for p in i.opcode if p in ("x1", "x2", "x4"))]
    transposed, to = "trans" in i.opcode, elements(i.operands[0])
    where, _ = m.address(i.operands[1])

    def step(a: Lanes) -> None:
        lanes = whole_warps(m, a)
        rows = where(lanes).reshape(-1, 32)
        lane = np.arange(32)
        for n in range(count):
            starts = np.ascontiguousarray(rows[:, 8 * n : 8 * n + 8])
            owners = lanes.reshape(-1, 32)[:, :8].ravel()
            eight = np.stack(m.load("shared", starts.ravel(), owners, 8, np.uint16), axis=-1).reshape(-1, 8, 8)
            r, c = lane // 4, lane % 4 * 2
            low, high = (eight[:, c, r], eight[:, c + 1, r]) if transposed else (eight[:, r, c], eight[:, r, c + 1])
            m.write(to[n], lanes, (low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))).ravel())

    return step


def _stmatrix(m: Machine, i: Instruction) -> Step:
    count = {"x1": 1, "x2": 2, "x4": 4}[next(p for p in i.opcode if p in ("x1", "x2", "x4"))]
    transposed, values = "trans" in i.opcode, elements(i.operands[1])
    where, _ = m.address(i.operands[0])

    def step(a: Lanes) -> None:
        lanes = whole_warps(m, a)
        rows = where(lanes).reshape(-1, 32)
        lane = np.arange(32)
        r, c = lane // 4, lane % 4 * 2
        for n in range(count):
            raw = m.register(values[n])[lanes].reshape(-1, 32)
            eight = np.zeros((len(raw), 8, 8), np.uint16)
            for h in (0, 1):
                half = (raw >> np.uint32(16 * h)).astype(np.uint16)
                eight[(slice(None), c + h, r) if transposed else (slice(None), r, c + h)] = half
            starts = np.ascontiguousarray(rows[:, 8 * n : 8 * n + 8]).ravel()
            m.store("shared", starts, lanes.reshape(-1, 32)[:, :8].ravel(), list(eight.reshape(-1, 8).T), 2)

    return step


INSTRUCTIONS: dict[str, Build] = {
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "cp": _cp,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
}
