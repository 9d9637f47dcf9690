"""The cases of linear_token_logprobs and linear_policy_loss, at the head of Qwen2.5-0.5B."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reinforce_ada.bench.baselines import (
    Implementation,
    LossInputs,
    candidates,
    compiled,
    cross_entropy,
    log_softmax,
    logsumexp,
    missing,
    ppo,
    runnable,
)  # fmt: skip
from reinforce_ada.bench.case import Candidate, Case, Goal, Setup
from reinforce_ada.bench.checks import close_in_norm
from reinforce_ada.bench.policy import batch
from reinforce_ada.ops import linear_policy_loss, linear_token_logprobs, policy_loss

_SHAPE = {"T": 512, "D": 896, "V": 151936}
_QUICK = {"T": 128, "D": 256, "V": 16384}
_SEQUENCES = 4
_MAX_EXTRA_BYTES = 10_000_000
_CHECKED = 16  # rows of the gradients of hidden states and weight that are compared
_LONG = 1 << 26  # number of logits from which a call in fp32 takes seconds
_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.04}  # relative to the largest value; a bf16 logit has a relative error of 2^-9


def cases() -> Iterator[Case]:
    """Yield the forward, forward and backward in bounded memory, and the policy loss with its gradient."""
    for dtype, quick in (("float32", _QUICK), ("bfloat16", None)):
        forward = (Goal("time", 1.03, "one mm"), Goal("extra_mb", 10))
        recompute = (Goal("time", 1.36, "three mm"), Goal("extra_mb", 10))
        loss = (Goal("time", 1.08, "three mm"), Goal("speedup", 1.0, "inductor"), Goal("extra_mb", 64))
        both = "forward and backward, max_extra_bytes=10 MB"
        yield Case("linear_token_logprobs", "forward, max_extra_bytes=10 MB", _SHAPE, dtype, _forward, forward, "eager", quick)
        yield Case("linear_token_logprobs", both, _SHAPE, dtype, _backward, recompute, "eager")
        yield Case("linear_policy_loss", "ppo, forward and backward", _SHAPE, dtype, partial(_policy, onto=False), loss, "eager", quick)
        onto = "ppo, forward and backward, onto weight_grad"
        yield Case("linear_policy_loss", onto, _SHAPE, dtype, partial(_policy, onto=True), loss, "eager")


@dataclass(frozen=True, slots=True)
class _Inputs:
    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    ids: Tensor  # [T]

    @property
    def flops(self) -> int:
        """Return the floating-point operations of one matrix product."""
        return 2 * self.hidden.numel() * self.weight.shape[0]

    def why_not(self, package: str, device: str) -> str | None:
        """Return why another library is left out."""
        if device == "cpu" and self.weight.dtype == torch.float32 and len(self.ids) * len(self.weight) > _LONG:
            return "seconds a call in fp32; see bf16"
        return missing(package, device)


def _inputs(shape: Mapping[str, int], dtype: str, device: str) -> _Inputs:
    """Return inputs whose logits have the spread of a language model's, a standard deviation of 3."""
    tokens, width, vocab = shape["T"], shape["D"], shape["V"]
    hidden = torch.randn(tokens, width, device=device).to(getattr(torch, dtype))
    weight = torch.randn(vocab, width, device=device).mul_(3 / width**0.5).to(hidden.dtype)
    return _Inputs(hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocab, (tokens,), device=device))


class _Truth:
    """The true logprobs and gradients of `sum(coefficients * logprobs)`, from logits in float32 and sums in float64."""

    @torch.no_grad()
    def __init__(self, x: _Inputs, dtype: str) -> None:
        self._tolerance = _TOLERANCE[dtype]
        self._x, h, w = x, x.hidden.float(), x.weight.float()
        z = h @ w.T
        lse = torch.stack([row.double().logsumexp(-1) for row in z])  # [T]
        self.logprobs = z.gather(1, x.ids[:, None]).squeeze(1).double() - lse
        p_rows = (z[:_CHECKED].double() - lse[:_CHECKED, None]).exp().float()
        self._hidden_rows = w[x.ids[:_CHECKED]] - p_rows @ w  # d logprobs / d hidden
        chosen = x.ids[:_CHECKED]  # rows of the weight of tokens that occur
        p_columns = (z[:, chosen].double() - lse[:, None]).exp()
        self._weight_factors = (x.ids[:, None] == chosen).double() - p_columns  # d logprobs / d logits of the chosen

    def check(self, logprobs: Tensor, loose: bool) -> None:
        close_in_norm("logprobs", logprobs, self.logprobs, self._tolerance * (4 if loose else 1))

    def check_gradients(self, gradients: tuple[Tensor, Tensor], coefficients: Tensor, loose: bool) -> None:
        tolerance = self._tolerance * (4 if loose else 1)
        g = coefficients.detach().double().flatten()
        close_in_norm("gradient of hidden", gradients[0].flatten(0, -2)[:_CHECKED], g[:_CHECKED, None] * self._hidden_rows, tolerance)
        expected = (self._weight_factors * g[:, None]).T @ self._x.hidden.detach().double()
        close_in_norm("gradient of weight", gradients[1][self._x.ids[:_CHECKED]], expected, tolerance)


