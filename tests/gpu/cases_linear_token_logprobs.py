"""linear_token_logprobs on a GPU: what every form of it is held to."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch
from cases import assert_repeatable, each, inside
from conformance import Peak, assert_no_worse, assert_one_derivative, assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reinforce_ada.ops import _torch, linear_token_logprobs
from reinforce_ada.ops._dispatch import operator

NAMES = ("logprobs", "entropy", "sum_p2", "hidden", "weight", "bias")
INF, NAN = math.inf, math.nan
# T, D, V: one, less than a tile, exactly, one past it, several tiles and splits of the vocabulary; rows at 16 bytes or anywhere.
SHAPES = [(0, 3, 5), (1, 1, 1), (1, 33, 2), (4, 7, 17), (33, 16, 32), (32, 32, 31), (31, 48, 33), (70, 49, 131), (3, 8, 1203)]
LARGE = [(3, 8, 30_001), (1, 64, 151_936), (300, 256, 32_003), (1000, 130, 1003), (129, 1024, 4096)]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "gemma": {"soft_cap": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "negative": {"logit_scale": -1.3},
    "everything": {"bias": True, "soft_cap": 3.0, "logit_scale": 0.5, "temperature": 0.7},
    "per-token": {"temperature": "per token", "bias": True},
}


def make(num_tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and ids, with logits of a spread of about 3; the second row is ignored."""
    hidden, weight = torch.randn(num_tokens, width), torch.randn(vocab, width) * 3 / math.sqrt(width)
    ids = torch.randint(vocab, (num_tokens,))
    ids[1:2] = -100
    return hidden.to(dtype), weight.to(dtype), torch.randn(vocab).to(dtype), ids


def scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    head: dict[str, Any],
    g: Tensor | None = None,
    h: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """Results, and the gradients of g . logprobs + h . entropy in hidden, weight and (if the head has one) bias."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    arguments = dict(head)
    if arguments.pop("bias", False):
        arguments["bias"] = leaves[2]
    if arguments.get("temperature") == "per token":
        arguments["temperature"] = torch.linspace(0.5, 2, len(ids), device=ids.device)
    out = linear_token_logprobs(leaves[0], leaves[1], ids, **arguments, entropy=True, sum_p2=True, **options)
    weights = torch.linspace(-1, 2, len(ids), dtype=out.logprobs.dtype, device=ids.device)
    g = weights if g is None else g
    h = weights.flip(0) if h is None else h
    grads = torch.autograd.grad((out.logprobs * g).sum() + (out.entropy * h).sum(), leaves, allow_unused=True)
    return [x.detach() for x in (*out, *grads) if x is not None]


def assert_conforms(
    backend: str, device: str, inputs: tuple[Tensor, ...], head: dict[str, Any], *, largest: float = 1, **options: Any
) -> None:
    """No further from float64 than plain PyTorch in that dtype. What lies around the rows is NaN.

    The gradient of the logits, and what the products make of it, are rounded to half precision in the same places as in plain PyTorch:
    which of the two ends up further off is a matter of luck, by no more than a rounding of the result. The weight's gradient is
    rounded once more for each further chunk of tokens. `largest` is the size of hidden states past the usual, by which an error of the
    logits' gradient is multiplied on its way to the weight's.
    """
    *tensors, ids = inputs
    there = [x.to(device) for x in inputs]
    if device == "cpu" or tensors[0].numel() < 2**20:
        there[:2] = [inside(x, NAN)[0] for x in there[:2]]
    actual = scores(*there, head, backend=backend, **options)
    truth = scores(*(x.double() for x in tensors), ids, head, backend="reference")
    plain = scores(*tensors, ids, head, backend="reference")
    chunks = 3 if "max_extra_bytes" in options else 0
    for name, a, t, p in zip(NAMES, actual, truth, plain, strict=False):
        assert a.dtype == p.dtype, name
        assert a.device.type == device
        step = torch.finfo(a.dtype).eps / 2 * t.abs().max().item() if a.numel() else 0
        gradient = name in ("hidden", "weight", "bias")
        roundings = (gradient and a.dtype != torch.float32) + (chunks if name == "weight" else 0)
        assert_no_worse(a.cpu(), t, p, 2e-6 * (largest if name == "weight" else 1) + roundings * step, name)


def check_shape(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    assert_conforms(backend, device, make(*shape, dtype), HEADS["bias"])


def check_aligned(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Rows that all begin at multiples of 16 bytes have tiles of their own."""
    inputs = make(*shape, dtype)
    actual = scores(*(x.to(device) for x in inputs), HEADS["everything"], backend=backend)
    truth = scores(*(x.double() for x in inputs[:3]), inputs[3], HEADS["everything"], backend="reference")
    plain = scores(*inputs, HEADS["everything"], backend="reference")
    for name, a, t, p in zip(NAMES, actual, truth, plain, strict=True):
        step = torch.finfo(a.dtype).eps / 2 * t.abs().max().item()
        assert_no_worse(a.cpu(), t, p, 2e-6 + (step if name in NAMES[3:] and a.dtype != torch.float32 else 0), name)


