"""token_logprobs on a GPU: what every form of it is held to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import assert_repeatable, assert_rounded_no_worse, assert_same_up_to_alignment, each, inside
from conformance import assert_no_worse, assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reinforce_ada.ops import token_logprobs
from reinforce_ada.ops._dispatch import operator

NAMES = ("logprobs", "entropy", "sum_p2", "gradient")
INF, NAN = math.inf, math.nan
# One, less than any vector, one short of, exactly and one past the vectors and blocks of the kernels, and several blocks.
SHAPES = [(0, 7), (1, 1), (3, 2), (5, 15), (4, 16), (3, 17), (2, 64), (3, 1003), (2, 1024), (2, 2047), (2, 2049), (1, 4095), (2, 4096)]
SHAPES += [(2, 4097), (1, 8192), (1, 8193), (1, 13001)]
LARGE = [(3, 151936), (2, 128256), (40, 32003), (1000, 257)]


def scores(logits: Tensor, ids: Tensor, g: Tensor, h: Tensor, **options: Any) -> list[Tensor]:
    """Results and the gradient of g . logprobs + h . entropy."""
    leaf = logits.detach().requires_grad_()
    out = token_logprobs(leaf, ids, entropy=True, sum_p2=True, **options)
    (grad,) = torch.autograd.grad((out.logprobs.to(g.dtype) * g).sum() + (out.entropy.to(h.dtype) * h).sum(), leaf)
    return [x.detach() for x in (*out, grad)]


def assert_conforms(backend: str, device: str, logits: Tensor, ids: Tensor, **options: Any) -> None:
    """Results and gradients are no further from float64 than plain PyTorch's; `plain` is what a trainer writes without this op."""
    g, h = torch.randn(2, len(ids))
    g[::3] = 0
    there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    view, _ = inside(logits.to(device), NAN)
    actual = scores(view, ids.to(device), g.to(device), h.to(device), backend=backend, **there)
    truth = scores(logits.double(), ids, g.double(), h.double(), backend="reference", **options)
    plain = scores(logits, ids, g, h, backend="reference", **options)
    for name, a, t, p in zip(NAMES, actual, truth, plain, strict=True):
        assert a.dtype == (logits.dtype if name == "gradient" else torch.float32)
        assert a.device.type == device
        assert_rounded_no_worse(backend, a.cpu(), t, p, 2e-6, name)


