from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance import Peak, assert_no_worse, assert_one_derivative, assert_repeatable, assert_same_bits, builds, threads
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import TokenLogprobs, _torch, linear_token_logprobs, token_logprobs
from reinforce_ada.ops._torch import NativeOp
from reinforce_ada.ops.linear_token_logprobs import cpu as cpu_form

every_build = pytest.mark.parametrize("backend", builds("linear_token_logprobs"), indirect=True)
native_build = pytest.mark.parametrize("backend", builds("linear_token_logprobs", reference=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("linear_token_logprobs", reference=False, every_isa=False), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("linear_token_logprobs", every_isa=False), indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])

LN3 = math.log(3)
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "gemma": {"soft_cap": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "everything": {"bias": True, "soft_cap": 3.0, "logit_scale": 0.5, "temperature": 0.7},
    "per token": {"temperature": "per token"},
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())


def make(num_tokens: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and ids with logits of a spread of about 3; the second row is ignored."""
    hidden, weight = torch.randn(num_tokens, width), torch.randn(vocab, width) * 3 / math.sqrt(width)
    ids = torch.randint(vocab, (num_tokens,))
    ids[1:2] = -100
    return hidden.to(dtype), weight.to(dtype), torch.randn(vocab).to(dtype), ids


def evaluate(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], head: dict[str, Any], dtype: torch.dtype | None = None, **options: Any
) -> list[Tensor]:
    """Results, and gradients of fixed combinations of logprobs and entropy to hidden, weight and (if the head has one) bias."""
    *leaves, ids = inputs
    hidden, weight, bias = (x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves)
    arguments = dict(head)
    if arguments.pop("bias", False):
        arguments["bias"] = bias
    if arguments.get("temperature") == "per token":
        arguments["temperature"] = torch.linspace(0.5, 2, len(ids))
    out = linear_token_logprobs(hidden, weight, ids, **arguments, entropy=True, sum_p2=True, **options)
    weights = torch.linspace(-1, 2, len(ids), dtype=out.logprobs.dtype)
    total = (out.logprobs * weights + out.entropy * weights.flip(0)).sum()
    grads = torch.autograd.grad(total, (hidden, weight, bias), allow_unused=True)
    return [x.detach() for x in (*out, *grads) if x is not None]


# The meaning


@every_build
@pytest.mark.parametrize("max_extra_bytes", [None, 200], ids=["whole", "chunks"])
def test_table(backend: str, max_extra_bytes: int | None) -> None:
    """By hand: hidden (1, 2) and rows (ln 3, 0), (0, 0) give odds 3:1; scaled by 2, odds 9:1; a soft cap of ln 3 limits to tanh."""
    hidden, weight = torch.tensor([[1.0, 2]] * 2), torch.tensor([[LN3, 0.0], [0, 0]])
    ids = torch.tensor([0, 1])
    options = {"max_extra_bytes": max_extra_bytes, "backend": backend}
    plain = linear_token_logprobs(hidden, weight, ids, **options)
    torch.testing.assert_close(plain, torch.tensor([0.75, 0.25]).log())
    scaled = linear_token_logprobs(hidden, weight, ids, logit_scale=2.0, **options)
    torch.testing.assert_close(scaled, torch.tensor([0.9, 0.1]).log())
    capped = linear_token_logprobs(hidden, weight, ids, soft_cap=LN3, **options)
    torch.testing.assert_close(capped, torch.tensor([LN3 * math.tanh(1), 0.0]).log_softmax(0))
    biased = linear_token_logprobs(hidden, weight, ids, bias=torch.tensor([0.0, LN3]), **options)
    torch.testing.assert_close(biased, torch.tensor([0.5, 0.5]).log())


@every_build
@heads
def test_is_token_logprobs_of_the_logits(backend: str, head: dict[str, Any]) -> None:
    """The composition written out; the reference in float64."""
    inputs = make(7, 5, 11, torch.float64 if backend == "reference" else torch.float32)
    hidden, weight, bias, ids = inputs
    z = F.linear(hidden, weight, bias if "bias" in head else None) * head.get("logit_scale", 1.0)
    if "soft_cap" in head:
        z = head["soft_cap"] * torch.tanh(z / head["soft_cap"])
    temperature = head.get("temperature", 1.0)
    temperature = torch.linspace(0.5, 2, 7) if temperature == "per token" else temperature
    expected = token_logprobs(z, ids, temperature=temperature, entropy=True, sum_p2=True)
    for actual, wanted in zip(evaluate(inputs, head, backend=backend), expected, strict=False):
        torch.testing.assert_close(actual, wanted, **({} if backend == "reference" else {"rtol": 0, "atol": 5e-6}))


@pytest.mark.parametrize("max_extra_bytes", [None, 2 * 6 * 80], ids=["whole", "chunks"])
@heads
def test_reference_passes_gradcheck(max_extra_bytes: int | None, head: dict[str, Any]) -> None:
    hidden, weight, bias, ids = make(5, 3, 6, torch.float64)
    arguments = dict(head)
    has_bias = arguments.pop("bias", False)
    if arguments.get("temperature") == "per token":
        arguments["temperature"] = torch.linspace(0.5, 2, 5)

    def scores(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = b if has_bias else None
        return linear_token_logprobs(h, w, ids, bias=bias, **arguments, entropy=True, max_extra_bytes=max_extra_bytes)[:2]

    assert torch.autograd.gradcheck(scores, (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()))


def test_results_that_were_not_asked_for() -> None:
    hidden, weight, _, ids = make(3, 4, 5, torch.float32)
    for max_extra_bytes in (None, 5 * 40):
        assert isinstance(linear_token_logprobs(hidden, weight, ids, max_extra_bytes=max_extra_bytes), Tensor)
        out = linear_token_logprobs(hidden.requires_grad_(), weight, ids, sum_p2=True, max_extra_bytes=max_extra_bytes)
        assert isinstance(out, TokenLogprobs)
        assert out.entropy is None
        assert out.logprobs.requires_grad
        assert not out.sum_p2.requires_grad


# The error against float64


@every_build
@dtypes
@heads
@pytest.mark.parametrize("max_extra_bytes", [None, 1003 * 40 * 3], ids=["whole", "chunks"])
def test_no_worse_than_plain_torch(backend: str, dtype: torch.dtype, head: dict[str, Any], max_extra_bytes: int | None) -> None:
    """Chunks of 3 in 8 tokens. The weight's gradient is summed in its dtype: half an ulp of its largest value for each chunk."""
    inputs = make(8, 64, 1003, dtype)
    truth = evaluate(inputs, head, torch.float64, backend="reference")
    plain = evaluate(inputs, head, backend="reference")
    actual = evaluate(inputs, head, backend=backend, max_extra_bytes=max_extra_bytes)
    for i, (a, t, p) in enumerate(zip(actual, truth, plain, strict=True)):
        sums = 3 * torch.finfo(dtype).eps / 2 * t.abs().max().item() if i > 2 and max_extra_bytes else 0
        assert_no_worse(a, t, p, 2e-6 + sums, ("logprobs", "entropy", "sum_p2", "hidden", "weight", "bias")[i])


@every_build
@dtypes
@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 1, 1), (1, 33, 2), (4, 7, 17), (3, 8, 30001), (70, 49, 33)], ids=str)
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunks"])
def test_shapes(backend: str, dtype: torch.dtype, shape: tuple[int, int, int], chunked: bool) -> None:
    inputs = make(*shape, dtype)
    options = {"backend": backend, "max_extra_bytes": shape[2] * 40 if chunked else None}
    truth, plain = evaluate(inputs, {}, torch.float64, backend="reference"), evaluate(inputs, {}, backend="reference")
    # In chunks a sum is rounded in pieces. A chunk of the reference is one token here, and torch adds the V terms of one row one after
    # another on some CPUs: an error of 4e-5 at V = 30001 with AMX, where three rows at once have 3e-6.
    steps = 3 * math.sqrt(shape[2]) if chunked and backend == "reference" else 3 if chunked else 0
    for a, t, p in zip(evaluate(inputs, {}, **options), truth, plain, strict=True):
        assert_no_worse(a, t, p, 2e-6 + steps * torch.finfo(dtype).eps * (t.abs().max().item() if t.numel() else 0))


