"""A custom loss: in the place of a built-in one it gives the same, and what is wrong with it is said in one line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import padded
from policy_loss_truth import draw, run
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import RolloutCorrection, _dispatch, linear_policy_loss, policy_loss
from reinforce_ada.ops._dispatch import BackendError
from reinforce_ada.ops.policy_loss import LOSS_AGGS, reference


def ppo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (logprobs - old_logprobs).clamp(-20, 20).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))


HERE = f"{__name__}:ppo"
CLIPS = {"clip_fraction_low", "clip_fraction_high", "clip_fraction_dual"}
AROUND: tuple[dict[str, Any], ...] = (
    {},
    {"rollout_correction": RolloutCorrection("token", "mask", low=0.9, high=1.2)},
    {"rollout_correction": RolloutCorrection("sequence", "truncate", high=1.2)},
    {"kl": "k3", "kl_coef": 0.3},
    {"kl": "k1+", "kl_coef": 0.3, "kl_weighting": "ratio"},
    {"entropy_coef": 0.2},
    {"num_tokens_global": 50.0, "num_seqs_global": 9.0},
)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
@pytest.mark.parametrize("around", range(len(AROUND)))
@pytest.mark.parametrize("on_policy", [False, True])
def test_ppo_as_ones_own_is_ppo(layout: str, loss_agg: str, around: int, on_policy: bool) -> None:
    batch = draw()
    batch = batch if layout == "packed" else padded(batch)
    if on_policy:
        del batch["old_logprobs"]
    options = {"loss_agg": loss_agg, **AROUND[around]}
    expected, own = run(batch, **options, backend="reference"), run(batch, loss=ppo, **options)
    for want, got in zip((expected[0], expected[2]), (own[0], own[2]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-16)  # autograd adds up what reaches a ratio in another order
    assert own[1] == {name: x for name, x in expected[1].items() if name not in CLIPS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_in_float32(dtype: torch.dtype) -> None:
    seen: list[torch.dtype] = []

    def loss(*tensors: Tensor) -> Tensor:
        seen.extend(x.dtype for x in tensors)
        return ppo(*tensors)

    value, _, grad = run(draw(), dtype, loss=loss)
    assert seen == [torch.float32] * 3 + [torch.bool]
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)


def test_what_it_is_given_under_the_mask_is_zero() -> None:
    def loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        for x in (logprobs, old_logprobs, advantages):
            assert x.shape == mask.shape
            assert x[~mask].eq(0).all()
        assert not old_logprobs.requires_grad
        assert not advantages.requires_grad
        return ppo(logprobs, old_logprobs, advantages, mask) / mask  # infinite or NaN under the mask, which nothing reads

    for batch in (draw(), padded(draw())):
        value, _, grad = run(batch, loss=loss)
        assert value.isfinite()
        assert grad[~batch["mask"]].eq(0).all()


def head_call(**options: Any) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=g).requires_grad_() for n in (9, 13))
    ids, old = torch.randint(13, (9,), generator=g), -torch.rand(9, generator=g) - 2
    rest = (ids, torch.randn(3, generator=g), torch.arange(9) != 4)
    offsets = torch.tensor([0, 2, 5, 9])
    value, metrics = linear_policy_loss(hidden, weight, *rest, old_logprobs=old, cu_seqlens=offsets, entropy_coef=0.1, **options)
    return value, list(torch.autograd.grad(value, [hidden, weight])), metrics


def test_from_the_output_head() -> None:
    expected, own = head_call(backend="reference"), head_call(loss=ppo)
    assert torch.equal(expected[0], own[0])
    assert all(map(torch.equal, expected[1], own[1]))
    assert own[2] == {name: x for name, x in expected[2].items() if name not in CLIPS}


def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "losses.py").write_text("def pull(logprobs, old_logprobs, advantages, mask):\n    return -advantages * logprobs\n")
    monkeypatch.chdir(tmp_path)
    expected = run(draw(), loss="reinforce", backend="reference")
    for named in ("./losses.py:pull", f"{tmp_path}/losses.py:pull"):
        assert torch.equal(run(draw(), loss=named)[2], expected[2])
    assert torch.equal(run(draw(), loss=HERE)[2], run(draw(), backend="reference")[2])


@pytest.mark.parametrize("loss", [ppo, HERE])
def test_under_compile(loss: Any) -> None:
    batch = draw()
    given = [batch[name].float() for name in ("logprobs", "advantages", "old_logprobs")]

    def call(logprobs: Tensor, advantages: Tensor, old: Tensor) -> Tensor:
        return policy_loss(logprobs, advantages, batch["mask"], old_logprobs=old, cu_seqlens=batch["cu_seqlens"], loss=loss)[0]

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaf = given[0].clone().requires_grad_()
        value = function(leaf, *given[1:])
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


# -------------------- refusals


@pytest.mark.parametrize(
    ("operator", "call"), [("policy_loss", lambda **options: run(draw(), torch.float32, **options)), ("linear_policy_loss", head_call)]
)
def test_a_native_form_does_not_take_it(operator: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _dispatch,
        "_forms",
        {name: {b: replace(f, missing=lambda: None, devices=None) for b, f in forms.items()} for name, forms in _dispatch._forms.items()},
    )
    for backend in set(_dispatch.forms(operator)) - {"reference"}:
        needed = rf'^{operator}: backend "{backend}" cannot run here: it does not take a loss written in PyTorch. Usable: reference\.'
        with pytest.raises(BackendError, match=needed):
            call(loss=ppo, backend=backend)


def test_a_built_in_loss_of_the_reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of one file makes it known: "auto" takes the reference for it, and a native form refuses it."""
    monkeypatch.setitem(reference.BUILT_IN, "hinge", lambda logp, d, adv, seqs, settings: reference.Terms(-adv * d.clamp(max=1), d.exp()))
    leaf, old = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), -0.5)
    tokens = (leaf, torch.tensor([1.0, -1.0]), torch.ones(2, 3))
    value, metrics = policy_loss(*tokens, old_logprobs=old, loss="hinge")
    assert torch.autograd.grad(value, leaf)[0].flatten().tolist() == pytest.approx([-1 / 6] * 3 + [1 / 6] * 3)
    assert metrics["ratio_mean"].item() == pytest.approx(math.exp(0.5))
    with pytest.raises(BackendError, match=r'backend "cpu" cannot run here: it does not take a loss written in PyTorch'):
        policy_loss(*tokens, old_logprobs=old, loss="hinge", backend="cpu")


