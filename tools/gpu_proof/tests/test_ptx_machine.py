"""The PTX machine itself: what it computes, and that it refuses what a GPU would not forgive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gpu_proof.ptx.memory import Buffer, Memory
from gpu_proof.ptx.program import PtxError, parse
from gpu_proof.ptx.run import run

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 k_x, .param .u64 k_y, .param .u32 k_n)
{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %d<20>; .reg .f64 %g<9>;
    .shared .align 16 .b8 tile[256];
    ld.param.u64 %d1, [k_x]; ld.param.u64 %d2, [k_y]; ld.param.u32 %r1, [k_n];
    mov.u32 %r2, %tid.x; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ntid.x;
    mad.lo.s32 %r5, %r3, %r4, %r2;
    mul.wide.u32 %d3, %r5, 4; add.s64 %d4, %d1, %d3; add.s64 %d5, %d2, %d3;
    shl.b32 %r6, %r2, 2;
"""


def kernel(body: str, x: Any, y: Any, n: int = 0, *, blocks: int = 1, threads: int = 32) -> None:
    """Runs `body` with %d4 and %d5 pointing at the thread's own element of x and y; y is changed."""
    program = parse(HEAD + body + "\n ret;\n}")
    memory = Memory([Buffer(array.view(np.uint8)) for array in (x, y)], {})
    arguments = b"".join(array.ctypes.data.to_bytes(8, "little") for array in (x, y)) + n.to_bytes(4, "little")
    with np.errstate(all="ignore"):
        run(program, (blocks, 1, 1), threads, arguments, memory)


def floats(count: int = 32) -> Any:
    return np.linspace(-3, 3, count, dtype=np.float32)


def result(body: str, x: Any, **how: Any) -> Any:
    y = np.full_like(x, 77)
    kernel(body, x, y, **how)
    return y


def test_arithmetic_of_every_thread() -> None:
    x = floats(96)
    y = result("ld.global.f32 %f1, [%d4]; fma.rn.f32 %f2, %f1, %f1, 0f3F800000; st.global.f32 [%d5], %f2;", x, blocks=3)
    assert np.array_equal(y, (x.astype(np.float64) ** 2 + 1).astype(np.float32))


def test_threads_that_went_different_ways_meet_again() -> None:
    body = """
        ld.global.f32 %f1, [%d4]; setp.lt.f32 %p1, %f1, 0f00000000;
        @%p1 bra NEGATIVE;
        mul.f32 %f1, %f1, 0f40000000; bra.uni DONE;
      NEGATIVE: neg.f32 %f1, %f1;
      DONE: shfl.sync.bfly.b32 %r10|%p2, %f1, 1, 31, -1; st.global.b32 [%d5], %r10;
    """
    x = floats()
    assert np.array_equal(result(body, x), np.where(x < 0, -x, 2 * x).reshape(-1, 2)[:, ::-1].ravel())


