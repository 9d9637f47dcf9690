"""Products of matrices by the tensor cores of three generations: mma, wgmma, tcgen05 with the barriers that it completes."""

from __future__ import annotations

import numpy as np

from gpu_proof.ptx.machine import Lanes, Machine
from gpu_proof.ptx.memory import Array
from gpu_proof.ptx.program import Instruction, PtxError
from gpu_proof.ptx.steps import Build, Step, elements, float_of_bf16, nothing, whole_warps


def _mma(m: Machine, i: Instruction) -> Step:
    """mma.sync.m16n8k16 of bf16 or f16 with float32 sums."""
    if i.opcode[:4] != ("mma", "sync", "aligned", "m16n8k16") or i.opcode[6] != "f32" or i.opcode[7] not in ("bf16", "f16"):
        raise PtxError(f"no {i.text!r} in this machine")
    out = elements(i.operands[0])
    a_regs, b_regs = (elements(o) for o in i.operands[1:3])
    c_readers = [m.reader(o, "f32") for o in elements(i.operands[3])]
    half = float_of_bf16 if i.opcode[7] == "bf16" else (lambda bits: bits.view(np.float16).astype(np.float32))
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
        lanes = whole_warps(m, a)
        product = fragment(a_regs, lanes, (16, 16), a_places) @ fragment(b_regs, lanes, (16, 8), b_places)
        for name, read, (row, column) in zip(out, [r(lanes) for r in c_readers], c_places, strict=True):
            c = np.broadcast_to(read, lanes.shape).reshape(-1, 32)
            m.write(name, lanes, (product[:, row, column] + c).astype(np.float32).ravel())

    return step


def _wgmma(m: Machine, i: Instruction) -> Step:
    """wgmma.mma_async.m64nNk16 of bf16 or f16 with float32 sums, where it is issued; factors from shared memory, A also from registers."""
    if i.opcode[1] != "mma_async":
        return nothing(m, i)
    shape = i.opcode[4]
    if i.opcode[5] != "f32" or i.opcode[6] not in ("bf16", "f16") or not shape.startswith("m64n") or not shape.endswith("k16"):
        raise PtxError(f"no {i.text!r} in this machine")
    columns = int(shape[4:-3])
    half = float_of_bf16 if i.opcode[6] == "bf16" else (lambda bits: bits.view(np.float16).astype(np.float32))
    out, a_regs = elements(i.operands[0]), elements(i.operands[1])
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
        return nothing(m, i)
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
        lanes = whole_warps(m, a)
        address = where(lanes)
        row, column = address >> 16, address & 0xFFFF
        if (row != m.special["%tid.x"][lanes] // 32 % 4 * 32 + np.where(halves, row % 32, 0)).any():
            raise PtxError("a warp outside its lanes of tensor memory")
        row = row + (m.laneid[lanes] % 16 if halves else m.laneid[lanes])
        column = column + np.where(m.laneid[lanes] < 16, 0, split)
        for n, name in enumerate(elements(registers)):
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
                factors.append((float_of_bf16(bits) if kind else bits.view(np.float16)).astype(float))
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
        return nothing(m, i)
    if i.opcode[1:3] == ("try_wait", "parity"):
        where, _ = m.address(i.operands[1])
        parity = m.reader(i.operands[2], "u32")
        return lambda a: m.write(i.operands[0], a, (m.phases(a, where(a)) & 1) != parity(a))
    raise PtxError(f"no {i.text!r} in this machine")


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


INSTRUCTIONS: dict[str, Build] = {
    "mma": _mma,
    "wgmma": _wgmma,
    "tcgen05": _tcgen05,
    "mbarrier": _mbarrier,
}