class Raises:
    def __call__(self, logprobs: Tensor, *_: Tensor) -> Tensor:
        return logprobs.sum()


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "number": (lambda *_: 1.0, {}, r"^policy_loss: loss <lambda> returned float; a tensor with one loss a token"),
    "shape": (Raises(), {}, r"^policy_loss: loss Raises returned \[\] float64 on cpu; \[83\] float64 on cpu, one loss a token$"),
    "dtype": (lambda x, *_: x.float(), {}, r"returned \[83\] float32 on cpu; \[83\] float64 on cpu, one loss a token$"),
    "constant": (lambda x, *_: x.detach(), {}, r"returned a tensor without a gradient; a differentiable function of the logprobs$"),
    "not callable": (3, {}, r"^policy_loss: loss 3 is not callable; a function of \(logprobs, old_logprobs, advantages, mask\)$"),
    "class": (Raises, {}, r"is a class; a function of"),
    "module": ("no_such_module:f", {}, r"^policy_loss: loss 'no_such_module:f': No module named 'no_such_module'; "),
    "absent": ("math:no_such", {}, r"^policy_loss: loss 'math:no_such': math .* has no attribute 'no_such'; "),
    "value": ("math:pi", {}, r"^policy_loss: loss 'math:pi' is not callable; "),
    "unknown": ("pppo", {}, r"^policy_loss: unknown loss 'pppo'; known: .*; did you mean 'ppo'\?$"),
    "dual clip": (ppo, {"dual_clip": 3.0}, r'^policy_loss: dual_clip=3.0 with loss=ppo; dual_clip > 1 with loss="ppo"$'),
    "ratios": (ppo, {"ratio_level": "sequence"}, r'^policy_loss: ratio_level="sequence" with loss=ppo; a built-in loss; '),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_loss_that_is_refused(case: str) -> None:
    loss, options, message = WRONG[case]
    with pytest.raises(InputError, match=message) as error:
        run(draw(), loss=loss, **options)
    assert "\n" not in str(error.value)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    """A square root at 0: the value is fine."""
    logprobs = torch.tensor([-1.0, -0.5, -2.0]).requires_grad_()
    given = (logprobs, torch.ones(1), torch.tensor([True, True, False]))

    def root(logprobs: Tensor, old_logprobs: Tensor, *_: Tensor) -> Tensor:
        return (logprobs - old_logprobs).abs().sqrt()

    def backward(old: list[float], scale: float = 1.0) -> None:
        value, _ = policy_loss(*given, old_logprobs=torch.tensor(old), cu_seqlens=torch.tensor([0, 3]), loss=root)
        torch.autograd.backward(value * scale)

    backward([-1.5, -0.75, -2.0])  # the token under the mask does not count
    with pytest.raises(
        InputError, match=r"^policy_loss: loss .*root has the gradient nan at token \[1\] \(logprob -0.5, old logprob -0.5, "
    ):
        backward([-1.5, -0.5, -2.0])
    backward([-1.5, -0.5, -2.0], scale=math.inf)  # the scale's own overflow
    backward([-1.5, math.nan, -2.0])  # the input's


def test_no_gradient_is_asked_for_where_none_is_wanted() -> None:
    batch = draw()
    with torch.no_grad():
        value, _ = policy_loss(batch["logprobs"], batch["advantages"], batch["mask"], cu_seqlens=batch["cu_seqlens"], loss=lambda x, *_: x)
    assert value.isfinite()


def test_second_derivatives_and_transforms() -> None:
    """The reference is plain PyTorch, whatever the loss."""
    x, rest = torch.tensor([-1.0, -0.5]), (torch.ones(1), torch.ones(2, dtype=torch.bool))

    def value(x: Tensor) -> Tensor:
        old = torch.tensor([-1.1, -0.4])
        return policy_loss(x, *rest, old_logprobs=old, cu_seqlens=torch.tensor([0, 2]), loss=ppo, loss_agg="seq-mean-token-sum")[0]

    torch.testing.assert_close(torch.func.grad(value)(x), torch.autograd.functional.jacobian(value, x))
    assert torch.autograd.functional.hessian(value, x).diagonal().ne(0).all()