def _products(x: _Inputs, count: int) -> Candidate:
    """Return the matrix products alone, into existing memory: that of the forward, or also those of both gradients."""
    hidden, weight = x.hidden.detach(), x.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight) if count == 3 else None

    def run() -> Tensor:
        torch.mm(hidden, weight.T, out=logits)
        if grad_weight is not None:
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.T, hidden, out=grad_weight)
        return logits

    return Candidate("one mm" if count == 1 else "three mm", run, floor=True)


def _held(x: _Inputs, products: Candidate) -> list[Tensor]:
    return [x.hidden, x.weight, x.ids, products.run()]


# -------------------- log-probabilities


def _heads(x: _Inputs, device: str) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return the baselines for logprobs from hidden states and weight, and why others are absent."""
    no_fused = None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has none"
    return runnable(
        {
            "eager": (None, lambda h, w: log_softmax(F.linear(h, w), x.ids)),
            "inductor logsumexp": (None, compiled(lambda h, w: logsumexp(F.linear(h, w), x.ids))),
            "inductor cross_entropy": (None, compiled(lambda h, w: cross_entropy(F.linear(h, w), x.ids))),
            "cut-cross-entropy": (x.why_not("cut_cross_entropy", device), partial(_cce, ids=x.ids, device=device)),
            "F.linear_cross_entropy": (
                x.why_not("torch", device) or no_fused,
                lambda h, w: -F.linear_cross_entropy(h, w, x.ids, reduction="none"),
            ),
        }
    )


def _cce(hidden: Tensor, weight: Tensor, ids: Tensor, device: str) -> Tensor:
    """Run cut-cross-entropy: its Triton kernels on a GPU, and on a CPU its torch.compile form, which is the one that runs there."""
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden, weight, ids, reduction="none", impl="cce" if device == "cuda" else "torch_compile")
    return -loss


def _forward(case: Case, device: str) -> Setup:
    x = _inputs(case.shape, case.dtype, device)
    truth, product = _Truth(x, case.dtype), _products(x, 1)
    found, absent = _heads(x, device)

    def without_gradient(implementation: Implementation) -> Any:
        with torch.no_grad():
            return implementation(x.hidden, x.weight)

    return Setup(
        subject=partial(without_gradient, lambda h, w: linear_token_logprobs(h, w, x.ids, max_extra_bytes=_MAX_EXTRA_BYTES)),
        others=[*candidates(found, without_gradient), product],
        check=truth.check,
        held=_held(x, product),
        moved_bytes=x.hidden.nbytes + x.weight.nbytes,
        flops=x.flops,
        absent=absent,
    )


def _backward(case: Case, device: str) -> Setup:
    """Set up the gradient of the sum of the logprobs, which every baseline can compute."""
    x = _inputs(case.shape, case.dtype, device)
    truth, products = _Truth(x, case.dtype), _products(x, 3)
    found, absent = _heads(x, device)
    del found["inductor logsumexp"]  # as fast as the other one, and seconds a call
    liger: Implementation = partial(_liger_ce, ids=x.ids)
    if_gpu, no_liger = runnable({"liger": (missing("liger_kernel", device, needs_gpu=True), liger)})

    def gradients(implementation: Implementation) -> tuple[Tensor, ...]:
        return torch.autograd.grad(implementation(x.hidden, x.weight).sum(), (x.hidden, x.weight))

    ones = torch.ones(len(x.hidden), device=device)
    return Setup(
        subject=partial(gradients, lambda h, w: linear_token_logprobs(h, w, x.ids, max_extra_bytes=_MAX_EXTRA_BYTES)),
        others=[*candidates({**found, **if_gpu}, gradients), products],
        check=lambda results, loose: truth.check_gradients(results, ones, loose),
        held=_held(x, products),
        moved_bytes=2 * (x.hidden.nbytes + x.weight.nbytes),
        flops=3 * x.flops,
        absent={**absent, **no_liger},
    )


def _liger_ce(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(hidden, weight, ids, reduction="sum")
    return -loss


# -------------------- the policy loss


def _policy(case: Case, device: str, onto: bool) -> Setup:
    """Set up the loss; with `onto` the weight's gradient is added to existing memory, as in the second micro-batch of a step."""
    x = _inputs(case.shape, case.dtype, device)
    truth, products = _Truth(x, case.dtype), _products(x, 3)
    tokens = case.shape["T"]
    offsets = torch.arange(0, tokens + 1, tokens // _SEQUENCES, device=device)
    b = batch((tokens,), offsets, _SEQUENCES, device)
    b["mask"].fill_(True)  # a masked token would cost us nothing, but the products as much as any other
    b["old"] = (truth.logprobs + 0.2 * torch.randn(tokens, device=device)).float()
    coefficients = _loss_gradient(b, truth.logprobs)
    weight_grad = torch.zeros_like(x.weight) if onto else None
    leaves = (x.hidden,) if onto else (x.hidden, x.weight)

    def ours() -> tuple[Tensor, ...]:
        args = x.hidden, x.weight, x.ids, b["advantages"], b["mask"]
        loss, _ = linear_policy_loss(*args, old_logprobs=b["old"], cu_seqlens=offsets, weight_grad=weight_grad)
        return torch.autograd.grad(loss, leaves)

    def check(results: tuple[Tensor, ...], loose: bool) -> None:
        of_weight = results[1] if weight_grad is None or len(results) > 1 else weight_grad
        truth.check_gradients((results[0], of_weight), coefficients, loose)

    def gradients(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), (x.hidden, x.weight))

    found, absent = _losses(x, b, device)
    return Setup(
        subject=ours,
        others=[*candidates(found, gradients), products],
        check=check,
        held=[*_held(x, products), *b.values(), *([] if weight_grad is None else [weight_grad])],
        moved_bytes=2 * (x.hidden.nbytes + x.weight.nbytes),
        flops=3 * x.flops,
        absent=absent,
        reset=None if weight_grad is None else weight_grad.zero_,
    )


