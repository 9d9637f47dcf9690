"""The emulation that the CUDA sources are tested with finds each kind of fault, whatever order the threads run in."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpu_proof.cuda_on_cpu.build import build

THREADS, BLOCKS = 96, 3
SIZE, GUARD = THREADS * BLOCKS, 64

FAULTS = {
    "no_barrier_before_read": "reads byte . of of_warps, which (nobody has written|thread .+ has written with no barrier since)",
    "no_barrier_before_reuse": "writes byte . of of_warps, which another thread has read with no barrier since",
    "warp_exchange_without_syncwarp": "reads byte .+ of line, which (nobody has written|thread .+ has written with no barrier since)",
    "across_warps_with_syncwarp_only": "reads byte .+ of line, which (nobody has written|thread .+ has written with no barrier since)",
    "exit_before_barrier": "threads part: thread 0 waits at __syncthreads .*, thread 40 has exited",
    "two_barriers": "threads part: thread 0 waits at __syncthreads .*, thread 32 waits at __syncthreads",
    "lane_missing": "lane 7 of the mask has exited",
    "lane_at_a_barrier": "lane 7 of the mask waits at __syncthreads|threads part: thread 0 waits at __shfl_xor_sync .*, thread 7 waits",
    "lane_not_named": "reads a lane that is not in the mask of __shfl_sync",
    "shared_overrun": "writes an address, outside of every array of shared memory",
    "shared_unwritten": "reads byte 380 of line, which nobody has written",
    "global_race": "which thread .* has written with no barrier|which another thread has read with no barrier",
    "blocks_write_the_same": "which another block writes",
    "block_reads_what_another_writes": "which another block (reads|writes)",
    "global_overrun": "thread 95 of block .2, 0.: reads an address, outside of every tensor",
    "global_overwrite": "thread 95 of block .2, 0.: writes an address, outside of every tensor",
    "misaligned": "reads an address, not a multiple of 16",
    "order_of_threads": "has written with no barrier since",
}


@pytest.fixture(scope="module")
def run() -> Callable[[str, int], tuple[str, np.ndarray]]:
    """Runs a kernel on 0, 1, 2, ... with guards around its tensors: the message, empty where all went well, and what it wrote."""
    library = ctypes.CDLL(str(build("toy", [Path(__file__).parent / "toy_kernels.cpp"], [], [])))
    library.cuda_on_cpu_seed.argtypes = [ctypes.c_uint64]
    library.cuda_on_cpu_guard.argtypes = [ctypes.c_size_t] * 2
    library.toy_run.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_char_p]

    def run(name: str, seed: int) -> tuple[str, np.ndarray]:
        buffer = np.full(2 * SIZE + 3 * GUARD, np.nan, np.float32)
        source, result = GUARD, SIZE + 2 * GUARD
        buffer[source : source + SIZE] = np.arange(SIZE)
        address = [buffer.ctypes.data + 4 * i for i in (0, source, source + SIZE, result, result + SIZE, len(buffer))]
        message = ctypes.create_string_buffer(500)
        library.cuda_on_cpu_seed(seed)
        for begin, end in zip(address[::2], address[1::2], strict=True):
            library.cuda_on_cpu_guard(begin, end)
        library.toy_run(name.encode(), address[1], address[3], message)
        library.cuda_on_cpu_clear_guards()
        return message.value.decode(), buffer[result : result + SIZE]

    return run


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", FAULTS)
def test_finds(run: Callable[[str, int], tuple[str, np.ndarray]], name: str, seed: int) -> None:
    message, _ = run(name, seed)
    assert re.search(FAULTS[name], message), message


@pytest.mark.parametrize("seed", range(5))
def test_computes(run: Callable[[str, int], tuple[str, np.ndarray]], seed: int) -> None:
    """Block sums, shuffles past the warp's end, and an exchange within warps: right, whatever ran before and failed."""
    x = np.arange(SIZE, dtype=np.float32)
    run("exit_before_barrier", seed)
    message, out = run("sums", seed)
    assert message == ""
    np.testing.assert_array_equal(out, np.repeat(2 * x.reshape(BLOCKS, THREADS).sum(1), THREADS))

    message, out = run("shuffles", seed)
    assert message == ""
    votes = sum(1 << i for i in range(0, 32, 3)) & 0xFF
    np.testing.assert_array_equal(out[:32], np.where(np.arange(32) < 29, x[:32] + 3, x[:32]) + votes)
    assert np.isnan(out[32:]).all()

    message, out = run("warp_exchange", seed)
    assert message == ""
    np.testing.assert_array_equal(out, np.tile(np.arange(THREADS) ^ 1, BLOCKS))