@every_build
@pytest.mark.parametrize("max_extra_bytes", [None, 1003 * 40 * 3], ids=["whole", "chunks"])
def test_repeatable(backend: str, max_extra_bytes: int | None) -> None:
    """Down to the matmul, whose own bits may depend on the number of threads: here it is one small product a thread."""
    inputs = make(8, 4, 1003, torch.float32)
    assert_repeatable(lambda: evaluate(inputs, {}, backend=backend, max_extra_bytes=max_extra_bytes))


@native_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("max_extra_bytes", [None, 1_200_000], ids=["whole", "chunks"])
def test_threads_share_the_work(backend: str, dtype: torch.dtype, max_extra_bytes: int | None) -> None:
    """Past the grain of the kernels; every product is our own."""
    inputs = make(150, 50, 1003, dtype)
    assert_repeatable(lambda: evaluate(inputs, HEADS["everything"], backend=backend, max_extra_bytes=max_extra_bytes))


@native_form
def test_bfloat16_depends_on_threads_no_more_than_torch(backend: str) -> None:
    """Its products are torch's: the same bits again with as many threads, and no worse than plain torch."""
    inputs = make(150, 50, 1003, torch.bfloat16)
    truth, plain = evaluate(inputs, {}, torch.float64, backend="reference"), evaluate(inputs, {}, backend="reference")
    with threads(2):
        two = evaluate(inputs, {}, backend=backend)
        assert_same_bits(two, evaluate(inputs, {}, backend=backend))
    for a, t, p in zip(two, truth, plain, strict=True):
        assert_no_worse(a, t, p, 2e-6)


