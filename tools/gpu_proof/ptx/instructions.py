"""What each PTX instruction computes (PTX ISA 8.8), as numpy operations over the active threads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_proof.ptx.machine import TYPES, Lanes, Machine, leave, wait
from gpu_proof.ptx.memory import Array
from gpu_proof.ptx.program import Instruction, PtxError, target

Step = Callable[[Lanes], Any]


def compiled(m: Machine, i: Instruction) -> Step:
    """The instruction as a function of the active threads."""
    build = _INSTRUCTIONS.get(i.opcode[0])
    if build is None:
        raise PtxError(f"{m.program.name}: no {i.opcode[0]} in this machine: {i.text!r}")
    return build(m, i)


def _elements(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{} ").split(",")] if operand.startswith("{") else [operand]


def _kind(i: Instruction) -> str:
    """The last part of the opcode that is a type."""
    for part in reversed(i.opcode):
        if part in TYPES or part in ("bf16", "bf16x2", "f16x2", "f32x2"):
            return part
    raise PtxError(f"no type in {i.text!r}")


def _float_of_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bf16_of_float(x: Array) -> Array:
    """To nearest even; NaN becomes the canonical 0x7FFF."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


# -------------------- arithmetic


def _fused(x: Array, y: Array, z: Array) -> Array:
    if np.asarray(x).dtype == np.float32:
        return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float32)
    if np.asarray(x).dtype == np.float64:
        return (np.longdouble(x) * np.longdouble(y) + np.longdouble(z)).astype(np.float64)
    if np.asarray(x).dtype == np.float16:
        return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float16)
    return x * y + z


def _divide(x: Array, y: Array) -> Array:
    if np.asarray(x).dtype.kind == "f":
        return x / y
    if (np.asarray(y) == 0).any():
        raise PtxError("integer division by zero")
    quotient = np.abs(x.astype(np.int64)) // np.abs(np.asarray(y).astype(np.int64)) if np.asarray(x).dtype.kind == "i" else x // y
    return (quotient * np.sign(x) * np.sign(y)).astype(x.dtype) if np.asarray(x).dtype.kind == "i" else quotient


def _remainder(x: Array, y: Array) -> Array:
    return (x - _divide(x, y) * y).astype(np.asarray(x).dtype)


_ONE: dict[str, Callable[[Array], Array]] = {
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
    "brev": lambda x: _reversed_bits(x),
    "clz": lambda x: _leading_zeros(x),
}
_TWO: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "div": _divide,
    "rem": _remainder,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "copysign": lambda sign, x: np.copysign(x, sign),
}


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


def _flushed(i: Instruction, x: Array) -> Array:
    """Subnormal float32 as 0 of their sign, with .ftz."""
    if "ftz" not in i.opcode or np.asarray(x).dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _unary(m: Machine, i: Instruction) -> Step:
    kind = _kind(i)
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, _ONE[i.opcode[0]])
    read, f, out = m.reader(i.operands[1], kind), _ONE[i.opcode[0]], i.operands[0]

    def step(a: Lanes) -> None:
        x = np.asarray(_flushed(i, read(a)))
        m.write(out, a, _flushed(i, f(x).astype(np.uint32 if i.opcode[0] in ("popc", "clz") else x.dtype)))

    return step


def _mixed(m: Machine, i: Instruction) -> Step | None:
    """add, sub and fma of float32 with factors or a first term of half the size (`add.rn.f32.bf16`)."""
    kind = next((half for half in ("f16", "bf16") if i.opcode[-2:] == ("f32", half)), None)
    if kind is None:
        return None
    *halves, last = i.operands[1:]
    readers, whole = [m.reader(o, "b16" if kind == "bf16" else "f16") for o in halves], m.reader(last, "f32")
    f = {"add": operator.add, "sub": operator.sub, "fma": _fused}[i.opcode[0]]

    def step(a: Lanes) -> None:
        values = [np.atleast_1d(np.asarray(read(a))) for read in readers]
        values = [_float_of_bf16(v) if kind == "bf16" else v.astype(np.float32) for v in values]
        m.write(i.operands[0], a, f(*values, whole(a)))

    return step