def check_head(backend: str, device: str, dtype: torch.dtype, head: str) -> None:
    assert_conforms(backend, device, make(9, 24, 131, dtype), HEADS[head])


def check_pieces(backend: str, device: str, dtype: torch.dtype, head: str, extra_bytes: int) -> None:
    """Of the vocabulary alone, and of the tokens too."""
    assert_conforms(backend, device, make(40, 24, 203, dtype), HEADS[head], max_extra_bytes=extra_bytes)


def check_table(backend: str, device: str) -> None:
    """By hand: hidden (1, 2) and rows (ln 3, 0), (0, 0) give odds 3:1; scaled by 2, odds 9:1; a soft cap of ln 3 limits to tanh."""
    ln3 = math.log(3)
    hidden, weight = torch.tensor([[1.0, 2]] * 2, device=device), torch.tensor([[ln3, 0.0], [0, 0]], device=device)
    ids = torch.tensor([0, 1], device=device, dtype=torch.int32)

    def of(**options: Any) -> Tensor:
        return linear_token_logprobs(hidden, weight, ids, **options, backend=backend).cpu()

    torch.testing.assert_close(of(), torch.tensor([0.75, 0.25]).log())
    torch.testing.assert_close(of(logit_scale=2.0), torch.tensor([0.9, 0.1]).log())
    torch.testing.assert_close(of(soft_cap=ln3), torch.tensor([ln3 * math.tanh(1), 0.0]).log_softmax(0))
    torch.testing.assert_close(of(bias=torch.tensor([0.0, ln3], device=device)), torch.tensor([0.5, 0.5]).log())
    torch.testing.assert_close(of(temperature=torch.tensor([0.5, 1], device=device)), torch.tensor([0.9, 0.25]).log())


def check_outliers(backend: str, device: str, dtype: torch.dtype) -> None:
    """Logits of +-200 in the first, a middle and the last tile; maxima that move with every tile; a certain token."""
    vocab, width = 203, 16
    weight = torch.zeros(vocab, width)
    weight[:, :8] = torch.randn(vocab, 8)
    weight[0, 8] = weight[100, 9] = weight[202, 10] = 1
    weight[:, 11] = torch.linspace(-1, 1, vocab)
    hidden = torch.randn(8, width)
    hidden[:, 8:] = 0
    for row, (column, value) in enumerate([(8, 200), (9, 200), (10, 200), (8, -200), (11, 200), (11, -200)]):
        hidden[row, column] = value
    ids = torch.tensor([0, 5, 202, 100, 17, 3, -100, 1])
    assert_conforms(backend, device, (hidden.to(dtype), weight.to(dtype), torch.zeros(vocab, dtype=dtype), ids), {}, largest=200)