def test_a_loop_runs_as_often_as_each_thread_says() -> None:
    body = """
        mov.u32 %r10, 0; mov.u32 %r11, %r2;
      AGAIN: setp.eq.u32 %p1, %r11, 0; @%p1 bra OUT; add.u32 %r10, %r10, %r11; sub.u32 %r11, %r11, 1; bra AGAIN;
      OUT: st.global.u32 [%d5], %r10;
    """
    n = np.arange(32, dtype=np.uint32)
    assert np.array_equal(result(body, n), n * (n + 1) // 2)


def test_shared_memory_after_a_barrier() -> None:
    body = """
        ld.global.f32 %f1, [%d4]; mov.u32 %r10, tile; add.u32 %r11, %r10, %r6; st.shared.f32 [%r11], %f1;
        bar.sync 0;
        sub.u32 %r12, 252, %r6; add.u32 %r12, %r12, %r10; ld.shared.f32 %f2, [%r12]; st.global.f32 [%d5], %f2;
    """
    x = floats(128)
    assert np.array_equal(result(body, x, threads=64, blocks=2), x.reshape(2, 64)[:, ::-1].ravel())


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    x = np.array([1.0, 1.00390625, 1.01171875, np.nan] * 8, np.float32)
    body = "ld.global.f32 %f1, [%d4]; cvt.rn.bf16.f32 %h1, %f1; cvt.f32.bf16 %f2, %h1; st.global.f32 [%d5], %f2;"
    assert np.array_equal(result(body, x), np.array([1.0, 1.0, 1.015625, np.nan] * 8, np.float32), equal_nan=True)


def test_ballot_and_funnel_shift() -> None:
    body = """
        setp.gt.u32 %p1, %r2, 15; vote.sync.ballot.b32 %r10, %p1, -1; shf.r.wrap.b32 %r11, %r10, %r10, 8;
        st.global.u32 [%d5], %r11;
    """
    assert set(result(body, np.zeros(32, np.uint32)).tolist()) == {0x00FFFF00}


REFUSED = {
    "a read past the end": ("ld.global.f32 %f1, [%d4+128];", "in no buffer"),
    "a read before the start": ("ld.global.f32 %f1, [%d4+-128];", "in no buffer"),
    "a vector that is not aligned": ("ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%d4];", "not aligned to 16"),
    "an address of 32 bits": ("cvt.u32.u64 %r10, %d4; cvt.u64.u32 %d6, %r10; ld.global.f32 %f1, [%d6];", "in no buffer"),
    "a register nobody wrote, as an address": ("ld.global.u8 %h1, [%d9];", "in no buffer"),
    "outside shared memory": ("mov.u32 %r10, tile; st.shared.f32 [%r10+256], %f1;", "outside shared memory"),
    "a shuffle that half the warp never reaches": (
        "setp.lt.u32 %p1, %r2, 16; @%p1 bra THERE; HERE: bra HERE2; HERE2: shfl.sync.idx.b32 %r10, %r2, 0, 31, 0xFFFFFFFF; bra END;"
        "THERE: bar.sync 0; END:",
        "never come|barrier",
    ),
    "a barrier in one branch": (
        "setp.lt.u32 %p1, %r2, 16; @%p1 bra THERE; bar.sync 0; bra END; THERE: bar.sync 0; END:",
        "different barriers",
    ),
    "a lane outside its own mask": ("shfl.sync.idx.b32 %r10, %r2, 0, 31, 1;", "own mask"),
    "local memory": ("st.local.f32 [%r10], %f1;", "local memory"),
    "an instruction that is not known": ("sin.approx.f32 %f1, %f2;", "no sin"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what: str) -> None:
    body, words = REFUSED[what]
    with pytest.raises(PtxError, match=words):
        result(body, floats())


def test_shared_memory_is_not_a_number_until_it_is_written() -> None:
    assert np.isnan(result("mov.u32 %r10, tile; ld.shared.f32 %f1, [%r10]; st.global.f32 [%d5], %f1;", floats())).all()


def test_blocks_may_not_meet_in_memory() -> None:
    same_place = "mov.u32 %r10, 1; st.global.u32 [%d2], %r10;"
    with pytest.raises(PtxError, match="another block"):
        result("setp.ne.u32 %p1, %r2, 0; @%p1 bra END; " + same_place + "END:", np.zeros(64, np.uint32), blocks=2)
    with pytest.raises(PtxError, match="another block"):
        result("st.global.u32 [%d5], %r5; ld.global.u32 %r10, [%d2];", np.zeros(64, np.uint32), blocks=2)


def test_copies_appear_when_they_are_waited_for() -> None:
    start = """
        mov.u32 %r10, tile; shl.b32 %r11, %r2, 3; add.u32 %r11, %r11, %r10; mul.wide.u32 %d6, %r2, 8; add.s64 %d6, %d1, %d6;
        cp.async.ca.shared.global [%r11], [%d6], 8; cp.async.commit_group;
    """
    finish = "bar.sync 0; add.u32 %r12, %r10, %r6; ld.shared.f32 %f1, [%r12]; st.global.f32 [%d5], %f1;"
    x = floats(64)
    assert np.array_equal(result(start + "cp.async.wait_group 0;" + finish, x)[:32], x[:32])
    assert np.isnan(result(start + "cp.async.wait_group 1;" + finish, x)[:32]).all()
