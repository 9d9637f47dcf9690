"""The fp32 master copy: what bf16 alone would lose, clipping, resume."""

import pytest
import torch
from torch import nn

from reinforce_ada.training.optimizer import MasterAdamW, warmed_up


def make(dtype: torch.dtype, max_grad_norm: float = 1.0) -> tuple[nn.Linear, MasterAdamW]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4).to(dtype)
    return layer, MasterAdamW(layer.named_parameters(), weight_decay=0.0, max_grad_norm=max_grad_norm)


def backward(layer: nn.Linear, optimizer: MasterAdamW, scale: float = 1.0) -> None:
    x = torch.linspace(-1, 1, 16).reshape(2, 8).to(layer.weight.dtype)
    (layer(x).float().square().sum() * scale).backward()
    optimizer.accumulate()


def test_small_updates_add_up_in_the_master_although_each_rounds_to_nothing_in_bf16():
    layer, optimizer = make(torch.bfloat16)
    before = layer.weight.detach().clone()
    backward(layer, optimizer)
    optimizer.step(1e-6)
    assert torch.equal(layer.weight, before)
    for _ in range(3000):
        backward(layer, optimizer)
        optimizer.step(1e-6)
    assert (layer.weight != before).float().mean() > 0.5


def test_fp32_matches_plain_adamw_and_accumulation_matches_one_batch():
    layer, optimizer = make(torch.float32)
    twin = nn.Linear(8, 4)
    twin.load_state_dict(layer.state_dict())
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        backward(layer, optimizer, 0.5)
        backward(layer, optimizer, 0.5)
        optimizer.step(1e-2)
        twin(torch.linspace(-1, 1, 16).reshape(2, 8)).square().sum().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
    assert torch.allclose(layer.weight, twin.weight, atol=1e-6)


def test_norm_is_that_before_clipping():
    layer, optimizer = make(torch.float32, max_grad_norm=1e-3)
    backward(layer, optimizer)
    expected = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm()
    assert optimizer.step(1e-2) == pytest.approx(float(expected))


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_no_signal_and_broken_gradients_change_nothing(scale):
    layer, optimizer = make(torch.bfloat16)
    before = layer.weight.detach().clone()
    backward(layer, optimizer, scale)
    optimizer.step(1.0)
    assert torch.equal(layer.weight, before)
    assert not any(key.startswith("exp_avg") for key in optimizer.tensors())


def test_resume_goes_on_bit_for_bit():
    layer, optimizer = make(torch.bfloat16)
    for _ in range(3):
        backward(layer, optimizer)
        optimizer.step(1e-3)
    saved = {k: v.clone() for k, v in optimizer.tensors().items()}
    twin, other = make(torch.bfloat16)
    other.load(saved)
    for a, b in ((layer, optimizer), (twin, other)):
        backward(a, b)
        b.step(1e-3)
    assert torch.equal(layer.weight, twin.weight)
    assert all(torch.equal(v, other.tensors()[k]) for k, v in optimizer.tensors().items())


def test_warm_up():
    assert [warmed_up(1.0, s, 3) for s in (1, 2, 3, 4, 5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warmed_up(2.0, 1, 0) == 2.0