@native_build
@dtypes
def test_ignored_rows_are_not_read(backend: str, dtype: torch.dtype) -> None:
    """Nor in the backward rows that no gradient reaches."""
    hidden, weight, bias, ids = make(9, 8, 30, dtype)
    want = evaluate((hidden, weight, bias, ids), {}, backend=backend)
    poisoned = hidden.clone()
    poisoned[1] = math.nan
    assert ids[1] == -100
    assert_same_bits(evaluate((poisoned, weight, bias, ids), {}, backend=backend), want)
    ids[:] = -100
    nothing = evaluate((torch.full_like(hidden, math.nan), weight, bias, ids), {"bias": True}, backend=backend)
    assert not any(x.any() for x in nothing)


@every_build
def test_strided_inputs_and_int32_ids(backend: str) -> None:
    hidden, weight, bias, ids = make(6, 8, 30, torch.float32)
    wide = torch.zeros(12, 20)
    wide[::2, 4:12] = hidden
    padded = torch.zeros(30, 9)
    padded[:, :8] = weight
    views = (wide[::2, 4:12], padded[:, :8], bias, ids.int())
    for a, b in zip(evaluate(views, {}, backend=backend), evaluate((hidden, weight, bias, ids), {}, backend=backend), strict=True):
        torch.testing.assert_close(a, b)


# Memory, frozen weights, autocast, compiling


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way of eager calls, which `Peak` looks into, even under it; the dispatcher's way shows only what comes out."""
    monkeypatch.setattr(_torch, "is_eager", lambda args: True)