def _binary(m: Machine, i: Instruction) -> Step:
    if step := _mixed(m, i):
        return step
    kind, f, out = _kind(i), _TWO[i.opcode[0]], i.operands[0]
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, f)
    x, y = (m.reader(o, kind) for o in i.operands[1:3])
    if "sat" in i.opcode or "cc" in i.opcode:
        raise PtxError(f"no saturation or carry in this machine: {i.text!r}")
    return lambda a: m.write(out, a, _flushed(i, f(_flushed(i, x(a)), _flushed(i, y(a)))))


def _packed(m: Machine, i: Instruction, f: Callable[..., Array]) -> Step:
    """Both halves of a register, or its only bfloat16."""
    kind, out = _kind(i), i.operands[0]
    whole = {"f32x2": "b64", "bf16": "b16"}.get(kind, "b32")
    readers = [m.reader(o, whole) for o in i.operands[1:]]

    def halves(raw: Any) -> list[Array]:
        raw = np.atleast_1d(np.asarray(raw))
        if kind == "bf16":
            return [_float_of_bf16(raw)]
        if kind == "f32x2":
            return [
                (raw & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32),
                (raw >> np.uint64(32)).astype(np.uint32).view(np.float32),
            ]
        low, high = (raw & np.uint32(0xFFFF)).astype(np.uint16), (raw >> np.uint32(16)).astype(np.uint16)
        return [_float_of_bf16(h) if kind == "bf16x2" else h.view(np.float16) for h in (low, high)]

    def whole_of(low: Array, high: Array) -> Array:
        if kind == "f32x2":
            return low.astype(np.float32).view(np.uint32).astype(np.uint64) | (
                high.astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
            )
        low, high = (_bf16_of_float(x) if kind == "bf16x2" else x.view(np.uint16) for x in (low, high))
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    def step(a: Lanes) -> None:
        parts = [halves(read(a)) for read in readers]
        results = [f(*values) for values in zip(*parts, strict=True)]
        m.write(out, a, _bf16_of_float(results[0]) if kind == "bf16" else whole_of(*results))

    return step


def _extremum(m: Machine, i: Instruction) -> Step:
    """NaN only where both are, or with .NaN where one is."""
    kind, out = _kind(i), i.operands[0]
    largest, through = i.opcode[0] == "max", "NaN" in i.opcode
    f: Any = (np.maximum if through else np.fmax) if largest else (np.minimum if through else np.fmin)
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, f)
    readers = [m.reader(o, kind) for o in i.operands[1:]]

    def step(a: Lanes) -> None:
        values = [_flushed(i, read(a)) for read in readers]
        result = f(values[0], values[1])
        m.write(out, a, f(result, values[2]) if len(values) == 3 else result)

    return step


def _mul(m: Machine, i: Instruction) -> Step:
    kind, out = _kind(i), i.operands[0]
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, operator.mul)
    x, y = (m.reader(o, kind) for o in i.operands[1:3])
    product = _integer_product(i, kind)
    if product is not None:
        return lambda a: m.write(out, a, product(x(a), y(a)))
    return lambda a: m.write(out, a, _flushed(i, _flushed(i, x(a)) * _flushed(i, y(a))))


