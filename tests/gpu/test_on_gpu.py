"""The operators on a GPU: every case of every `cases_*.py` with every form that runs there, and what only a device can show.

`python -m pytest -m gpu tests/gpu/test_on_gpu.py`; the large cases take some minutes and up to 12 GB, and are left out with less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import cases
import pytest
import torch
from conformance import assert_same_bits
from torch import Tensor

from reinforce_ada import ops
from reinforce_ada.ops import _dispatch
from reinforce_ada.types import PoolStats

NO_GPU = None if torch.cuda.is_available() else "torch finds no GPU"
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
GPU_BACKENDS = ("cuda", "triton")


def missing(op: str, backend: str) -> str | None:
    """Why a form cannot run on a GPU here."""
    form = _dispatch.forms(op)[backend]
    return form.missing() or (None if form.devices is None or "cuda" in form.devices else "it takes tensors on the CPU here")


def forms(op: str) -> list[str]:
    """Those that are made for GPUs."""
    return [backend for backend in GPU_BACKENDS if backend in _dispatch.forms(op)]


def parameter(op: str, backend: str, *values: Any, name: str = "") -> Any:
    reason = missing(op, backend)
    marks = [] if reason is None else [pytest.mark.skip(reason=f"{op}, {backend}: {reason}")]
    return pytest.param(*values, backend, id="-".join(filter(None, (op, name, backend))), marks=[*on_a_gpu, *marks])


def every_case() -> Iterator[Any]:
    if NO_GPU:
        yield pytest.param(None, "", id="every case", marks=on_a_gpu)  # one skip says it
        return
    for file in sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py")):
        op = cases.operator_of(file)
        for backend in forms(op):
            yield from (parameter(op, backend, case, name=case.name) for case in import_module(file).CASES)


@pytest.mark.parametrize(("case", "backend"), list(every_case()))
def test_case(case: cases.Case, backend: str) -> None:
    try:
        cases.run(case, backend, "cuda")
    except torch.OutOfMemoryError as e:
        if not case.large:
            raise
        pytest.skip(f"needs more memory: {e}")
    finally:
        torch.cuda.empty_cache()


# -------------------- one call of each operator, forward and backward


class Call(NamedTuple):
    """An operator with its inputs: `run` reads `inputs` where they lie and returns results and gradients."""

    inputs: list[Tensor]  # floating, what a step changes
    run: Callable[[str], list[Tensor]]


def token_logprobs(device: str) -> Call:
    logits, ids = torch.randn(5, 1003, device=device), torch.tensor([3, -100, 1002, 0, 7], device=device)

    def run(backend: str) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        out = ops.token_logprobs(leaf, ids, temperature=0.7, entropy=True, sum_p2=True, backend=backend)
        assert out.entropy is not None
        assert out.sum_p2 is not None
        return [*(x.detach() for x in (*out,)), *torch.autograd.grad((out.logprobs + out.entropy).sum(), leaf)]

    return Call([logits], run)


def linear_token_logprobs(device: str) -> Call:
    hidden, weight, bias = (torch.randn(size, device=device) for size in ((40, 64), (1003, 64), (1003,)))
    ids = torch.randint(1003, (40,), device=device)

    def run(backend: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        out = ops.linear_token_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], temperature=4.0, entropy=True, backend=backend)
        assert out.entropy is not None
        grads = torch.autograd.grad((out.logprobs + out.entropy).sum(), leaves)
        return [out.logprobs.detach(), out.entropy.detach(), *grads]

    return Call([hidden, weight, bias], run)


def group_advantages(device: str) -> Call:
    rewards, group_of = torch.randn(1000, device=device), torch.randint(50, (1000,), device=device)
    pool = PoolStats(*(torch.rand(50, dtype=torch.float64, device=device) for _ in range(5)))
    pool = pool._replace(count=torch.full_like(pool.count, 8), min=-1 - pool.min, max=1 + pool.max)

    def run(backend: str) -> list[Tensor]:
        return [
            ops.group_advantages(rewards, group_of, pool=pool, scale="pool", backend=backend),
            ops.group_advantages(rewards, group_of, pool=pool, baseline="group", scale="batch", backend=backend),
        ]

    return Call([rewards], run)


def _packed(device: str) -> dict[str, Any]:
    lengths = [400, 1, 0, 299]
    num_tokens = sum(lengths)
    return {
        "advantages": torch.randn(len(lengths), device=device),
        "mask": torch.arange(num_tokens, device=device) % 3 != 0,
        "old_logprobs": -torch.rand(num_tokens, device=device),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(device),
    }


def policy_loss(device: str) -> Call:
    given = _packed(device)
    logprobs = given["old_logprobs"] + 0.2 * torch.randn(700, device=device)

    def run(backend: str) -> list[Tensor]:
        leaf = logprobs.detach().requires_grad_()
        loss, metrics = ops.policy_loss(leaf, **given, backend=backend)
        return [loss.detach(), *metrics.values(), *torch.autograd.grad(loss, leaf)]

    return Call([logprobs], run)


def linear_policy_loss(device: str) -> Call:
    given = _packed(device)
    hidden, weight = torch.randn(700, 32, device=device), torch.randn(203, 32, device=device) / 6
    ids = torch.randint(203, (700,), device=device)

    def run(backend: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss, metrics = ops.linear_policy_loss(*leaves, ids, **given, entropy_coef=0.1, backend=backend)
        return [loss.detach(), *metrics.values(), *torch.autograd.grad(loss, leaves)]

    return Call([hidden, weight], run)


CALLS: Mapping[str, Callable[[str], Call]] = {
    "token_logprobs": token_logprobs,
    "linear_token_logprobs": linear_token_logprobs,
    "group_advantages": group_advantages,
    "policy_loss": policy_loss,
    "linear_policy_loss": linear_policy_loss,
}
every_form = pytest.mark.parametrize(("op", "backend"), [parameter(op, backend, op) for op in CALLS for backend in forms(op)])


@pytest.mark.parametrize("op", CALLS)
def test_the_calls_are_the_same_for_every_form(op: str) -> None:
    """Without a GPU too: on the CPU, where the reference and what is fastest there agree."""
    call = CALLS[op]("cpu")
    for a, b in zip(call.run("reference"), call.run("auto"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_operator_has_a_call() -> None:
    assert set(CALLS) == set(_dispatch.table())


# -------------------- what only a device can show


def change(call: Call) -> None:
    """Other values in the same memory."""
    for x in call.inputs:
        x.copy_(torch.randn_like(x) * 0.3)


@every_form
def test_no_call_waits_for_the_device(op: str, backend: str) -> None:
    call = CALLS[op]("cuda")
    call.run(backend)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_form
def test_a_graph_of_it_replays(op: str, backend: str) -> None:
    """Captured once, then run on other values in the same memory: the bits of an eager call."""
    call = CALLS[op]("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run(backend)  # compiles, which a capture could not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run(backend)
    for _ in range(2):
        change(call)
        graph.replay()
        assert_same_bits([x.clone() for x in captured], call.run(backend))


@every_form
def test_the_current_stream_is_used(op: str, backend: str) -> None:
    """On a stream that is held up, inputs arrive late; a launch on any other stream would read what was there before."""
    call = CALLS[op]("cuda")
    before = call.run(backend)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # of the device's clock, 50 ms and more
        torch.manual_seed(1)
        change(call)
        late = call.run(backend)
    side.synchronize()
    assert_same_bits(late, call.run(backend))
    assert not all(torch.equal(a, b) for a, b in zip(before, late, strict=True))


@every_form
def test_a_device_that_is_not_the_current_one(op: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    torch.manual_seed(0)
    here = CALLS[op]("cuda:0")
    there = CALLS[op]("cuda:1")
    for a, b in zip(here.inputs, there.inputs, strict=True):
        b.copy_(a)
    assert torch.cuda.current_device() == 0
    results = there.run(backend)
    assert {x.device.index for x in results} == {1}
    assert all(x.isfinite().all() for x in results)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(("op", "backend"), [parameter("token_logprobs", b, "token_logprobs") for b in forms("token_logprobs")])
def test_more_logits_than_int32_counts(op: str, backend: str) -> None:
    """14,200 rows of 151,936 are 2.16e9 logits, 4.3 GB in bf16: the last rows are scored as they are alone, in place and all."""
    num_tokens, vocab = 14_200, 151_936
    try:
        logits = torch.empty(num_tokens, vocab, dtype=torch.bfloat16, device="cuda").normal_()
    except torch.OutOfMemoryError as e:
        pytest.skip(f"needs more memory: {e}")
    assert logits.numel() > 2**31
    ids = torch.randint(vocab, (num_tokens,), device="cuda")
    last = slice(-3, None)
    alone = logits[last].clone().requires_grad_()
    want = ops.token_logprobs(alone, ids[last], entropy=True, backend=backend)
    (want_grad,) = torch.autograd.grad((want.logprobs + want.entropy).sum(), alone)
    leaf = logits.detach().requires_grad_()
    out = ops.token_logprobs(leaf, ids, entropy=True, grad_out=logits.detach(), backend=backend)
    assert out.entropy is not None
    (out.logprobs + out.entropy).sum().backward()
    assert_same_bits([out.logprobs[last].detach(), out.entropy[last].detach(), logits[last]], [*(x.detach() for x in want[:2]), want_grad])


@pytest.mark.parametrize(("op", "backend"), [parameter("linear_token_logprobs", b, "linear") for b in forms("linear_token_logprobs")])
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
def test_the_head_of_a_real_model(op: str, backend: str, dtype: torch.dtype) -> None:
    """T=1024, D=896, V=151936, against the reference in float64, chunk by chunk, and no worse than plain PyTorch on the same GPU."""
    num_tokens, width, vocab = 1024, 896, 151_936
    hidden = torch.randn(num_tokens, width, device="cuda").to(dtype)
    weight = (torch.randn(vocab, width, device="cuda") * 3 / math.sqrt(width)).to(dtype)
    ids = torch.randint(vocab, (num_tokens,), device="cuda")

    def results(to: torch.dtype, form: str) -> list[Tensor]:
        leaves = [x.to(to).requires_grad_() for x in (hidden, weight)]
        out = ops.linear_token_logprobs(*leaves, ids, entropy=True, max_extra_bytes=2_000_000_000, backend=form)
        assert out.entropy is not None
        grads = torch.autograd.grad((out.logprobs + out.entropy).sum(), leaves)
        return [out.logprobs.detach(), out.entropy.detach(), *grads]

    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        actual, truth, plain = results(dtype, backend), results(torch.float64, "reference"), results(dtype, "reference")
    except torch.OutOfMemoryError as e:
        pytest.skip(f"needs more memory: {e}")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    for name, a, t, p in zip(("logprobs", "entropy", "hidden", "weight"), actual, truth, plain, strict=True):
        error, allowed = ((x.double() - t).abs().max().item() for x in (a, p))
        step = torch.finfo(a.dtype).eps / 2 * t.abs().max().item()
        assert error <= allowed + 2e-6 + (step if name in ("hidden", "weight") else 0), f"{name}: off by {error:.2e}, plain {allowed:.2e}"
