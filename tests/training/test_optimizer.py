"""The fp32 master copy: what bf16 alone would lose, clipping, resume."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reinforce_ada import config as configuration
from reinforce_ada.training.optimizer import MasterAdamW, rate_at


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


def rates(steps, **keys):
    training = configuration.load(None, {"learning_rate": 1.0, "steps": steps, **keys}).training
    return [rate_at(training, step) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"warmup_steps": 0, "learning_rate": 0.5}, [0.5]),
        ({"warmup_steps": 1, "lr_schedule": "linear"}, [0.5, 1.0, 0.75, 0.5, 0.25]),
        ({"warmup_steps": 0, "lr_schedule": "linear", "lr_min_fraction": 0.2}, [1.0, 0.8, 0.6, 0.4]),
        ({"warmup_steps": 0, "lr_schedule": "cosine"}, [1.0, 0.75, 0.25]),
        ({"warmup_steps": 1, "lr_schedule": "cosine", "lr_min_fraction": 0.5}, [0.5, 1.0, 0.875, 0.625]),
        ({"warmup_steps": 0, "lr_schedule": "cosine", "lr_min_fraction": 1.0}, [1.0, 1.0, 1.0]),
        ({"warmup_steps": 9, "lr_schedule": "linear"}, [0.1, 0.2]),  # it ends within its warm-up
    ],
)
def test_the_learning_rate_of_every_step(keys, expected):
    assert rates(len(expected), **keys) == pytest.approx(expected, abs=1e-15)


def test_a_constant_rate_is_the_rate_to_the_bit():
    assert rates(7, warmup_steps=2, learning_rate=1e-5, lr_min_fraction=0.3) == [1e-5 * min(1.0, s / 3) for s in range(1, 8)]


@pytest.mark.parametrize(
    ("schedule", "name", "more"),
    [("linear", "linear", {}), ("cosine", "cosine", {}), ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.1})],
)
def test_after_warm_up_the_rates_are_those_of_transformers(schedule, name, more):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(name, optimizer, 4, 17, more or None)
    found = []
    for _ in range(17):
        found.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = rates(17, warmup_steps=4, lr_schedule=schedule, lr_min_fraction=more.get("min_lr_rate", 0.0))
    assert ours[4:] == pytest.approx(found[4:], abs=1e-12)


@given(st.integers(1, 60), st.integers(0, 70), st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 1))
def test_a_rate_rises_to_the_whole_and_falls_no_lower_than_its_share(steps, warmup, schedule, least):
    found = rates(steps, warmup_steps=warmup, lr_schedule=schedule, lr_min_fraction=least)
    top = min(warmup, steps - 1)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert min(found[top:]) >= least * found[top] - 1e-12
    assert min(found) > 0
