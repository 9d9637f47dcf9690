"""Arithmetic and bits, of one number in a register or of two halves."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_proof.ptx.machine import TYPES, Lanes, Machine
from gpu_proof.ptx.memory import Array
from gpu_proof.ptx.program import Instruction, PtxError
from gpu_proof.ptx.steps import Build, Step, Values, bf16_of_float, float_of_bf16, flushed, kind_of


def _fused(x: Values, y: Values, z: Values) -> Values:
    if np.asarray(x).dtype == np.float32:
        return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float32)
    if np.asarray(x).dtype == np.float64:
        return (np.longdouble(x) * np.longdouble(y) + np.longdouble(z)).astype(np.float64)
    if np.asarray(x).dtype == np.float16:
        return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float16)
    return x * y + z


def _divide(x: Values, y: Values) -> Values:
    if np.asarray(x).dtype.kind == "f":
        return x / y
    if (np.asarray(y) == 0).any():
        raise PtxError("integer division by zero")
    quotient = np.abs(x.astype(np.int64)) // np.abs(np.asarray(y).astype(np.int64)) if np.asarray(x).dtype.kind == "i" else x // y
    return (quotient * np.sign(x) * np.sign(y)).astype(x.dtype) if np.asarray(x).dtype.kind == "i" else quotient


def _remainder(x: Values, y: Values) -> Values:
    return (x - _divide(x, y) * y).astype(np.asarray(x).dtype)


def _reversed_bits(x: Array) -> Array:
    out = np.zeros_like(x)
    for bit in range(x.dtype.itemsize * 8):
        out |= ((x >> x.dtype.type(bit)) & x.dtype.type(1)) << x.dtype.type(x.dtype.itemsize * 8 - 1 - bit)
    return out


def _leading_zeros(x: Array) -> Array:
    width = x.dtype.itemsize * 8
    out = np.full(x.shape, width, np.uint32)
    for bit in range(width):
        out = np.where((x >> x.dtype.type(bit)) & x.dtype.type(1), np.uint32(width - 1 - bit), out)
    return out


_ONE: dict[str, Callable[[Values], Values]] = {
    "neg": operator.neg,
    "abs": np.abs,
    "not": operator.invert,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rcp": lambda x: np.ones_like(x) / x,
    "rsqrt": lambda x: np.ones_like(x) / np.sqrt(x),
    "tanh": np.tanh,
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
    "brev": _reversed_bits,
    "clz": _leading_zeros,
}
_TWO: dict[str, Callable[[Values, Values], Values]] = {
    "add": operator.add,
    "sub": operator.sub,
    "div": _divide,
    "rem": _remainder,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "copysign": lambda sign, x: np.copysign(x, sign),
}
_MIXED: dict[str, Callable[..., Values]] = {"add": operator.add, "sub": operator.sub, "fma": _fused}


def _unary(m: Machine, i: Instruction) -> Step:
    kind = kind_of(i)
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, _ONE[i.opcode[0]])
    read, f, out = m.reader(i.operands[1], kind), _ONE[i.opcode[0]], i.operands[0]

    def step(a: Lanes) -> None:
        x = np.asarray(flushed(i, read(a)))
        m.write(out, a, flushed(i, f(x).astype(np.uint32 if i.opcode[0] in ("popc", "clz") else x.dtype)))

    return step


def _mixed(m: Machine, i: Instruction) -> Step | None:
    """add, sub and fma of float32 with factors or a first term of half the size (`add.rn.f32.bf16`)."""
    kind = next((half for half in ("f16", "bf16") if i.opcode[-2:] == ("f32", half)), None)
    if kind is None:
        return None
    *halves, last = i.operands[1:]
    readers, whole = [m.reader(o, "b16" if kind == "bf16" else "f16") for o in halves], m.reader(last, "f32")
    f = _MIXED[i.opcode[0]]

    def step(a: Lanes) -> None:
        values = [np.atleast_1d(np.asarray(read(a))) for read in readers]
        values = [float_of_bf16(v) if kind == "bf16" else v.astype(np.float32) for v in values]
        m.write(i.operands[0], a, f(*values, whole(a)))

    return step


def _binary(m: Machine, i: Instruction) -> Step:
    if step := _mixed(m, i):
        return step
    kind, f, out = kind_of(i), _TWO[i.opcode[0]], i.operands[0]
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, f)
    x, y = (m.reader(o, kind) for o in i.operands[1:3])
    if "sat" in i.opcode or "cc" in i.opcode:
        raise PtxError(f"no saturation or carry in this machine: {i.text!r}")
    return lambda a: m.write(out, a, flushed(i, f(flushed(i, x(a)), flushed(i, y(a)))))


def _packed(m: Machine, i: Instruction, f: Callable[..., Array]) -> Step:
    """Both halves of a register, or its only bfloat16."""
    kind, out = kind_of(i), i.operands[0]
    whole = {"f32x2": "b64", "bf16": "b16"}.get(kind, "b32")
    readers = [m.reader(o, whole) for o in i.operands[1:]]

    def halves(raw: Any) -> list[Array]:
        raw = np.atleast_1d(np.asarray(raw))
        if kind == "bf16":
            return [float_of_bf16(raw)]
        if kind == "f32x2":
            return [
                (raw & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32),
                (raw >> np.uint64(32)).astype(np.uint32).view(np.float32),
            ]
        low, high = (raw & np.uint32(0xFFFF)).astype(np.uint16), (raw >> np.uint32(16)).astype(np.uint16)
        return [float_of_bf16(h) if kind == "bf16x2" else h.view(np.float16) for h in (low, high)]

    def whole_of(low: Array, high: Array) -> Array:
        if kind == "f32x2":
            return low.astype(np.float32).view(np.uint32).astype(np.uint64) | (
                high.astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
            )
        low, high = (bf16_of_float(x) if kind == "bf16x2" else x.view(np.uint16) for x in (low, high))
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    def step(a: Lanes) -> None:
        parts = [halves(read(a)) for read in readers]
        results = [f(*values) for values in zip(*parts, strict=True)]
        m.write(out, a, bf16_of_float(results[0]) if kind == "bf16" else whole_of(*results))

    return step


def _extremum(m: Machine, i: Instruction) -> Step:
    """NaN only where both are, or with .NaN where one is."""
    kind, out = kind_of(i), i.operands[0]
    largest, through = i.opcode[0] == "max", "NaN" in i.opcode
    f: Any = (np.maximum if through else np.fmax) if largest else (np.minimum if through else np.fmin)
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, f)
    readers = [m.reader(o, kind) for o in i.operands[1:]]

    def step(a: Lanes) -> None:
        values = [flushed(i, read(a)) for read in readers]
        result = f(values[0], values[1])
        m.write(out, a, f(result, values[2]) if len(values) == 3 else result)

    return step


def _mul(m: Machine, i: Instruction) -> Step:
    kind, out = kind_of(i), i.operands[0]
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, operator.mul)
    x, y = (m.reader(o, kind) for o in i.operands[1:3])
    product = _integer_product(i, kind)
    if product is not None:
        return lambda a: m.write(out, a, product(x(a), y(a)))
    return lambda a: m.write(out, a, flushed(i, flushed(i, x(a)) * flushed(i, y(a))))


def _mad(m: Machine, i: Instruction) -> Step:
    if step := _mixed(m, i):
        return step
    kind, out = kind_of(i), i.operands[0]
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, _fused)
    wide = "wide" in i.opcode
    x, y = (m.reader(o, kind) for o in i.operands[1:3])
    z = m.reader(i.operands[3], f"{kind[0]}{int(kind[1:]) * 2}" if wide else kind)
    product = _integer_product(i, kind)
    if product is not None:
        return lambda a: m.write(out, a, product(x(a), y(a)) + z(a))
    return lambda a: m.write(out, a, flushed(i, _fused(*(flushed(i, r(a)) for r in (x, y, z)))))


def _integer_product(i: Instruction, kind: str) -> Callable[[Array, Array], Array] | None:
    if kind[0] == "f":
        return None
    narrow = TYPES[kind]
    width = int(kind[1:])
    if "wide" in i.opcode or "hi" in i.opcode:
        if width == 64:
            return lambda x, y: np.array([(int(p) * int(q)) >> 64 & (2**64 - 1) for p, q in np.broadcast(x, y)], np.uint64).view(narrow)
        double = TYPES[f"{kind[0]}{width * 2}"]
        if "wide" in i.opcode:
            return lambda x, y: np.asarray(x).astype(double) * np.asarray(y).astype(double)
        return lambda x, y: ((np.asarray(x).astype(double) * np.asarray(y).astype(double)) >> double(width)).astype(narrow)
    return lambda x, y: x * y


def _shift(m: Machine, i: Instruction) -> Step:
    """Amounts past the width shift everything out."""
    kind, out = kind_of(i), i.operands[0]
    x, n = m.reader(i.operands[1], kind), m.reader(i.operands[2], "u32")
    width = int(kind[1:])

    def step(a: Lanes) -> None:
        value, amount = np.asarray(x(a)), np.asarray(n(a))
        kept = np.minimum(amount, width - 1).astype(value.dtype)
        if i.opcode[0] == "shl":
            result = np.where(amount >= width, value.dtype.type(0), value << kept)
        elif value.dtype.kind == "i":
            result = value >> kept
        else:
            result = np.where(amount >= width, value.dtype.type(0), value >> kept)
        m.write(out, a, result)

    return step


def _funnel_shift(m: Machine, i: Instruction) -> Step:
    low, high, n = (m.reader(o, "u32") for o in i.operands[1:4])
    left, wrap = "l" in i.opcode, "wrap" in i.opcode

    def step(a: Lanes) -> None:
        both = np.asarray(low(a)).astype(np.uint64) | (np.asarray(high(a)).astype(np.uint64) << np.uint64(32))
        amount = np.asarray(n(a)).astype(np.uint64)
        amount = amount & np.uint64(31) if wrap else np.minimum(amount, np.uint64(32))
        m.write(
            i.operands[0], a, ((both >> (np.uint64(32) - amount) if left else both >> amount) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        )

    return step


def _bit_field(m: Machine, i: Instruction) -> Step:
    kind, out = kind_of(i), i.operands[0]
    x, start, length = m.reader(i.operands[1], kind), m.reader(i.operands[2], "u32"), m.reader(i.operands[3], "u32")

    def step(a: Lanes) -> None:
        value, at, count = np.asarray(x(a)), int(start(a)), int(length(a))
        width = value.dtype.itemsize * 8
        up = value.dtype.type(width - at - count)
        m.write(out, a, (value << up) >> value.dtype.type(width - count))

    return step


def _insert(m: Machine, i: Instruction) -> Step:
    """bfi: the low bits of the first operand in a field of the second."""
    part, rest = (m.reader(o, "u32") for o in i.operands[1:3])
    start, length = (int(o, 0) for o in i.operands[3:5])
    field = np.uint32(((1 << length) - 1) << start)
    return lambda a: m.write(i.operands[0], a, (np.asarray(rest(a)) & ~field) | ((np.asarray(part(a)) << np.uint32(start)) & field))


def _lop3(m: Machine, i: Instruction) -> Step:
    readers, table = [m.reader(o, "b32") for o in i.operands[1:4]], int(i.operands[4], 0)

    def step(a: Lanes) -> None:
        x, y, z = (np.asarray(read(a)) for read in readers)
        result = np.zeros_like(m.register(i.operands[0])[a])
        for case in range(8):
            if table >> case & 1:
                result |= (x if case & 4 else ~x) & (y if case & 2 else ~y) & (z if case & 1 else ~z)
        m.write(i.operands[0], a, result)

    return step


def _prmt(m: Machine, i: Instruction) -> Step:
    x, y, selector = (m.reader(o, "u32") for o in i.operands[1:4])

    def step(a: Lanes) -> None:
        both = np.asarray(x(a)).astype(np.uint64) | (np.asarray(y(a)).astype(np.uint64) << np.uint64(32))
        chosen = np.asarray(selector(a))
        result: Values = np.uint32(0)
        for byte in range(4):
            nibble = (chosen >> np.uint32(4 * byte)) & np.uint32(15)
            picked = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
            sign = np.where(picked & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(nibble & np.uint32(8), sign, picked) << np.uint32(8 * byte))
        m.write(i.operands[0], a, result)

    return step


INSTRUCTIONS: dict[str, Build] = {
    **dict.fromkeys(_ONE, _unary),
    **dict.fromkeys(_TWO, _binary),
    "min": _extremum,
    "max": _extremum,
    "mul": _mul,
    "mad": _mad,
    "fma": _mad,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel_shift,
    "bfe": _bit_field,
    "bfi": _insert,
    "lop3": _lop3,
    "prmt": _prmt,
}