def check_shape(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    assert_conforms(backend, device, (torch.randn(shape) * 3).to(dtype), torch.randint(shape[1], shape[:1]))


def check_temperature(backend: str, device: str, dtype: torch.dtype, per_token: bool) -> None:
    logits = (torch.randn(5, 5001) * 3).to(dtype)
    temperature = torch.rand(5) + 0.5 if per_token else 0.3
    assert_conforms(backend, device, logits, torch.randint(5001, (5,)), temperature=temperature)


def check_head(backend: str, device: str, dtype: torch.dtype, scale: float, cap: float | None) -> None:
    """Also outliers, -inf where it has a meaning, and a NaN in an ignored row."""
    logits = torch.randn(6, 5001) * 10
    logits[1, 4100] = logits[2, 17] = 200
    logits[3] -= 200
    logits[4, ::2] = -INF if scale > 0 else INF
    logits[5, 9] = NAN
    ids = torch.tensor([5, 4100, 18, 3, 7, -100])
    assert_conforms(backend, device, logits.to(dtype), ids, temperature=0.7, logit_scale=scale, soft_cap=cap)


def check_outliers(backend: str, device: str, dtype: torch.dtype) -> None:
    """Logits of 200 in the first, a later and the last block, alone, repeated, and with the token elsewhere; maxima that always move."""
    logits = torch.randn(8, 9000) * 3
    logits[0, 0] = logits[1, 5000] = logits[2, 8999] = 200
    logits[3, ::1000] = 150
    logits[4] -= 200
    logits[5, torch.arange(9000) % 2 == 0] = -200
    logits[6] = torch.linspace(-200, 200, 9000)
    logits[7] = torch.linspace(200, -200, 9000)
    assert_conforms(backend, device, logits.to(dtype), torch.tensor([0, 5, 8999, 1000, 17, 3, 8998, 8999]))


def check_forbidden(backend: str, device: str, dtype: torch.dtype) -> None:
    """-inf in one place, in whole blocks, before everything else, everywhere but at the token, and at the token itself."""
    logits = (torch.randn(5, 9000) * 3).to(dtype)
    logits[0, 7] = logits[2, :8500] = logits[3, 2048:] = logits[4, 9] = -INF
    logits[1, 1:] = -INF
    assert_conforms(backend, device, logits, torch.tensor([5, 0, 8600, 100, 9]))


def check_table(backend: str, device: str) -> None:
    """Worked by hand: uniform over 4; odds 3:1; temperature 1/2 squares the odds to 9:1; a certain token; an ignored row."""
    ln2, ln3 = math.log(2), math.log(3)
    rows = [[5.0, 5, 5, 5], [ln3, 0, -INF, -INF], [ln3, 0, -INF, -INF], [0, -INF, -INF, -INF], [7, 8, 9, 10]]
    logits = torch.tensor(rows, device=device, requires_grad=True)
    temperature = torch.tensor([1.0, 1, 0.5, 1, 1], device=device)
    ids = torch.tensor([2, 0, 1, 0, -100], device=device, dtype=torch.int32)
    out = token_logprobs(logits, ids, temperature=temperature, entropy=True, sum_p2=True, backend=backend)
    h31, h91 = 2 * ln2 - 0.75 * ln3, math.log(10) - 0.9 * math.log(9)
    torch.testing.assert_close(out.logprobs.cpu(), torch.tensor([-2 * ln2, math.log(0.75), math.log(0.1), 0, 0]))
    torch.testing.assert_close(out.entropy.cpu(), torch.tensor([2 * ln2, h31, h91, 0, 0]))
    torch.testing.assert_close(out.sum_p2.cpu(), torch.tensor([0.25, 10 / 16, 82 / 100, 1, 0]))
    out.logprobs.sum().backward()
    want = torch.tensor([[-0.25, -0.25, 0.75, -0.25], [0.25, -0.25, 0, 0], [-1.8, 1.8, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(logits.grad.cpu(), want, rtol=0, atol=1e-6)


def check_tanh(backend: str, device: str, points: int) -> None:
    """The soft cap over all magnitudes, from the logprob of odds e^(tanh(x) / |x|) : 1 and e^tanh(x) : 1, within 3e-7."""
    x = torch.cat([torch.logspace(-30, 0, points), torch.linspace(0.98, 1.02, points), torch.linspace(1, 12, points), torch.tensor([1e4])])
    x = torch.cat([x, -x]).repeat(2)
    temperature = torch.where(torch.arange(len(x)) < len(x) // 2, x.abs(), 1.0)
    logits, ids = torch.stack([x, torch.zeros_like(x)], 1).to(device), torch.zeros(len(x), dtype=torch.int64, device=device)
    logprobs = token_logprobs(logits, ids, temperature=temperature.to(device), soft_cap=1.0, backend=backend)
    want = torch.nn.functional.logsigmoid(x.double().tanh() / temperature.double())
    assert (logprobs.cpu().double() - want).abs().max() <= 3e-7


def check_not_a_number(backend: str, device: str, bad: float, columns: int) -> None:
    """A NaN or +inf anywhere in the row, in its first block and its last; a row in which nothing is allowed."""
    logits = torch.randn(5, columns)
    logits[0, columns // 2] = logits[1, -1] = logits[2, 0] = bad
    logits[3] = -INF
    results = scores(*(x.to(device) for x in (logits, torch.tensor([3, 3, 0, 3, 3]), *torch.ones(2, 5))), backend=backend)
    for name, result in zip(NAMES, results, strict=True):
        assert result.isnan().reshape(5, -1).any(1).tolist() == [True] * 4 + [False], name
    assert results[3][:3].isnan().all()


def check_rows_that_are_not_read(backend: str, device: str, dtype: torch.dtype) -> None:
    """Ignored tokens, and rows whose gradients are both 0, are full of NaN: results and gradients are those of clean rows."""
    logits = torch.randn(5, 4100).to(dtype).to(device)
    dirty = logits.clone()
    dirty[1] = dirty[3, 5] = NAN
    ids = torch.tensor([3, -100, 9, -100, 4], device=device)
    g, h = torch.randn(2, 5, device=device)
    results = scores(dirty, ids, g, h, backend=backend)
    assert_same_bits(results, scores(logits, ids, g, h, backend=backend))
    for result in results:
        assert (result[[1, 3]] == 0).all()
    dirty, g, h = logits.clone(), torch.tensor([1.0, 0, 2, 0, 0], device=device), torch.tensor([0.0, 0, 0, 1, 0], device=device)
    dirty[1] = NAN
    grad = scores(dirty, ids.clamp(min=0), g, h, backend=backend)[3]
    assert (grad[[1, 4]] == 0).all()
    assert grad[[0, 2, 3]].isfinite().all()
    assert (grad[[0, 2, 3]] != 0).any(1).all()


def check_one_gradient(backend: str, device: str) -> None:
    """Only through the logprobs, only through the entropy, and through neither."""
    logits, ids = torch.randn(3, 4100), torch.tensor([0, 4099, -100])
    for which in ("logprobs", "entropy"):
        grads = []
        for x, y, form in ((logits.to(device), ids.to(device), backend), (logits.double(), ids, "reference"), (logits, ids, "reference")):
            leaf = x.clone().requires_grad_()
            total = getattr(token_logprobs(leaf, y, entropy=True, backend=form), which).sum()
            grads.append(torch.autograd.grad(total, leaf)[0].cpu())
        assert_no_worse(*grads, 2e-6, which)
    out = token_logprobs(logits.to(device).requires_grad_(), ids.to(device), sum_p2=True, backend=backend)
    assert out.entropy is None
    assert not out.sum_p2.requires_grad


def check_logprobs_alone(backend: str, device: str, dtype: torch.dtype, columns: int) -> None:
    """Nothing else is asked for, as in most training steps: a kernel of its own."""
    logits, ids, g = (torch.randn(3, columns) * 4).to(dtype), torch.tensor([0, columns - 1, -100]), torch.tensor([0.5, -2.0, 1.0])
    results = []
    for x, form in ((logits.to(device), backend), (logits.double(), "reference"), (logits, "reference")):
        leaf = x.clone().requires_grad_()
        logprobs = token_logprobs(leaf, ids.to(x.device), temperature=0.7, soft_cap=20.0 if columns % 2 else None, backend=form)
        results.append([logprobs.detach().cpu(), torch.autograd.grad((logprobs * g.to(logprobs)).sum(), leaf)[0].cpu()])
    for name, actual, truth, plain in zip(("logprobs", "gradient"), *results, strict=True):
        assert_rounded_no_worse(backend, actual, truth, plain, 2e-6, name)


def check_wrong_values(backend: str, device: str) -> None:
    """Not an error, which would wait for the device, and no read outside: NaN in what depends on the value, in no other row."""
    logits, good = torch.randn(3, 70).to(device), torch.arange(3, device=device)
    g, h = torch.ones(3, device=device), torch.zeros(3, device=device)
    right = scores(logits, good, g, h, backend=backend)
    for wrong in (70, -1, -99, -101, 2**31, 2**45, -(2**45)):
        ids = good.clone()
        ids[1] = wrong
        logprobs, _, _, grad = scores(logits, ids, g, h, backend=backend)
        assert logprobs[1].isnan()
        assert grad[1].isnan().all()
        assert_same_bits([logprobs[good != 1], grad[good != 1]], [right[0][good != 1], right[3][good != 1]], f"id {wrong}")
    clean = scores(logits, good, g, h + 1, backend=backend)
    for wrong in (0.0, -1.0, INF, NAN):
        temperature = torch.ones(3, device=device)
        temperature[1] = wrong
        results = scores(logits, good, g, h + 1, temperature=temperature, backend=backend)
        for name, result, want in zip(NAMES, results, clean, strict=True):
            assert result[1].isnan().all(), name
            assert_same_bits([result[good != 1]], [want[good != 1]], f"temperature {wrong}")


def check_memory_of_the_gradient(backend: str, device: str, dtype: torch.dtype, columns: int) -> None:
    """Fresh, over the logits, and in given memory: the same bits, nothing written beside the rows."""
    values = torch.randn(3, columns).to(dtype).to(device)
    ids = torch.tensor([-100, columns - 1, columns // 2], device=device)
    ones = torch.ones(2, 3, device=device)
    fresh = scores(values, ids, *ones, temperature=0.7, backend=backend)[3]

    given, buffer = inside(torch.full_like(values, NAN), 7.0)
    leaf = values.clone().requires_grad_()
    out = token_logprobs(leaf, ids, temperature=0.7, entropy=True, grad_out=given, backend=backend)
    (out.logprobs + out.entropy).sum().backward()
    assert_same_bits([given, leaf.grad], [fresh, fresh], "given memory")
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[:, 3 : 3 + columns] = False
    assert (buffer[outside] == 7).all()

    seen: list[Tensor] = []
    _, buffer = inside(values, 7.0)
    wide = buffer.detach().requires_grad_() * 1  # not a leaf, rows apart
    over = wide[:, 3 : 3 + columns]
    over.register_hook(seen.append)
    out = token_logprobs(over, ids, temperature=0.7, entropy=True, inplace_backward=True, backend=backend)
    total = (out.logprobs + out.entropy).sum()
    total.backward(retain_graph=True)
    assert seen[0].data_ptr() == over.data_ptr()
    assert_same_up_to_alignment(backend, [over.detach()], [fresh], "over the logits")
    assert (wide.detach()[outside] == 7).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # not the gradient in the place of the logits
        total.backward()


def check_strides(backend: str, device: str, dtype: torch.dtype) -> None:
    """A slice of a padded vocabulary, every other row, and one row for all: the same as a copy of it."""
    storage = (torch.randn(6, 4137) * 3).to(dtype).to(device)
    ids, g, h = torch.randint(4101, (3,), device=device), *torch.randn(2, 3, device=device)
    for view in (storage[::2, 3:4104], storage[::2, 16:4117], storage[:1, :4101].expand(3, -1)):
        copied = scores(view.contiguous(), ids, g, h, backend=backend)
        assert_same_up_to_alignment(backend, scores(view, ids, g, h, backend=backend), copied)


def check_offsets_past_int32(backend: str, device: str) -> None:
    """Two rows 2^31 elements apart (32k tokens of a 152k vocabulary have 5.0e9); on the CPU only their pages are touched."""
    stride = 2**31 + 64
    values, ids, ones = torch.randn(2, 1000).bfloat16().to(device), torch.tensor([5, 999], device=device), torch.ones(2, 2, device=device)
    memory = torch.empty(stride + 1000, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((2, 1000), (stride, 1))
    logits.copy_(values)
    want = scores(values, ids, *ones, backend=backend)
    leaf = logits.detach().requires_grad_()
    gradient = torch.empty_like(memory).as_strided((2, 1000), (stride, 1))
    out = token_logprobs(leaf, ids, entropy=True, sum_p2=True, backend=backend, grad_out=gradient)
    (out.logprobs + out.entropy).sum().backward()
    assert_same_up_to_alignment(backend, [*(x.detach() for x in out), gradient], want)


def check_repeatable(backend: str, device: str, dtype: torch.dtype) -> None:
    logits, ids = (torch.randn(3, 9001) * 3).to(dtype).to(device), torch.randint(9001, (3,), device=device)
    g, h = torch.randn(2, 3, device=device)
    assert_repeatable(lambda: scores(logits, ids, g, h, temperature=0.9, backend=backend))


def check_torch(backend: str, device: str, inplace: bool) -> None:
    """opcheck, and one graph under torch.compile: gradient and all."""
    ids = torch.tensor([1, -100, 3, 9], device=device)
    for temperatures, entropy in ((None, False), (torch.rand(4, device=device) + 0.5, True)):
        logits = torch.randn(4, 10, device=device).bfloat16().requires_grad_()
        args = (logits, ids, temperatures, 0.7, 0.5, 3.0, entropy, entropy, inplace, None)
        torch.library.opcheck(operator("token_logprobs", backend).op, args)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = token_logprobs(hidden @ weight, ids, temperature=0.7, entropy=True, inplace_backward=inplace, backend=backend)
        return (out.logprobs * out.entropy).sum()

    inputs = torch.randn(4, 8, requires_grad=True, device=device), torch.randn(8, 50, requires_grad=True, device=device)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), expected)
    torch.compiler.reset()


def check_fake_tensors(backend: str, device: str) -> None:
    """Shapes without a kernel."""
    with FakeTensorMode():
        logits = torch.empty(3, 50, device=device, dtype=torch.float16, requires_grad=True)
        out = token_logprobs(logits, torch.empty(3, device=device, dtype=torch.int64), entropy=True, backend=backend)
        assert [x.shape if x is not None else None for x in out] == [(3,), (3,), None]
        (grad,) = torch.autograd.grad(out.logprobs.sum(), logits)
        assert (grad.shape, grad.dtype) == ((3, 50), torch.float16)


def check_given_memory_compiles(backend: str, device: str) -> None:
    def loss(x: Tensor, ids: Tensor, memory: Tensor) -> Tensor:
        return token_logprobs(x * 2, ids, grad_out=memory, backend=backend).sum()

    x, ids = torch.randn(3, 50, requires_grad=True, device=device), torch.tensor([1, -100, 3], device=device)
    memories = torch.full((2, 3, 50), NAN, device=device)
    (expected,) = torch.autograd.grad(loss(x, ids, memories[0]), x)
    torch.compiler.reset()
    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, ids, memories[1]), x)
    torch.compiler.reset()
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(memories[1], memories[0])


def check_infinity_under_a_cap(backend: str, device: str) -> None:
    """It is the cap, on either side."""
    logits, ids = torch.randn(3, 4100), torch.tensor([0, 7, 4099])
    logits[0, ::5] = math.inf
    logits[1, ::7] = -math.inf
    logits[2, 4099] = math.inf
    assert_conforms(backend, device, logits, ids, soft_cap=5.0)


def check_scale_that_float32_has_not(backend: str, device: str, scale: float) -> None:
    """1.3 is off by 5e-8 there, which logits of 1000 would show."""
    logits = torch.randn(2, 4100)
    logits[:, 5] = 1000 if scale > 0 else -1000
    assert_conforms(backend, device, logits, torch.tensor([3, 4099]), logit_scale=scale)


def check_wrong_id_without_gradient(backend: str, device: str) -> None:
    """The entropy does not depend on the token, nor does its gradient."""
    logits, good, ones = torch.randn(3, 4100, device=device), torch.tensor([5, 6, 7], device=device), torch.ones(3, device=device)
    wrong = torch.tensor([5, 4100, 7], device=device)
    right = scores(logits, good, 0 * ones, ones, backend=backend)
    result = scores(logits, wrong, 0 * ones, ones, backend=backend)
    assert result[0][1].isnan()
    torch.testing.assert_close(result[3], right[3])


def check_infinite_temperature(backend: str, device: str) -> None:
    """Wrong too where the row is a whole number of blocks, so that nothing else is infinite."""
    logits, ids, ones = torch.randn(3, 8192, device=device), torch.tensor([5, 6, 7], device=device), torch.ones(3, device=device)
    temperature = torch.tensor([1.0, math.inf, 1], device=device)
    for result in scores(logits, ids, ones, ones, temperature=temperature, backend=backend):
        assert result[1].isnan().all()
        assert not result[[0, 2]].isnan().any()


def check_logits_as_large_as_the_dtype(backend: str, device: str, dtype: torch.dtype) -> None:
    """Whole blocks at the smallest number before the first other one, and two at the largest."""
    smallest, largest = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits = torch.full((4, 8300), smallest)
    logits[0, 8192:] = torch.randn(108)
    logits[1, :] = torch.where(torch.rand(8300) < 0.5, logits[1], torch.randn(8300))
    logits[2, [5, 8299]] = largest
    logits, ids, ones = logits.to(dtype), torch.tensor([8200, 7, 5, 3]), torch.ones(4)
    out = scores(logits.to(device), ids.to(device), ones.to(device), ones.to(device), backend=backend)
    truth = scores(logits.double(), ids, ones.double(), ones.double(), backend="reference")
    for a, exact in zip(out, truth, strict=True):
        torch.testing.assert_close(a.float().cpu(), exact.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


HEADS = [(0.0625, None), (-1.3, None), (1.0, 30.0), (0.5, 2.0)]

CASES = [
    *each(check_table),
    *each(check_tanh, (5,)),
    *each(check_tanh, (1000,), large=True),
    *each(check_shape, *((shape,) for shape in SHAPES), dtypes=True),
    *each(check_shape, *((shape,) for shape in LARGE), dtypes=True, large=True),
    *each(check_temperature, (False,), (True,), dtypes=True),
    *each(check_head, *HEADS, dtypes=True),
    *each(check_outliers, dtypes=True),
    *each(check_forbidden, dtypes=True),
    *each(check_not_a_number, (NAN, 100), (INF, 100), (NAN, 9001), (INF, 9001)),
    *each(check_rows_that_are_not_read, dtypes=True),
    *each(check_one_gradient),
    *each(check_logprobs_alone, (17,), (4100,), dtypes=True),
    *each(check_wrong_values),
    *each(check_memory_of_the_gradient, (5,), (4096,), (5003,), dtypes=True),
    *each(check_strides, dtypes=True),
    *each(check_offsets_past_int32),
    *each(check_repeatable, dtypes=True),
    *each(check_torch, (False,), (True,)),
    *each(check_fake_tensors),
    *each(check_given_memory_compiles),
    *each(check_logits_as_large_as_the_dtype, (torch.float32,), (torch.bfloat16,)),
    *each(check_infinity_under_a_cap),
    *each(check_scale_that_float32_has_not, (1.3,), (-1.3,)),
    *each(check_wrong_id_without_gradient),
    *each(check_infinite_temperature),
]
