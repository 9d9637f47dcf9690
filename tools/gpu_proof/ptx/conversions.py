"""Conversions, comparisons and moves between registers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from gpu_proof.ptx.machine import TYPES, Lanes, Machine
from gpu_proof.ptx.memory import Array
from gpu_proof.ptx.program import Instruction, PtxError
from gpu_proof.ptx.steps import Build, Step, Values, bf16_of_float, elements, float_of_bf16, flushed, kind_of

_TESTS: dict[str, Callable[[Values], Values]] = {
    "notanumber": np.isnan,
    "number": lambda x: ~np.isnan(x),
    "finite": np.isfinite,
    "infinite": np.isinf,
}
_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(m: Machine, i: Instruction) -> Step:
    kinds = [p for p in i.opcode if p in TYPES or p in ("bf16", "bf16x2", "f16x2")]
    to, source = kinds[-2], kinds[-1]
    out = i.operands[0]
    if to in ("bf16x2", "f16x2"):
        high, low = (m.reader(o, "f32") for o in i.operands[1:3])

        def pack(x: Array) -> Array:
            return (bf16_of_float(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16)).astype(np.uint32)

        return lambda a: m.write(out, a, pack(np.asarray(low(a))) | (pack(np.asarray(high(a))) << np.uint32(16)))
    read = m.reader(i.operands[1], "b16" if source == "bf16" else source)
    rounding = next((_ROUND[p] for p in i.opcode if p in _ROUND), None)

    def step(a: Lanes) -> None:
        x = np.atleast_1d(np.asarray(read(a)))
        if source == "bf16":
            x = float_of_bf16(x)
        m.write(out, a, flushed(i, _converted(flushed(i, x), to, rounding, "sat" in i.opcode)))

    return step


def _converted(x: Array, to: str, rounding: Callable[[Array], Array] | None, saturate: bool) -> Array:
    if to == "bf16":
        return bf16_of_float(x)
    dtype = np.dtype(TYPES[to])
    if x.dtype.kind == "f" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        whole = (rounding or np.trunc)(x.astype(np.float64))
        return np.where(np.isnan(whole), 0, np.clip(whole, limits.min, float(limits.max))).astype(dtype)
    if rounding is not None:
        return rounding(x).astype(dtype)
    if saturate and dtype.kind == "f":
        x = np.where(np.isnan(x), 0, np.clip(x, 0, 1))
    return x.astype(dtype)


def _setp(m: Machine, i: Instruction) -> Step:
    kind = kind_of(i)
    compare, out = i.opcode[1], i.operands[0].split("|")
    x, y = m.reader(i.operands[1], kind), m.reader(i.operands[2], kind)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.get(i.opcode[2])
    third = m.reader(i.operands[3], "pred") if combine else None

    def step(a: Lanes) -> None:
        result = np.broadcast_to(_compared(compare, flushed(i, x(a)), flushed(i, y(a))), m.block[a].shape)
        for name, value in zip(out, (result, ~result), strict=False):
            m.write(name, a, combine(value, third(a)) if combine and third else value)

    return step


def _compared(how: str, x: Values, y: Values) -> Values:
    if how in ("num", "nan"):
        unordered = np.isnan(x) | np.isnan(y)
        return unordered if how == "nan" else ~unordered
    if len(how) == 3:  # equ, neu, ltu ...: true also where one is NaN
        return _compared(how[:2], x, y) | np.isnan(x) | np.isnan(y)
    if how == "ne" and np.asarray(x).dtype.kind == "f":
        return (x != y) & ~(np.isnan(x) | np.isnan(y))
    return {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
            "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}[how](x, y)  # fmt: skip


def _testp(m: Machine, i: Instruction) -> Step:
    read = m.reader(i.operands[1], kind_of(i))
    test = _TESTS[i.opcode[1]]
    return lambda a: m.write(i.operands[0], a, test(read(a)))


def _selp(m: Machine, i: Instruction) -> Step:
    kind = kind_of(i)
    x, y, p = m.reader(i.operands[1], kind), m.reader(i.operands[2], kind), m.reader(i.operands[3], "pred")
    return lambda a: m.write(i.operands[0], a, np.where(p(a), x(a), y(a)))


def _mov(m: Machine, i: Instruction) -> Step:
    kind = kind_of(i)
    to, source = elements(i.operands[0]), elements(i.operands[1])
    if len(to) == len(source) == 1:
        read = m.reader(source[0], kind)
        return lambda a: m.write(to[0], a, np.broadcast_to(read(a), m.block[a].shape))
    width = int(kind[1:])
    if len(source) > 1:  # packs
        part = width // len(source)
        readers = [m.reader(o, f"b{part}") for o in source]

        def pack(a: Lanes) -> None:
            whole = TYPES[f"u{width}"]
            m.write(to[0], a, sum((np.asarray(r(a)).astype(whole) << whole(part * n) for n, r in enumerate(readers)), start=whole(0)))

        return pack
    part, read = width // len(to), m.reader(source[0], kind)

    def unpack(a: Lanes) -> None:
        value = np.asarray(read(a))
        for n, name in enumerate(to):
            m.write(name, a, (value >> value.dtype.type(part * n)).astype(f"u{part // 8}"))

    return unpack


def _cvta(m: Machine, i: Instruction) -> Step:
    if "shared" in i.opcode:
        raise PtxError(f"no generic addresses of shared memory in this machine: {i.text!r}")
    read = m.reader(i.operands[1], "u64")
    return lambda a: m.write(i.operands[0], a, np.broadcast_to(read(a), m.block[a].shape))


INSTRUCTIONS: dict[str, Build] = {
    "cvt": _cvt,
    "setp": _setp,
    "testp": _testp,
    "selp": _selp,
    "mov": _mov,
    "cvta": _cvta,
}