def check_forbidden(backend: str, device: str) -> None:
    """A bias of -inf gives probability 0 and gradient 0: in one place, in whole tiles, before everything else."""
    hidden, weight, bias, ids = make(5, 24, 203, torch.float32)
    bias[7] = bias[40:110] = bias[:33] = -INF
    ids[:] = torch.tensor([35, 150, 39, 202, -100])
    given = [x.to(device) for x in (hidden, weight, bias, ids)]
    results = scores(*given, HEADS["bias"], backend=backend)
    truth = scores(hidden.double(), weight.double(), bias.double(), ids, HEADS["bias"], backend="reference")
    plain = scores(hidden, weight, bias, ids, HEADS["bias"], backend="reference")
    for name, a, t, p in zip(NAMES, results, truth, plain, strict=True):
        assert_no_worse(a.cpu(), t, p, 2e-6, name)
    assert not results[5][bias == -INF].any()


def check_not_a_number(backend: str, device: str, bad: float) -> None:
    """A NaN or inf in the states of a row makes all of that row NaN; no other row's results."""
    hidden, weight, bias, ids = (x.to(device) for x in make(5, 24, 203, torch.float32))
    clean = scores(hidden, weight, bias, ids, {}, backend=backend)
    hidden[3, 5] = bad
    results = scores(hidden, weight, bias, ids, {}, backend=backend)
    good = torch.tensor([0, 1, 2, 4], device=device)
    for name, result, want in zip(NAMES, results, clean, strict=False):
        if name != "weight":
            assert result[3].isnan().any(), name
            assert_same_bits([result[good]], [want[good]], name)


def check_rows_that_are_not_read(backend: str, device: str, dtype: torch.dtype) -> None:
    """Ignored tokens, and in the backward those that no gradient reaches, hold NaN: results and gradients are those of clean rows."""
    hidden, weight, bias, ids = (x.to(device) for x in make(70, 24, 60, dtype))
    ids[33:65] = -100  # a whole block of rows too
    ignored = ids == -100
    dirty = torch.where(ignored[:, None], NAN, hidden)
    results = scores(dirty, weight, bias, ids, HEADS["bias"], backend=backend)
    assert_same_bits(results, scores(hidden, weight, bias, ids, HEADS["bias"], backend=backend))
    for result in results[:4]:
        assert not result[ignored].any()
    g = torch.zeros(70, device=device)
    g[[0, 2, 66]] = 1
    reached = g != 0
    dirty = torch.where(reached[:, None], hidden, NAN)
    grads = scores(dirty, weight, bias, ids, HEADS["bias"], g, g * 0, backend=backend)[3:]
    assert_same_bits(grads, scores(hidden, weight, bias, ids, HEADS["bias"], g, g * 0, backend=backend)[3:])
    assert not grads[0][~reached].any()
    assert grads[0][reached].any(1).all()
    nothing = scores(torch.full_like(hidden, NAN), weight, bias, ids.fill_(-100), HEADS["bias"], backend=backend)
    assert not any(x.any() for x in nothing)


def check_wrong_values(backend: str, device: str) -> None:
    """Not an error, which would wait for the device, and no read outside: NaN in what depends on the value, in no other row."""
    hidden, weight, bias, _ = (x.to(device) for x in make(6, 16, 40, torch.float32))
    good, ones = torch.arange(6, device=device), torch.ones(6, device=device)
    others = good != 4
    right = scores(hidden, weight, bias, good, {}, ones, ones * 0, backend=backend)
    for wrong in (40, -1, -99, 2**31, 2**45, -(2**45)):
        ids = good.clone()
        ids[4] = wrong
        results = scores(hidden, weight, bias, ids, {}, ones, ones * 0, backend=backend)
        assert results[0][4].isnan()
        assert_same_bits(results[1:3], right[1:3], "entropy and sum_p2 do not depend on the token")
        assert results[3][4].isnan().all()
        assert results[4].isnan().all()
        assert_same_bits([results[i][others] for i in (0, 3)], [right[i][others] for i in (0, 3)], f"id {wrong}")
        assert_same_bits(scores(hidden, weight, bias, ids, {}, ones * 0, ones, backend=backend)[3:],
                         scores(hidden, weight, bias, good, {}, ones * 0, ones, backend=backend)[3:])  # fmt: skip
    for wrong in (0.0, -1.0, INF, NAN):
        temperature = ones.clone()
        temperature[4] = wrong
        results = scores(hidden, weight, bias, good, {"temperature": temperature}, ones, ones * 0, backend=backend)
        for name, result, want in zip(NAMES[:4], results, right, strict=False):
            assert result[4].isnan().all(), name
            assert_same_bits([result[others]], [want[others]], f"temperature {wrong}")


