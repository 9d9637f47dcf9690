"""Heads and tokens for the tests of `linear_policy_loss`, and its float64 composition."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from conformance import assert_no_worse, builds
from torch import Tensor

from reinforce_ada.ops import RolloutCorrection, linear_policy_loss

every_build = pytest.mark.parametrize("backend", builds("linear_policy_loss"), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("linear_policy_loss", every_isa=False), indirect=True)
native_build = pytest.mark.parametrize("backend", builds("linear_policy_loss", reference=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("linear_policy_loss", reference=False, every_isa=False), indirect=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

LENGTHS = (1, 4, 0, 7, 1, 11)
T, D, V = sum(LENGTHS), 19, 37
LEAVES = ("hidden", "weight", "bias")


def draw(dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = LENGTHS, width: int = D, vocab: int = V) -> dict[str, Tensor]:
    """Logits of a spread of 2, ratios of a spread of .3; the second sequence has no counted token."""
    num_tokens = sum(lengths)
    hidden, weight, bias = torch.randn(num_tokens, width), torch.randn(vocab, width) * 2 / max(width, 1) ** 0.5, torch.randn(vocab)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    ids = torch.randint(vocab, (num_tokens,))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(num_tokens) < 0.8
    if len(lengths) > 3:
        mask[cu[1] : cu[2]] = False
    mask[:1] = True
    head = (hidden.double() @ weight.double().T + bias.double()).log_softmax(-1)
    logprobs = head.gather(1, ids[:, None])[:, 0]
    others = {name: (logprobs + 0.3 * torch.randn(num_tokens)).float() for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    if dtype == torch.float64:
        others = {name: x.double() for name, x in others.items()}
    advantages = torch.randn(len(lengths))
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    return {**leaves, "token_ids": ids, "advantages": advantages, "mask": mask, "cu_seqlens": cu, **others}


def evaluate(batch: dict[str, Tensor], dtype: torch.dtype | None = None, scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """loss, metrics, and the gradients of scale * loss; tensors that no option reads are left out."""
    call = {k: v.to(dtype) if dtype and k in LEAVES else v for k, v in batch.items()}
    unread = {
        "bias": options.pop("bias", True),
        "old_logprobs": options.pop("old", True),
        "rollout_logprobs": "rollout_correction" in options,
        "ref_logprobs": "kl" in options,
    }
    call = {k: v for k, v in call.items() if unread.get(k, True)}
    leaves = {k: call[k].detach().requires_grad_() for k in LEAVES if k in call}
    loss, metrics = linear_policy_loss(**{**call, **leaves}, **options)
    grads = torch.autograd.grad(loss * scale, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True)), **metrics}


EVERYTHING = {
    "kl": "k3", "kl_coef": 0.1, "kl_weighting": "ratio", "entropy_coef": 0.2, "rollout_correction": RolloutCorrection("token", high=1.1),
    "soft_cap": 4.0, "logit_scale": 0.8, "temperature": torch.linspace(0.6, 1.7, T),
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "on-policy": {"old": False},
    "old": {},
    "no bias, scaled": {"bias": False, "logit_scale": 0.25},
    "token truncate": {"rollout_correction": RolloutCorrection("token", high=1.2)},
    "token mask": {"rollout_correction": RolloutCorrection("token", "mask", low=0.8, high=1.2)},
    "sequence truncate": {"rollout_correction": RolloutCorrection("sequence", high=1.2, normalizer=0.9)},
    "sequence mask": {"rollout_correction": RolloutCorrection("sequence", "mask", low=0.5, high=2.0), "entropy_coef": 0.1},
    "k1": {"kl": "k1", "kl_coef": 0.3},
    "k2": {"kl": "k2", "kl_coef": 0.3, "kl_weighting": "ratio"},
    "k3": {"kl": "k3", "kl_coef": 0.3},
    "k3+": {"kl": "k3+", "kl_coef": 0.3, "old": False},
    "abs": {"kl": "abs", "kl_coef": 0.3, "kl_weighting": "ratio"},
    "entropy": {"entropy_coef": 0.2, "temperature": 0.8},
    "entropy on-policy": {"entropy_coef": -0.2, "old": False, "soft_cap": 3.0},
    "sequence ratio": {"ratio_level": "sequence", "entropy_coef": 0.1},
    "everything": EVERYTHING,
}


def options_of(case: str, loss: str, loss_agg: str) -> dict[str, Any] | None:
    """None where the loss has no such options."""
    options = {**CASES[case], "loss": loss, "loss_agg": loss_agg}
    if loss == "gspo" and "ratio_level" in options:
        return None
    return options


@lru_cache
def inputs_of(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return draw(dtype)


@lru_cache(None)
def truth_and_plain(dtype: torch.dtype, case: str, loss: str, loss_agg: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    options = options_of(case, loss, loss_agg)
    assert options is not None
    batch = inputs_of(dtype)
    return evaluate(batch, torch.float64, **options, backend="reference"), evaluate(batch, **options, backend="reference")


def largest_partial_sum(batch: dict[str, Tensor], **options: Any) -> float:
    """Of the weight's gradient over the first tokens, however many: what the addition of a chunk rounds."""
    hidden, weight, bias = (batch[k].double() for k in LEAVES)
    logits = hidden @ weight.T + (bias if options.get("bias", True) else 0)
    identity = {**batch, "hidden": logits, "weight": torch.eye(len(weight))}  # the gradient of these hidden states is that of the logits
    dz = evaluate(identity, torch.float64, **{**options, "bias": False}, backend="reference")["hidden"]
    return (dz[:, :, None] * hidden[:, None]).cumsum(0).abs().max().item()


def assert_as_good(got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor], of_weight: float, what: str) -> None:
    """No further from float64 than plain torch plus 2e-6 (metrics 2e-5); `of_weight` is allowed to the weight's gradient besides."""
    assert got.keys() == truth.keys()
    for name, actual in got.items():
        tol = 2e-6 + of_weight if name == "weight" else 2e-6 if name in ("loss", *LEAVES) else 2e-5
        assert_no_worse(actual, truth[name].double(), plain[name], tol, f"{what}: {name}")
