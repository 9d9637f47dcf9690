"""Runs compiled PTX on the CPU: all threads of many blocks at once, one numpy operation an instruction.

Every access is checked: outside every buffer, across its end, not aligned to its width, global memory that another block of the launch
has written: each is a `PtxError` with the instruction. Shared memory and registers are NaN until they are written. Threads that went
different ways meet again at the smallest program counter; a barrier waits for every thread of the block that has not left; shuffles and
votes wait for the lanes in their mask. Copies by cp.async become visible when they are waited for and no earlier.

What it is not: it has no memory model (writes are seen in program order), no timing, and rounds an fma twice where float64 does not
hold the product (fp64 only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_proof.ptx.memory import Array, Memory
from gpu_proof.ptx.program import Instruction, Program, PtxError

Lanes = Any  # indices of the active threads, or a slice of all of them
_ALL = slice(None)
_MOST_INSTRUCTIONS = 3_000_000
_WIDTH = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}
_RAW = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{k}{w}": np.dtype(f"{'i' if k == 's' else 'u'}{w // 8}").type for k in "sub" for w in (8, 16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


class Machine:
    def __init__(
        self,
        compiled: Callable[[Machine, Instruction], Callable[[Lanes], Any]],
        program: Program,
        blocks: Array,
        first: int,
        grid: tuple[int, int, int],
        threads: int,
        arguments: bytes,
        memory: Memory,
    ) -> None:
        assert threads % 32 == 0, "blocks are of whole warps"
        self.compiled, self.program, self.memory, self.arguments = compiled, program, memory, arguments
        self.lanes = len(blocks) * threads
        self.threads = threads
        lane = np.arange(self.lanes, dtype=np.uint32)
        self.block = lane // threads
        self.number = (self.block + np.uint32(first)).astype(np.int32)  # of the block in the launch
        tid = lane % threads
        self.laneid = tid % 32
        self.special = {"%tid.x": tid, "%laneid": self.laneid, "%warpid": tid // 32, "%ntid.x": np.full_like(tid, threads)}
        for axis, letter in enumerate("xyz"):
            self.special[f"%ctaid.{letter}"] = blocks[self.block, axis].astype(np.uint32)
            self.special[f"%nctaid.{letter}"] = np.full_like(tid, grid[axis])
            if axis:
                self.special[f"%tid.{letter}"] = np.zeros_like(tid)
                self.special[f"%ntid.{letter}"] = np.ones_like(tid)
        self.shared_bytes = -(-program.shared_bytes // 16) * 16
        self.shared = np.full(len(blocks) * self.shared_bytes, 0xFF, np.uint8)  # NaN in every type
        self.copies: list[list[tuple[Array, Array]]] = [[]]  # groups of cp.async that have not been waited for
        blackwell = any(i.opcode[0] == "tcgen05" for i in program.instructions)
        self.tensor_memory = np.full((len(blocks), 128, 512) if blackwell else 0, ~np.uint32(0))
        self.barriers: dict[tuple[int, int], int] = {}  # (block, address) -> phases that are complete
        self.registers: dict[str, Array] = {}
        self.alive = np.ones(self.lanes, np.bool_)
        self.steps = [_compile(self, i) for i in program.instructions]

    # -------------------- which threads run

    def run(self) -> int:
        """Until every thread has left; the number of instructions issued."""
        ready: dict[int, Array] = {0: np.arange(self.lanes)}
        self.at_barrier: list[tuple[int, Array]] = []
        stuck: dict[int, Array] = {}  # at a shuffle or vote whose lanes have not all come
        issued = 0
        while ready or stuck:
            if not ready:
                pc = min(stuck)
                raise PtxError(f"{self._where(pc)}: lanes of the mask never come")
            pc = min(ready)
            lanes = ready.pop(pc)
            while True:
                step = self.steps[pc]
                issued += 1
                if issued > _MOST_INSTRUCTIONS:
                    raise PtxError(f"{self._where(pc)}: no end after {issued} instructions")
                active: Lanes = _ALL if len(lanes) == self.lanes else lanes
                try:
                    outcome = step(active)
                except PtxError as error:
                    raise PtxError(f"{self._where(pc)}: {error}") from None
                if outcome is None:
                    pc += 1
                    if pc in ready or pc in stuck:
                        _join(ready, pc, lanes)
                        break
                    continue
                for target, some in outcome(self, pc, lanes, stuck):
                    _join(ready, target, some)
                break
            for target in [t for t in stuck if t in ready]:  # new lanes at the same place: try again together
                _join(ready, target, stuck.pop(target))
        if self.at_barrier:
            raise PtxError(f"{self.program.name}: threads wait at a barrier that others of their block never reach")
        return issued

    def _where(self, pc: int) -> str:
        return f"{self.program.name}: {self.program.instructions[pc].text}"

    # -------------------- registers and operands

    def register(self, name: str) -> Array:
        found = self.registers.get(name)
        if found is None:
            kind = self.program.registers.get(name) or self.program.registers.get(name.rstrip("0123456789"))
            if kind is None:
                raise PtxError(f"{self.program.name}: no register {name}")
            width = _WIDTH.get(kind) or int(kind[1:])
            # What was never written is poison: NaN as a float, far outside as an address.
            found = self.registers[name] = np.full(self.lanes, ~_RAW[width](0), _RAW[width])
        return found

    def reader(self, operand: str, kind: str) -> Callable[[Lanes], Any]:
        """How to read an operand as `kind`."""
        dtype = TYPES[kind]
        if operand in self.special:
            values = self.special[operand].astype(dtype)
            return lambda a: values[a]
        if operand.startswith("!"):
            inner = self.reader(operand[1:], kind)
            return lambda a: ~inner(a)
        if operand[0] == "%" or self.program.registers.get(operand):
            register = self.register(operand)
            return lambda a: _as(register[a], dtype)
        constant = self._constant(operand, dtype)
        return lambda a: constant

    def _constant(self, text: str, dtype: Any) -> Any:
        if text in self.program.shared:
            return dtype(self.program.shared[text][0])
        if text in self.memory.constants:
            return dtype(self.memory.constants[text])
        if text[:2] in ("0f", "0F") and len(text) == 10:
            return np.array([int(text[2:], 16)], np.uint32).view(np.float32).astype(dtype if dtype is np.float64 else np.float32)[0]
        if text[:2] in ("0d", "0D") and len(text) == 18:
            return np.array([int(text[2:], 16)], np.uint64).view(np.float64)[0]
        value = int(text.rstrip("U"), 0)
        width = np.dtype(dtype).itemsize * 8
        if dtype is np.bool_:
            return np.bool_(value)
        return np.array([value & ((1 << width) - 1)], f"u{width // 8}").view(dtype)[0]

    def write(self, name: str, a: Lanes, values: Any) -> None:
        """Into a register, which may be wider: signed values keep their sign."""
        if name == "_":
            return
        register = self.register(name)
        values = np.asarray(values)
        if values.dtype.itemsize != register.dtype.itemsize:
            values = values.astype(np.dtype(f"{'i' if values.dtype.kind == 'i' else 'u'}{register.dtype.itemsize}"))
        register[a] = values.view(register.dtype) if values.dtype != register.dtype else values

    # -------------------- barriers that count

    def reset(self, a: Lanes, addresses: Array) -> None:
        for key in self._barriers(a, addresses):
            self.barriers[key] = 0

    def complete(self, a: Lanes, addresses: Array) -> None:
        for key in self._barriers(a, addresses):
            self.barriers[key] += 1

    def phases(self, a: Lanes, addresses: Array) -> Array:
        return np.array([self.barriers[key] for key in self._barriers(a, addresses)])

    def _barriers(self, a: Lanes, addresses: Array) -> list[tuple[int, int]]:
        return list(zip(self.block[a].tolist(), addresses.tolist(), strict=True))

    # -------------------- memory

    def address(self, operand: str) -> tuple[Callable[[Lanes], Array], str]:
        """How to compute `[base + offset]`, and the base."""
        base, _, offset = operand.strip("[] ").partition("+")
        base = base.strip()
        shift = int(offset, 0) if offset.strip() else 0
        if base.startswith("%"):
            register = self.register(base)
            return lambda a: register[a].astype(np.int64) + shift, base
        start = int(self._constant(base, np.uint64)) + shift
        return lambda a: np.full(len(self.block[a]), start, np.int64), base

    def in_shared(self, addresses: Array, a: Lanes, size: int) -> Array:
        """Offsets of accesses of `size` bytes to shared memory, checked."""
        _check_alignment(addresses, size)
        if ((addresses < 0) | (addresses + size > self.program.shared_bytes)).any():
            raise PtxError("outside shared memory")
        return addresses + self.block[a].astype(np.int64) * self.shared_bytes

    def load(self, space: str, addresses: Array, a: Lanes, count: int, dtype: Any) -> list[Array]:
        """`count` neighbours of `dtype` at each address."""
        width = np.dtype(dtype).itemsize
        if space == "shared":
            offsets = self.in_shared(addresses, a, width * count)
            raw = self.shared.view(f"u{width}")
            return [raw[offsets // width + i].view(dtype) for i in range(count)]
        _check_alignment(addresses, width * count)
        out = [np.empty(len(addresses), f"u{width}") for _ in range(count)]
        number = self.number[a]
        for buffer, which, offsets in self.memory.parts(addresses, width * count):
            if buffer.writer is not None:
                writer = buffer.writer[offsets]
                if ((writer >= 0) & (writer != number[which])).any():
                    raise PtxError("reads what another block of this launch has written")
            for i in range(count):
                out[i][which] = buffer.of_width(width)[offsets // width + i]
        return [values.view(dtype) for values in out]

    def store(self, space: str, addresses: Array, a: Lanes, values: Sequence[Array], width: int) -> None:
        """The `values` next to each other at each address."""
        if space == "shared":
            offsets = self.in_shared(addresses, a, width * len(values))
            raw = self.shared.view(f"u{width}")
            for i, value in enumerate(values):
                raw[offsets // width + i] = value
            return
        _check_alignment(addresses, width * len(values))
        number = self.number[a]
        for buffer, which, offsets in self.memory.parts(addresses, width * len(values)):
            if buffer.writer is not None:
                self._sign(buffer.writer, offsets, number[which], width, len(values))
            for i, value in enumerate(values):
                buffer.of_width(width)[offsets // width + i] = value[which]

    def _sign(self, writers: Array, offsets: Array, number: Array, width: int, count: int) -> None:
        before = writers[offsets]
        if ((before >= 0) & (before != number)).any():
            raise PtxError("writes what another block of this launch has written")
        for i in range(0, width * count, width):
            writers[offsets + i] = number
        if (writers[offsets] != number).any():
            raise PtxError("another block of this launch writes the same place")


def _check_alignment(addresses: Array, size: int) -> None:
    if (addresses % size).any():
        raise PtxError(f"address {addresses[(addresses % size) != 0][0]:#x} is not aligned to {size} bytes")


def _as(values: Array, dtype: Any) -> Array:
    """Raw register content as `dtype`: narrower takes the low bits."""
    if dtype is np.bool_:
        return values if values.dtype == np.bool_ else values != 0
    width = np.dtype(dtype).itemsize
    if values.dtype.itemsize != width:
        values = values.astype(f"u{width}")
    return values.view(dtype)


def _join(groups: dict[int, Array], pc: int, lanes: Array) -> None:
    if len(lanes):
        groups[pc] = np.sort(np.concatenate([groups[pc], lanes])) if pc in groups else lanes


# -------------------- what an instruction may do to the threads: a list of (program counter, lanes)


def leave(m: Machine, pc: int, lanes: Array, stuck: dict[int, Array]) -> list[tuple[int, Array]]:
    m.alive[lanes] = False
    return _released(m)


def wait(m: Machine, pc: int, lanes: Array, stuck: dict[int, Array]) -> list[tuple[int, Array]]:
    m.at_barrier.append((pc, lanes))
    return _released(m)


def _released(m: Machine) -> list[tuple[int, Array]]:
    """The threads of blocks of which nobody is missing at the barrier any more."""
    if not m.at_barrier:
        return []
    waiting = np.full(m.lanes, -1)
    for pc, lanes in m.at_barrier:
        waiting[lanes] = pc
    missing = np.bincount(m.block[m.alive & (waiting < 0)], minlength=int(m.block[-1]) + 1) > 0
    out, left = [], []
    for pc, lanes in m.at_barrier:
        stay = missing[m.block[lanes]]
        out.append((pc + 1, lanes[~stay]))
        if stay.any():
            left.append((pc, lanes[stay]))
    places = {pc for pc, lanes in out if len(lanes)}
    for block in np.unique(np.concatenate([m.block[lanes] for _, lanes in out])) if len(places) > 1 else ():
        if len({pc for pc, lanes in out if (m.block[lanes] == block).any()}) > 1:
            raise PtxError(f"{m.program.name}: threads of one block wait at different barriers")
    m.at_barrier = left
    return [(pc, lanes) for pc, lanes in out if len(lanes)]


def _compile(m: Machine, i: Instruction) -> Callable[[Lanes], Any]:
    """The instruction as a function of the active threads; it returns None, or what becomes of the threads."""
    body = m.compiled(m, i)
    if i.predicate is None:
        return body
    predicate, wanted = m.register(i.predicate), not i.negated
    if i.opcode[0] in ("bra", "ret", "exit", "bar", "barrier"):
        return _conditional(i, body, predicate, wanted)

    def predicated(a: Lanes) -> Any:
        some = np.flatnonzero(predicate[a] == wanted)
        if len(some) == 0:
            return None
        return body(some if isinstance(a, slice) else a[some])

    return predicated


def _conditional(i: Instruction, body: Callable[[Lanes], Any], predicate: Array, wanted: bool) -> Callable[[Lanes], Any]:
    def split(a: Lanes) -> Any:
        taken = predicate[a] == wanted
        if not taken.any():
            return None

        def outcome(m: Machine, pc: int, lanes: Array, stuck: dict[int, Array]) -> list[tuple[int, Array]]:
            went = body(lanes[taken])(m, pc, lanes[taken], stuck)
            return [*went, (pc + 1, lanes[~taken])]

        return outcome

    return split