def check_strides(backend: str, device: str, dtype: torch.dtype) -> None:
    """Rows any distance apart, and one row for all, give the bits of a copy; so do ids of int32."""
    _, _, bias, ids = (x.to(device) for x in make(6, 24, 50, dtype))
    states, table = torch.randn(12, 61, device=device).to(dtype), torch.randn(50, 91, device=device).to(dtype)
    for hidden, weight in (
        (states[::2, 3:27], table[:, 5:29]),
        (states[::2, 3:27], table[::1, 5:29].contiguous()),
        (states[:1, :24].expand(6, -1), table[:, :24]),
    ):
        want = scores(inside(hidden, NAN)[0], inside(weight, NAN)[0], bias, ids, HEADS["bias"], backend=backend)
        assert_same_bits(scores(hidden, weight, bias, ids.int(), HEADS["bias"], backend=backend), want)


def check_offsets_past_int32(backend: str, device: str) -> None:
    """Rows 2^31 elements apart, of hidden and of the weight; on the CPU only their pages are touched."""
    hidden, weight, bias, ids = (x.to(device) for x in make(2, 32, 2, torch.bfloat16))
    stride = 2**31 + 64
    for apart in (hidden, weight):
        memory = torch.empty(stride + 32, dtype=torch.bfloat16, device=device).as_strided((2, 32), (stride, 1))
        memory.copy_(apart)
        given = (memory, weight) if apart is hidden else (hidden, memory)
        assert_same_bits(scores(*given, bias, ids, {}, backend=backend), scores(hidden, weight, bias, ids, {}, backend=backend))
        del memory, given


def check_long_gradient(backend: str, device: str) -> None:
    """32768 tokens by 70000 entries, 2.3e9 logits, in one piece of their gradient: every row as it would be alone."""
    hidden, weight, bias, ids = (x.to(device) for x in make(32_768, 16, 70_000, torch.bfloat16))
    weights = torch.ones(len(ids), device=device)
    whole = scores(hidden, weight, bias, ids, {}, weights, weights, max_extra_bytes=6_000_000_000, backend=backend)
    last = slice(-128, None)
    alone = scores(hidden[last], weight, bias, ids[last], {}, weights[last], weights[last], backend=backend)
    for name, a, b in zip(NAMES[:4], whole, alone, strict=False):
        torch.testing.assert_close(a[last], b, rtol=1e-5 if name != "hidden" else 8e-3, atol=1e-5)
    assert whole[4].isfinite().all()


def check_repeatable(backend: str, device: str, dtype: torch.dtype) -> None:
    inputs = [x.to(device) for x in make(40, 17, 131, dtype)]
    for extra_bytes in (None, 131 * 40):
        assert_repeatable(
            lambda extra_bytes=extra_bytes: scores(*inputs, HEADS["everything"], max_extra_bytes=extra_bytes, backend=backend)
        )


def check_what_is_not_wanted(backend: str, device: str) -> None:
    """Results that were not asked for, and gradients of what is frozen."""
    hidden, weight, bias, ids = (x.to(device) for x in make(4, 16, 40, torch.float32))
    assert isinstance(linear_token_logprobs(hidden, weight, ids, backend=backend), Tensor)
    out = linear_token_logprobs(hidden.requires_grad_(), weight, ids, bias=bias, sum_p2=True, backend=backend)
    assert out.entropy is None
    assert not out.sum_p2.requires_grad
    full = scores(hidden, weight, bias, ids, HEADS["bias"], torch.ones(4, device=device), torch.zeros(4, device=device), backend=backend)
    for i, leaf in enumerate((hidden, weight, bias)):
        for x in (hidden, weight, bias):
            x.requires_grad_(x is leaf)
        linear_token_logprobs(hidden, weight, ids, bias=bias, backend=backend).sum().backward()
        assert_same_bits([leaf.grad], [full[3 + i]])
        assert [x.grad is None for x in (hidden, weight, bias) if x is not leaf] == [True, True]
        leaf.grad = None


