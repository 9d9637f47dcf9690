"""A linear layer with an adapter as one operator, beside the formula in float64 with PyTorch's own gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reinforce_ada.training.low_rank import LowRankLinear, low_rank_linear, use

IN, OUT, RANK, SCALE = 24, 40, 3, 2.0


def draw(dtype: torch.dtype, *leading: int) -> list[Tensor]:
    """Return x, W, bias, A and B, the gradient of y last."""
    g = torch.Generator().manual_seed(sum(leading))
    shapes = [(*leading, IN), (OUT, IN), (OUT,), (RANK, IN), (OUT, RANK), (*leading, OUT)]
    dtypes = [dtype, dtype, dtype, torch.float32, torch.float32, dtype]
    return [torch.randn(shape, generator=g).to(t) for shape, t in zip(shapes, dtypes, strict=True)]


def by_formula(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, grad: Tensor) -> list[Tensor]:
    """Return y, dx, dA and dB in float64."""
    x, weight, a, b, grad = (t.double() for t in (x, weight, a, b, grad))
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    y = x @ weight.T + SCALE * (x @ a.T) @ b.T + (0.0 if bias is None else bias.double())
    return [y.detach(), *torch.autograd.grad(y, [x, a, b], grad)]


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 5), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(leading: tuple[int, ...], dtype: torch.dtype, has_bias: bool) -> None:
    x, weight, bias, a, b, grad = draw(dtype, *leading)
    truth = by_formula(x, weight, bias if has_bias else None, a, b, grad)
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    y = low_rank_linear(x, weight, bias if has_bias else None, a, b, SCALE)
    got = [y.detach(), *torch.autograd.grad(y, [x, a, b], grad)]
    # Of a sum of IN or OUT terms in float32; y and dx are rounded once or twice into x's dtype.
    for have, want, kind in zip(got, truth, (dtype, dtype, torch.float32, torch.float32), strict=True):
        assert have.dtype == kind
        assert have.shape == want.shape
        eps = torch.finfo(kind).eps
        scale = want.abs().max() if want.numel() else 0.0
        assert bool(((have.double() - want).abs() <= 2 * eps * scale + 40 * torch.finfo(torch.float32).eps * scale).all())


def test_what_is_frozen_gets_no_gradient() -> None:
    x, weight, bias, a, b, grad = draw(torch.float32, 4)
    weight.requires_grad_()
    y = low_rank_linear(x, weight, bias, a.requires_grad_(), b.requires_grad_(), SCALE)
    y.backward(grad)
    assert weight.grad is None
    assert x.grad is None
    assert a.grad is not None


def test_rows_of_any_stride() -> None:
    x, weight, bias, a, b, grad = draw(torch.float32, 3, 4)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    y = low_rank_linear(strided, weight, bias, a.requires_grad_(), b, SCALE)
    dx, da = torch.autograd.grad(y, [strided, a], grad.transpose(0, 1).contiguous().transpose(0, 1))
    want = by_formula(x, weight, bias, a.detach(), b, grad)
    for have, truth in zip((y.detach(), dx, da), (want[0], want[1], want[2]), strict=True):
        torch.testing.assert_close(have.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_beside_pefts_own(dtype: torch.dtype) -> None:
    """The same adapters in both; off, the layer is the one without."""
    from peft import LoraConfig, get_peft_model

    x, weight, bias, a, b, _ = draw(dtype, 6)
    outputs = []
    for own in (False, True):
        plain = nn.Sequential(nn.Linear(IN, OUT)).to(dtype)
        with torch.no_grad():
            plain[0].weight.copy_(weight)
            plain[0].bias.copy_(bias)
        config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["0"])
        model = get_peft_model(plain, use(config) if own else config)
        layer = model.base_model.model[0]
        assert isinstance(layer, LowRankLinear) == own
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
            outputs.append(model(x).double())
            with model.disable_adapter():
                off = model(x)
        torch.testing.assert_close(off, nn.functional.linear(x, weight, bias), rtol=0, atol=0)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