def _loss_gradient(b: LossInputs, logprobs: Tensor) -> Tensor:
    """Return d loss / d logprobs [T] in float64."""
    lp = logprobs.detach().requires_grad_()
    adv, old = b["advantages"].double(), b["old"].double()
    loss, _ = policy_loss(lp, adv, b["mask"], old_logprobs=old, cu_seqlens=b["cu_seqlens"], backend="reference")
    return torch.autograd.grad(loss, lp)[0]


def _losses(x: _Inputs, b: LossInputs, device: str) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Return the baselines for the loss, metrics included, and why others are absent."""

    def materialised(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return ppo({**b, "logprobs": logsumexp(F.linear(h, w), x.ids)})

    inductor = compiled(materialised)
    return runnable(
        {
            "eager": (None, lambda: ppo({**b, "logprobs": log_softmax(F.linear(x.hidden, x.weight), x.ids)})[0]),
            "inductor": (None, lambda: inductor(x.hidden, x.weight)[0]),
            "cut-cross-entropy": (
                x.why_not("cut_cross_entropy", device),
                lambda: ppo({**b, "logprobs": _cce(x.hidden, x.weight, x.ids, device)})[0],
            ),
            "liger": (x.why_not("liger_kernel", device), _liger_grpo(x, b)),
        }
    )


def _liger_grpo(x: _Inputs, b: LossInputs) -> Callable[[], Tensor]:
    """Return Liger's chunked GRPO loss, which works sequence by sequence and has only the clip fraction as a metric."""

    @cache
    def loss() -> Callable[..., Any]:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss  # if this fails, only the baseline is left out, not the case

        made: Callable[..., Any] = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo"
        )
        return made

    shape = (_SEQUENCES, -1)
    ids, mask, old = (t.view(shape) for t in (x.ids, b["mask"], b["old"]))

    def run() -> Tensor:
        hidden = x.hidden.view(_SEQUENCES, len(x.hidden) // _SEQUENCES, -1)
        value: Tensor = loss()(hidden, x.weight, ids, mask, b["advantages"], old_per_token_logps=old)[0]
        return value

    return run