def check_backward_again(backend: str, device: str) -> None:
    hidden, weight, _, ids = (x.to(device) for x in make(4, 8, 30, torch.float32))
    leaves = weight.requires_grad_(), hidden.requires_grad_()
    assert_one_derivative(lambda: linear_token_logprobs(hidden, weight, ids, backend=backend), *leaves)


def peak(device: str, run: Any) -> tuple[int, Any]:
    """The most bytes held at once beyond what there was, and the result."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with mock.patch.object(_torch, "is_eager", return_value=True), Peak() as measured:  # the way of eager calls, which it can look into
        result = run()
    return measured.bytes, result


def check_memory(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int, int], extra_bytes: int) -> None:
    """Within the bound and 256 bytes a token, forward and backward with everything asked for; a GPU hands out 512 bytes at a time."""
    hidden, weight, bias, ids = (x.to(device) for x in make(*shape, dtype))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def run() -> list[Tensor]:
        out = linear_token_logprobs(
            hidden, weight, ids, bias=bias, soft_cap=5.0, entropy=True, sum_p2=True, max_extra_bytes=extra_bytes, backend=backend
        )
        return [*out, *torch.autograd.grad((out.logprobs + out.entropy).sum(), leaves)]

    held, results = peak(device, run)
    kept = sum(x.nbytes for x in results)
    assert held > kept  # it looked inside
    assert held <= kept + extra_bytes + 256 * shape[0] + (20 * 512 if device == "cuda" else 0)


def check_autocast(backend: str, device: str) -> None:
    hidden, weight, _, ids = (x.to(device) for x in make(4, 8, 30, torch.float32))
    outside = linear_token_logprobs(hidden, weight, ids, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits([linear_token_logprobs(hidden, weight, ids, backend=backend)], [outside])


def check_torch(backend: str, device: str) -> None:
    """opcheck of both operators, and one graph under torch.compile: gradients and all."""
    hidden, weight, bias, ids = (x.to(device) for x in make(5, 8, 50, torch.float32))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    extra_bytes = 50 * 40 * 2
    temperatures = torch.rand(5, device=device) + 0.5
    for bias_or_none, t, entropy in ((None, None, False), (bias, temperatures, True)):
        args = (hidden, weight, bias_or_none, ids, t, 0.7, 0.5, 3.0, entropy, entropy, extra_bytes)
        torch.library.opcheck(operator("linear_token_logprobs", backend).op, args)
    saved = [torch.rand(5, device=device) for _ in range(5)]
    arguments = (hidden.detach(), weight.detach(), bias.detach(), ids, temperatures, 0.7, 0.5, 3.0, *saved[:3])
    gradient_op = getattr(torch.ops.reinforce_ada, f"linear_token_logprobs_gradient_{backend}").default
    torch.library.opcheck(gradient_op, (*arguments, True, True, True, extra_bytes, *saved[3:]))

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = linear_token_logprobs(h, w, ids, bias=b, soft_cap=3.0, entropy=True, max_extra_bytes=extra_bytes, backend=backend)
        return (out.logprobs * out.entropy).sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)
    torch.compiler.reset()


def check_fake_tensors(backend: str, device: str) -> None:
    """Shapes without a kernel."""
    with FakeTensorMode():
        hidden = torch.empty(3, 8, device=device, dtype=torch.float16, requires_grad=True)
        weight = torch.empty(50, 8, device=device, dtype=torch.float16)
        out = linear_token_logprobs(hidden, weight, torch.empty(3, device=device, dtype=torch.int64), entropy=True, backend=backend)
        assert [x.shape if x is not None else None for x in out] == [(3,), (3,), None]
        (grad,) = torch.autograd.grad(out.logprobs.sum(), hidden)
        assert (grad.shape, grad.dtype) == ((3, 8), torch.float16)


def check_columns_at_minus_infinity(backend: str, device: str) -> None:
    """A part of the vocabulary that nobody can sample, of several tiles."""
    hidden, weight, bias, ids = make(3, 8, 1203, torch.float32)
    bias[:600] = -math.inf
    ids[[0, 2]] = torch.tensor([600, 1202])
    assert_conforms(backend, device, (hidden, weight, bias, ids), HEADS["bias"])


def check_infinite_temperature(backend: str, device: str) -> None:
    """Wrong too where each tile is full, so that nothing else is infinite."""
    hidden, weight, bias, ids = (x.to(device) for x in make(4, 8, 512, torch.float32))
    temperature = torch.tensor([1.0, 1, math.inf, 1], device=device)
    for result in scores(hidden, weight, bias, ids, {"temperature": temperature}, backend=backend)[:4]:
        assert result[2].isnan().all()
        assert not result[[0, 1, 3]].isnan().any()


def check_ignored_row_under_a_large_bias(backend: str, device: str) -> None:
    """It is not computed what e^120 of it would be, nor for the others how much later tiles are below the first."""
    hidden, weight, bias, ids = make(5, 8, 1203, torch.float32)
    bias[3] = 120
    ids[[0, 2, 3, 4]] = 3
    assert_conforms(backend, device, (hidden, weight, bias, ids), HEADS["bias"])


def check_many_rows(backend: str, device: str) -> None:
    """More blocks of rows than go through the vocabulary together."""
    hidden, weight, _, ids = make(2100, 3, 300, torch.float32)
    logprobs = linear_token_logprobs(hidden.to(device), weight.to(device), ids.to(device), backend=backend)
    truth = linear_token_logprobs(hidden.double(), weight.double(), ids, backend="reference")
    assert_no_worse(logprobs.cpu(), truth, linear_token_logprobs(hidden, weight, ids, backend="reference"), 2e-6)


# The interpreter knows one arithmetic: there half precision is a matter of rounding what is stored.
HALF = (torch.bfloat16, torch.float16)
CASES = [
    *each(check_table),
    *each(check_shape, *((shape,) for shape in SHAPES[4:6]), dtypes=True),
    *each(check_shape, *((torch.float32, shape) for shape in SHAPES[:4] + SHAPES[6:])),
    *each(check_shape, *((dtype, shape) for dtype in HALF for shape in SHAPES[:4] + SHAPES[6:]), large=True),
    *each(check_shape, *((shape,) for shape in LARGE), dtypes=True, large=True),
    *each(check_aligned, ((40, 48, 96),), dtypes=True),
    *each(check_aligned, ((300, 256, 4096),), ((128, 512, 32_000),), dtypes=True, large=True),
    *each(check_head, ("everything",), dtypes=True),
    *each(check_head, *((torch.float32, head) for head in HEADS if head != "everything")),
    *each(check_head, *((dtype, head) for dtype in HALF for head in HEADS if head != "everything"), large=True),
    *each(check_pieces, ("everything", 203 * 40), dtypes=True),
    *each(check_pieces, (torch.bfloat16, "plain", 12_000)),
    *each(check_outliers, (torch.float32,), (torch.bfloat16,)),
    *each(check_outliers, (torch.float16,), large=True),
    *each(check_forbidden),
    *each(check_not_a_number, (NAN,), (INF,)),
    *each(check_rows_that_are_not_read, dtypes=True),
    *each(check_wrong_values),
    *each(check_strides, (torch.float32,)),
    *each(check_strides, *((dtype,) for dtype in HALF), large=True),
    *each(check_offsets_past_int32),
    *each(check_long_gradient, large=True),
    *each(check_repeatable, (torch.bfloat16,)),
    *each(check_repeatable, (torch.float32,), (torch.float16,), large=True),
    *each(check_what_is_not_wanted),
    *each(check_backward_again),
    *each(check_memory, (torch.bfloat16, (70, 4, 200), 200 * 40), (torch.float32, (40, 40, 300), 20_000)),
    *each(
        check_memory,
        ((400, 4, 500), 500 * 40),
        ((4096, 512, 32_000), 32_000_000),
        ((2, 64, 151_936), 151_936 * 40),
        dtypes=True,
        large=True,
    ),
    *each(check_autocast),
    *each(check_torch),
    *each(check_fake_tensors),
    *each(check_many_rows),
    *each(check_columns_at_minus_infinity),
    *each(check_infinite_temperature),
    *each(check_ignored_row_under_a_large_bias),
]