def peak(num_tokens: int, width: int, vocab: int, dtype: torch.dtype, max_extra_bytes: int | None, backend: str) -> int:
    """Extra bytes of a forward and backward with everything asked for, less 256 a token."""
    hidden, weight, bias, ids = make(num_tokens, width, vocab, dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with Peak() as measured:
        out = linear_token_logprobs(
            hidden, weight, ids, bias=bias, soft_cap=5.0, entropy=True, sum_p2=True, max_extra_bytes=max_extra_bytes, backend=backend
        )
        grads = torch.autograd.grad((out.logprobs + out.entropy).sum(), leaves)
    kept = sum(x.nbytes for x in (*out, *grads))
    assert measured.bytes > kept  # it looked inside
    return measured.bytes - kept - 256 * num_tokens


@every_form
@dtypes
@pytest.mark.usefixtures("eager")
def test_extra_memory_is_bounded(backend: str, dtype: torch.dtype) -> None:
    """Without a bound the reference holds more than 40 times as much, the cpu form 8 MB; the products take theirs within it."""
    bound = 5 * 2000 * 40
    if backend == "reference":
        assert peak(400, 4, 2000, dtype, bound, backend) <= bound
        assert peak(400, 4, 2000, dtype, None, backend) > 40 * bound
    else:
        assert peak(400, 4, 2000, dtype, bound, backend) <= cpu_form.for_logits(bound, dtype)
        for num_tokens, width, vocab in ((400, 4, 2000), (2, 8, 151_936), (300, 8, 20_000), (1500, 40, 512), (400, 1024, 2000)):
            assert peak(num_tokens, width, vocab, dtype, None, backend) <= cpu_form.for_logits(8_000_000, dtype)


@every_build
def test_frozen_weight_gets_no_gradient(backend: str) -> None:
    hidden, weight, _, ids = make(4, 8, 30, torch.float32)
    for max_extra_bytes in (None, 30 * 40):
        hidden.grad = None
        out = linear_token_logprobs(hidden.requires_grad_(), weight, ids, max_extra_bytes=max_extra_bytes, backend=backend)
        out.sum().backward()
        assert hidden.grad is not None
        assert weight.grad is None


@every_build
@pytest.mark.parametrize("max_extra_bytes", [None, 30 * 40], ids=["whole", "chunks"])
def test_autocast_changes_nothing(backend: str, max_extra_bytes: int | None) -> None:
    hidden, weight, _, ids = make(4, 8, 30, torch.float32)

    def run() -> list[Tensor]:
        return [linear_token_logprobs(hidden, weight, ids, max_extra_bytes=max_extra_bytes, backend=backend)]

    outside = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(run(), outside)


@every_build
@pytest.mark.parametrize("max_extra_bytes", [None, 50 * 40 * 2], ids=["whole", "chunks"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own, while it traces a Function
def test_compiles_in_one_graph(backend: str, max_extra_bytes: int | None) -> None:
    hidden, weight, bias, ids = make(5, 8, 50, torch.float32)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        out = linear_token_logprobs(h, w, ids, bias=b, soft_cap=3.0, entropy=True, max_extra_bytes=max_extra_bytes, backend=backend)
        return (out.logprobs * out.entropy).sum()

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


@native_form
@pytest.mark.parametrize("head", [{}, HEADS["everything"]], ids=["plain", "everything"])
def test_opcheck(backend: str, head: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    real = NativeOp.__call__

    def recorded(self: NativeOp, *args: Any) -> Any:
        calls.append((self.op, args))
        return real(self, *args)

    monkeypatch.setattr(NativeOp, "__call__", recorded)
    evaluate(make(5, 8, 50, torch.float32), head, backend=backend)
    assert len(calls) == 2
    for op, args in calls:
        plain = op is calls[1][0]  # the gradient has no formula of its own
        arguments = [x.detach().requires_grad_(x.requires_grad and not plain) if isinstance(x, Tensor) else x for x in args]
        torch.library.opcheck(op, tuple(arguments))


@native_form
def test_a_second_backward_is_right_and_a_second_derivative_raises(backend: str) -> None:
    hidden, weight, _, ids = make(4, 8, 30, torch.float32)
    leaves = weight.requires_grad_(), hidden.requires_grad_()
    assert_one_derivative(lambda: linear_token_logprobs(hidden, weight, ids, backend=backend), *leaves)


# Errors: one line each

GOOD = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "token_ids": torch.tensor([0, 1])}
ERRORS = [
    ({"hidden": torch.zeros(2, 1, 3)}, "hidden is [2, 1, 3] float32 on cpu; [rows, columns] of a floating dtype; flatten with"),
    ({"weight": torch.zeros(3, 5).T}, "weight has stride (1, 5); stride 1 in the last dimension; weight.contiguous()"),
    (
        {"weight": torch.zeros(5, 4)},
        "hidden is [2, 3] float32 on cpu, weight [5, 4] float32 on cpu; [T, D] and [V, D] of one dtype and device, V >= 1; cast",
    ),
    ({"weight": torch.zeros(5, 3).bfloat16()}, "hidden is [2, 3] float32 on cpu, weight [5, 3] bfloat16 on cpu; [T, D] and"),
    ({"bias": torch.zeros(4)}, "bias is [4] float32 on cpu; [5], dtype and device of the weight"),
    ({"token_ids": torch.tensor([0, 5])}, "token_ids[1] = 5; ids in [0, 5), or -100 to ignore a row"),
    ({"token_ids": torch.tensor([0, 1, 2])}, "token_ids is [3] int64 on cpu; [2] int64 or int32 on cpu"),
    ({"temperature": -1.0}, "temperature=-1.0; a positive finite number"),
    ({"logit_scale": math.nan}, "logit_scale=nan, soft_cap=None; a finite scale, and None or a positive finite soft cap"),
    ({"soft_cap": 0.0}, "logit_scale=1.0, soft_cap=0.0; a finite scale, and None or a positive finite soft cap"),
    ({"max_extra_bytes": 199}, "max_extra_bytes=199; at least 200, for the logits of one token"),
    (
        {"backend": "cuda"},
        'backend "cuda" cannot run here: this version has no such form. Usable: cpu, reference. See reinforce-ada doctor.',
    ),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message.split(";")[0] for _, message in ERRORS])
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        linear_token_logprobs(**{**GOOD, **change})
    assert str(error.value).startswith(f"linear_token_logprobs: {message}")
    assert "\n" not in str(error.value)