def _mad(m: Machine, i: Instruction) -> Step:
    if step := _mixed(m, i):
        return step
    kind, out = _kind(i), i.operands[0]
    if kind.endswith("x2") or kind == "bf16":
        return _packed(m, i, _fused)
    wide = "wide" in i.opcode
    x, y = (m.reader(o, kind) for o in i.operands[1:3])
    z = m.reader(i.operands[3], f"{kind[0]}{int(kind[1:]) * 2}" if wide else kind)
    product = _integer_product(i, kind)
    if product is not None:
        return lambda a: m.write(out, a, product(x(a), y(a)) + z(a))
    return lambda a: m.write(out, a, _flushed(i, _fused(*(_flushed(i, r(a)) for r in (x, y, z)))))


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
    kind, out = _kind(i), i.operands[0]
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
    kind, out = _kind(i), i.operands[0]
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
        chosen, result = np.asarray(selector(a)), np.uint32(0)
        for byte in range(4):
            nibble = (chosen >> np.uint32(4 * byte)) & np.uint32(15)
            picked = (both >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
            sign = np.where(picked & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(nibble & np.uint32(8), sign, picked) << np.uint32(8 * byte))
        m.write(i.operands[0], a, result)

    return step


# -------------------- conversions, comparisons, moves

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(m: Machine, i: Instruction) -> Step:
    kinds = [p for p in i.opcode if p in TYPES or p in ("bf16", "bf16x2", "f16x2")]
    to, source = kinds[-2], kinds[-1]
    out = i.operands[0]
    if to in ("bf16x2", "f16x2"):
        high, low = (m.reader(o, "f32") for o in i.operands[1:3])

        def pack(x: Array) -> Array:
            return (_bf16_of_float(x) if to == "bf16x2" else x.astype(np.float16).view(np.uint16)).astype(np.uint32)

        return lambda a: m.write(out, a, pack(np.asarray(low(a))) | (pack(np.asarray(high(a))) << np.uint32(16)))
    read = m.reader(i.operands[1], "b16" if source == "bf16" else source)
    rounding = next((_ROUND[p] for p in i.opcode if p in _ROUND), None)

    def step(a: Lanes) -> None:
        x = np.atleast_1d(np.asarray(read(a)))
        if source == "bf16":
            x = _float_of_bf16(x)
        m.write(out, a, _flushed(i, _converted(_flushed(i, x), to, rounding, "sat" in i.opcode)))

    return step


def _converted(x: Array, to: str, rounding: Any, saturate: bool) -> Array:
    if to == "bf16":
        return _bf16_of_float(x)
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
    kind = _kind(i)
    compare, out = i.opcode[1], i.operands[0].split("|")
    x, y = m.reader(i.operands[1], kind), m.reader(i.operands[2], kind)
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.get(i.opcode[2])
    third = m.reader(i.operands[3], "pred") if combine else None

    def step(a: Lanes) -> None:
        result = np.broadcast_to(_compared(compare, _flushed(i, x(a)), _flushed(i, y(a))), m.block[a].shape)
        for name, value in zip(out, (result, ~result), strict=False):
            m.write(name, a, combine(value, third(a)) if combine and third else value)

    return step


def _compared(how: str, x: Array, y: Array) -> Array:
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
    read = m.reader(i.operands[1], _kind(i))
    test = {"notanumber": np.isnan, "number": lambda x: ~np.isnan(x), "finite": np.isfinite, "infinite": np.isinf}[i.opcode[1]]
    return lambda a: m.write(i.operands[0], a, test(read(a)))


def _selp(m: Machine, i: Instruction) -> Step:
    kind = _kind(i)
    x, y, p = m.reader(i.operands[1], kind), m.reader(i.operands[2], kind), m.reader(i.operands[3], "pred")
    return lambda a: m.write(i.operands[0], a, np.where(p(a), x(a), y(a)))


def _mov(m: Machine, i: Instruction) -> Step:
    kind = _kind(i)
    to, source = _elements(i.operands[0]), _elements(i.operands[1])
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


# -------------------- memory


def _space(i: Instruction) -> str:
    space = next((p.split("::")[0] for p in i.opcode if p.split("::")[0] in ("global", "shared", "const", "local", "param")), "generic")
    if space == "local":
        raise PtxError(f"local memory: {i.text!r}")
    return space


def _ld(m: Machine, i: Instruction) -> Step:
    kind, space = _kind(i), _space(i)
    to = _elements(i.operands[0])
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
    kind, space = _kind(i), _space(i)
    kind = "b16" if kind == "bf16" else kind
    width = int(kind[1:]) // 8
    where, _ = m.address(i.operands[0])
    readers = [m.reader(o, f"b{width * 8}") if o[0] == "%" else m.reader(o, kind) for o in _elements(i.operands[1])]

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
    transposed, to = "trans" in i.opcode, _elements(i.operands[0])
    where, _ = m.address(i.operands[1])

    def step(a: Lanes) -> None:
        lanes = _whole_warps(m, a)
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
    transposed, values = "trans" in i.opcode, _elements(i.operands[1])
    where, _ = m.address(i.operands[0])

    def step(a: Lanes) -> None:
        lanes = _whole_warps(m, a)
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


def _whole_warps(m: Machine, a: Lanes) -> Array:
    lanes = np.arange(m.lanes)[a]
    if len(lanes) % 32 or (lanes.reshape(-1, 32)[:, 0] + 31 != lanes.reshape(-1, 32)[:, 31]).any():
        raise PtxError("not all lanes of the warp are here")
    return lanes


def _mma(m: Machine, i: Instruction) -> Step:
    """mma.sync.m16n8k16 of bf16 or f16 with float32 sums."""
    if i.opcode[:4] != ("mma", "sync", "aligned", "m16n8k16") or i.opcode[6] != "f32" or i.opcode[7] not in ("bf16", "f16"):
        raise PtxError(f"no {i.text!r} in this machine")
    out = _elements(i.operands[0])
    a_regs, b_regs = (_elements(o) for o in i.operands[1:3])
    c_readers = [m.reader(o, "f32") for o in _elements(i.operands[3])]
    half = _float_of_bf16 if i.opcode[7] == "bf16" else (lambda bits: bits.view(np.float16).astype(np.float32))
    lane = np.arange(32)
    g, t = lane // 4, lane % 4 * 2

    def fragment(names: list[str], lanes: Array, shape: tuple[int, int], places: list[tuple[Array, Array]]) -> Array:
        matrix = np.zeros((len(lanes) // 32, *shape), np.float64)
        for name, (row, column) in zip(names, places, strict=True):
            raw = m.register(name)[lanes].reshape(-1, 32)
            for h in (0, 1):
                values = half(np.ascontiguousarray((raw >> np.uint32(16 * h)).astype(np.uint16)))
                matrix[:, row + (h if shape == (16, 8) else 0), column + (h if shape == (16, 16) else 0)] = values
        return matrix

    a_places = [(g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)]
    b_places = [(t, g), (t + 8, g)]
    c_places = [(g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)]

    def step(a: Lanes) -> None:
        lanes = _whole_warps(m, a)
        product = fragment(a_regs, lanes, (16, 16), a_places) @ fragment(b_regs, lanes, (16, 8), b_places)
        for name, read, (row, column) in zip(out, [r(lanes) for r in c_readers], c_places, strict=True):
            c = np.broadcast_to(read, lanes.shape).reshape(-1, 32)
            m.write(name, lanes, (product[:, row, column] + c).astype(np.float32).ravel())

    return step


def _wgmma(m: Machine, i: Instruction) -> Step:
    """wgmma.mma_async.m64nNk16 of bf16 or f16 with float32 sums, where it is issued; factors from shared memory, A also from registers."""
    if i.opcode[1] != "mma_async":
        return _nothing(m, i)
    shape = i.opcode[4]
    if i.opcode[5] != "f32" or i.opcode[6] not in ("bf16", "f16") or not shape.startswith("m64n") or not shape.endswith("k16"):
        raise PtxError(f"no {i.text!r} in this machine")
    columns = int(shape[4:-3])
    half = _float_of_bf16 if i.opcode[6] == "bf16" else (lambda bits: bits.view(np.float16).astype(np.float32))
    out, a_regs = _elements(i.operands[0]), _elements(i.operands[1])
    in_registers = len(a_regs) == 4
    transposed = [int(o) for o in i.operands[6:]]
    transposed = [0, *transposed] if in_registers else transposed
    keep = m.reader(i.operands[3], "pred")
    lane = np.arange(128)
    row, t = lane // 32 * 16 + lane % 32 // 4, lane % 4 * 2

    def from_registers(lanes: Array) -> Array:
        matrix = np.zeros((len(lanes) // 128, 64, 16))
        for name, (up, right) in zip(a_regs, [(0, 0), (8, 0), (0, 8), (8, 8)], strict=True):
            raw = m.register(name)[lanes].reshape(-1, 128)
            for h in (0, 1):
                matrix[:, row + up, t + right + h] = half(np.ascontiguousarray((raw >> np.uint32(16 * h)).astype(np.uint16)))
        return matrix

    def from_shared(name: str, lanes: Array, length: int, by_column: int) -> Array:
        first = lanes.reshape(-1, 128)[:, 0]
        descriptors = m.register(name)[lanes].reshape(-1, 128)
        if (descriptors != descriptors[:, :1]).any():
            raise PtxError("threads of a warpgroup give different descriptors")
        return np.stack(
            [half(_matrix_of(m, int(d), int(f), length, by_column)).astype(float) for d, f in zip(descriptors[:, 0], first, strict=True)]
        )

    def step(a: Lanes) -> None:
        lanes = np.arange(m.lanes)[a]
        if len(lanes) % 128 or (lanes.reshape(-1, 128)[:, 0] % 128).any() or (np.diff(lanes.reshape(-1, 128)) != 1).any():
            raise PtxError("not all threads of the warpgroup are here")
        x = from_registers(lanes) if in_registers else from_shared(a_regs[0], lanes, 64, transposed[0])
        product = x @ from_shared(i.operands[2], lanes, columns, transposed[1]).transpose(0, 2, 1)
        kept = np.broadcast_to(np.asarray(keep(lanes)), lanes.shape)
        for n, name in enumerate(out):
            up, column = n // 2 % 2 * 8, n // 4 * 8 + n % 2
            before = np.where(kept, m.register(name)[lanes].view(np.float32), 0)
            m.write(name, lanes, (product[:, row + up, column + t].ravel() + before).astype(np.float32))

    return step


def _tcgen05(m: Machine, i: Instruction) -> Step:
    """The tensor memory of Blackwell: 128 lanes of 512 columns a block; products are there at once."""
    what = i.opcode[1].split("::")[0]
    if what == "alloc":
        where, _ = m.address(i.operands[0])
        return lambda a: m.store("shared", where(a), a, [np.zeros(len(m.block[a]), np.uint32)], 4)
    if what in ("dealloc", "relinquish_alloc_permit", "wait", "fence"):
        return _nothing(m, i)
    if what == "commit":
        barrier, _ = m.address(i.operands[0])
        return lambda a: m.complete(a, barrier(a))
    if what in ("ld", "st") and ("32x32b" in i.opcode or "16x32bx2" in i.opcode):
        return _tensor_memory_access(m, i, what)
    if what == "mma" and "kind::f16" in i.opcode and "cta_group::1" in i.opcode:
        return _tcgen05_mma(m, i)
    raise PtxError(f"no {i.text!r} in this machine")


def _tensor_memory_access(m: Machine, i: Instruction, what: str) -> Step:
    """Register j of a thread is column j from the address, in the lane of the address plus that of the thread in its warp.

    16x32bx2: the upper half of the warp takes the lanes of the lower half, `split` columns further on.
    """
    memory, registers = (i.operands[1], i.operands[0]) if what == "ld" else (i.operands[0], i.operands[-1])
    where, _ = m.address(memory)
    halves = "16x32bx2" in i.opcode
    split = int(i.operands[2 if what == "ld" else 1], 0) if halves else 0

    def step(a: Lanes) -> None:
        lanes = _whole_warps(m, a)
        address = where(lanes)
        row, column = address >> 16, address & 0xFFFF
        if (row != m.special["%tid.x"][lanes] // 32 % 4 * 32 + np.where(halves, row % 32, 0)).any():
            raise PtxError("a warp outside its lanes of tensor memory")
        row = row + (m.laneid[lanes] % 16 if halves else m.laneid[lanes])
        column = column + np.where(m.laneid[lanes] < 16, 0, split)
        for n, name in enumerate(_elements(registers)):
            if what == "ld":
                m.write(name, lanes, m.tensor_memory[m.block[lanes], row, column + n])
            else:
                m.tensor_memory[m.block[lanes], row, column + n] = m.reader(name, "b32")(lanes)

    return step


def _tcgen05_mma(m: Machine, i: Instruction) -> Step:
    """D [M, N] (+)= A B^T by one thread; types, N and M from the instruction descriptor (PTX ISA 9.7.16.4).

    With M = 64 each warp's lanes hold 16 rows.
    """
    where, _ = m.address(i.operands[0])
    if i.operands[1].startswith("["):
        raise PtxError(f"a factor in tensor memory: {i.text!r}")
    x, y, about, add = (m.reader(o, kind) for o, kind in zip(i.operands[1:5], ("u64", "u64", "u32", "pred"), strict=True))

    def step(a: Lanes) -> None:
        for lane in np.arange(m.lanes)[a]:
            one = np.array([lane])
            word = int(np.ravel(about(one))[0])
            rows, columns = (word >> 24 & 31) * 16, (word >> 17 & 63) * 8
            if rows not in (64, 128) or word >> 4 & 3 != 1 or word & (3 << 13):
                raise PtxError(f"an instruction descriptor {word:#x}")
            kinds, turned = (word >> 7 & 7, word >> 10 & 7), (word >> 15 & 1, word >> 16 & 1)
            factors = []
            for descriptor, length, kind, by_column in zip((x, y), (rows, columns), kinds, turned, strict=True):
                bits = _matrix_of(m, int(np.ravel(descriptor(one))[0]), int(lane), length, by_column)
                factors.append((_float_of_bf16(bits) if kind else bits.view(np.float16)).astype(float))
            first, column = int(where(one)[0]) >> 16, int(where(one)[0]) & 0xFFFF
            row = np.arange(rows)
            place = np.ix_(first + (row if rows == 128 else row // 16 * 32 + row % 16), column + np.arange(columns))
            memory = m.tensor_memory[m.block[lane]].view(np.float32)
            before = memory[place] if bool(np.ravel(add(one))[0]) else 0
            memory[place] = (factors[0] @ factors[1].T + before).astype(np.float32)

    return step


def _mbarrier(m: Machine, i: Instruction) -> Step:
    """Barriers that count one arrival a phase."""
    if i.opcode[1] == "init":
        where, _ = m.address(i.operands[0])
        if i.operands[1] != "1":
            raise PtxError(f"a barrier of several arrivals: {i.text!r}")
        return lambda a: m.reset(a, where(a))
    if i.opcode[1] == "inval":
        return _nothing(m, i)
    if i.opcode[1:3] == ("try_wait", "parity"):
        where, _ = m.address(i.operands[1])
        parity = m.reader(i.operands[2], "u32")
        return lambda a: m.write(i.operands[0], a, (m.phases(a, where(a)) & 1) != parity(a))
    raise PtxError(f"no {i.text!r} in this machine")


def _elect(m: Machine, i: Instruction) -> Step:
    out, _, flag = i.operands[0].partition("|")

    def act(lanes: Array) -> None:
        first = np.full(m.lanes // 32, 32)
        np.minimum.at(first, lanes // 32, m.laneid[lanes])
        m.write(out, lanes, first[lanes // 32].astype(np.uint32))
        m.write(flag, lanes, m.laneid[lanes] == first[lanes // 32])

    return _together(m, m.reader(i.operands[1], "u32"), act, i.text)


def _matrix_of(m: Machine, descriptor: int, lane: int, length: int, by_column: int) -> Array:
    """[length, 16] in bits, from shared memory as a wgmma descriptor lays it out (PTX ISA 9.7.15.5)."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62 & 3)
    if width is None or descriptor >> 49 & 7:
        raise PtxError("a matrix without swizzle, or with a base offset")
    x, k = np.meshgrid(np.arange(length), np.arange(16), indexing="ij")
    if by_column:  # the rows of shared memory run along x
        across = width // 2
        address = start + x // across * leading + k // 8 * stride + k % 8 * width + x % across * 2
    else:
        address = start + x // 8 * stride + x % 8 * width + k * 2
    address = address ^ (address >> 7 & (width // 16 - 1)) << 4
    owner = np.full(address.size, lane)
    return m.load("shared", address.ravel().astype(np.int64), owner, 1, np.uint16)[0].reshape(length, 16)


# -------------------- warps and control


def _together(m: Machine, mask: Callable[[Lanes], Any], act: Callable[[Array], None], pc_text: str) -> Step:
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
        whole = ~(wanted & ~here.reshape(-1, 32)).any(1)
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

    return _together(m, mask, act, i.text)


def _vote(m: Machine, i: Instruction) -> Step:
    read, mask, how = m.reader(i.operands[1], "pred"), m.reader(i.operands[2], "u32"), i.opcode[2]

    def act(lanes: Array) -> None:
        votes = np.zeros(m.lanes, np.bool_)
        votes[lanes] = np.broadcast_to(read(lanes), lanes.shape)
        taking = np.zeros(m.lanes, np.bool_)
        taking[lanes] = True
        by_warp = votes.reshape(-1, 32)
        if how == "ballot":
            result: Array = (by_warp * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(1).astype(np.uint32)
        elif how == "any":
            result = by_warp.any(1)
        elif how == "all":
            result = (by_warp | ~taking.reshape(-1, 32)).all(1)
        else:
            raise PtxError(f"no vote {how} in this machine")
        m.write(i.operands[0], lanes, result[lanes // 32])

    return _together(m, mask, act, i.text)


def _redux(m: Machine, i: Instruction) -> Step:
    read, mask, kind = m.reader(i.operands[1], _kind(i)), m.reader(i.operands[2], "u32"), TYPES[_kind(i)]
    f: Any = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}[i.opcode[2]]

    def act(lanes: Array) -> None:
        result = np.zeros(m.lanes, kind)
        values = np.broadcast_to(read(lanes), lanes.shape)
        for warp in np.unique(lanes // 32):
            result[warp * 32 : warp * 32 + 32] = f.reduce(values[lanes // 32 == warp])
        m.write(i.operands[0], lanes, result[lanes])

    return _together(m, mask, act, i.text)


def _bar(m: Machine, i: Instruction) -> Step:
    if i.opcode[1] == "warp":
        return _together(m, m.reader(i.operands[0], "u32"), lambda lanes: None, i.text)
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


def _nothing(m: Machine, i: Instruction) -> Step:
    return lambda a: None


_INSTRUCTIONS: dict[str, Callable[[Machine, Instruction], Step]] = {
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
    "cvt": _cvt,
    "setp": _setp,
    "testp": _testp,
    "selp": _selp,
    "mov": _mov,
    "cvta": _cvta,
    "ld": _ld,
    "ldu": _ld,
    "st": _st,
    "cp": _cp,
    "ldmatrix": _ldmatrix,
    "stmatrix": _stmatrix,
    "mma": _mma,
    "wgmma": _wgmma,
    "tcgen05": _tcgen05,
    "mbarrier": _mbarrier,
    "elect": _elect,
    "shfl": _shfl,
    "vote": _vote,
    "redux": _redux,
    "bar": _bar,
    "barrier": _bar,
    "bra": _bra,
    "ret": _ret,
    "exit": _ret,
    **dict.fromkeys(("membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "griddepcontrol", "createpolicy"), _nothing),
}
