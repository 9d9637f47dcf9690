"""The baselines of the operators: the implementations of trainers and libraries, each computing the same as ours."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reinforce_ada.bench.case import Candidate

Implementation = Callable[[Tensor, Tensor], Any]  # of a pass over (logits, ids) or (hidden, weight)
R = TypeVar("R")


def compiled(form: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with inductor for fixed shapes, which is the fastest that plain PyTorch offers."""
    return torch.compile(form, dynamic=False)


def runnable(found: Mapping[str, tuple[str | None, R]]) -> tuple[dict[str, R], dict[str, str]]:
    """Split baselines (name: (why it cannot run or None, the baseline)) into those that can run and the reasons of the others."""
    absent = {name: reason for name, (reason, _) in found.items() if reason}
    return {name: run for name, (_, run) in found.items() if name not in absent}, absent


def candidates(found: Mapping[str, R], call: Callable[[R], Any]) -> list[Candidate]:
    """Return a candidate for each baseline, which runs `call(baseline)`."""
    return [Candidate(name, partial(call, run)) for name, run in found.items()]


def missing(package: str, device: str, needs_gpu: bool = False) -> str | None:
    """Return why a baseline of another package cannot run here, or None if it can be tried."""
    if needs_gpu and device != "cuda":
        return "needs a GPU"
    return None if importlib.util.find_spec(package) else f"{package} is not installed (extra `bench`)"


def reading(num_bytes: int, device: str) -> Candidate:
    """Return the read ceiling: a sum over as many bytes."""
    x = torch.ones(num_bytes // 4, device=device)
    return Candidate("reading its bytes", x.sum, floor=True)


# -------------------- log-probabilities of tokens, from logits


def log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute logprobs in naive eager PyTorch."""
    return logits.float().log_softmax(-1).gather(1, ids[:, None]).squeeze(1)


def logsumexp(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute logprobs in the fastest way in eager PyTorch, which is also the fastest when compiled."""
    return logits.gather(1, ids[:, None]).squeeze(1).float() - logits.float().logsumexp(-1)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute logprobs by PyTorch's own fused operator."""
    return -F.cross_entropy(logits.float(), ids, reduction="none")


def trl(logits: Tensor, ids: Tensor) -> Tensor:
    """Work row by row, as TRL's selective_log_softmax does; in bf16 take the log-softmax of a whole row in bf16."""
    if logits.dtype == torch.float32:
        chosen = logits.gather(1, ids[:, None]).squeeze(1)
        return chosen - torch.stack([row.logsumexp(-1) for row in logits])
    return torch.stack([row.log_softmax(-1)[i] for row, i in zip(logits, ids, strict=True)])


def entropy_by_log_softmax(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logprobs and entropy in naive eager PyTorch."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(1, ids[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def entropy_by_logsumexp(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute logprobs, and the entropy as logsumexp - Σ p z, as verl does."""
    z = logits.float()
    lse = z.logsumexp(-1)
    return z.gather(1, ids[:, None]).squeeze(1) - lse, lse - ((z - lse[:, None]).exp() * z).sum(-1)


# -------------------- advantages of groups


def index_add(rewards: Tensor, group_of: Tensor, groups: int, with_std: bool, dtype: torch.dtype) -> Tensor:
    """Compute advantages from sums by index_add in `dtype` (our sums are float64)."""
    r = rewards.to(dtype)
    count = r.new_zeros(groups).index_add_(0, group_of, torch.ones_like(r))
    mean = r.new_zeros(groups).index_add_(0, group_of, r) / count.clamp(min=1)
    centred = r - mean[group_of]
    if not with_std:
        return centred.float()
    m2 = r.new_zeros(groups).index_add_(0, group_of, centred * centred)
    return (centred / ((m2 / (count - 1).clamp(min=1)).sqrt() + 1e-6)[group_of]).float()


def bincount(rewards: Tensor, group_of: Tensor, groups: int, with_std: bool) -> Tensor:
    """Compute advantages from sums by numpy's bincount, which are float64, on the CPU."""
    r, g = rewards.numpy(), group_of.numpy()
    count = np.bincount(g, minlength=groups)
    mean = np.bincount(g, weights=r, minlength=groups) / np.maximum(count, 1)
    centred = r - mean[g]
    if with_std:
        m2 = np.bincount(g, weights=centred * centred, minlength=groups)
        centred /= (np.sqrt(m2 / np.maximum(count - 1, 1)) + 1e-6)[g]
    return torch.from_numpy(centred.astype(np.float32))


def verl_loop(rewards: Tensor, group_of: Tensor, with_std: bool) -> Tensor:
    """Loop over completions and groups in Python, a tensor each, as verl's compute_grpo_outcome_advantage does."""
    scores, of = rewards.clone(), group_of.tolist()
    members: dict[int, list[Tensor]] = defaultdict(list)
    for i, group in enumerate(of):
        members[group].append(scores[i])
    stacked = {group: torch.stack(found) for group, found in members.items()}
    mean = {group: found.mean() for group, found in stacked.items()}
    std = {group: found.std() for group, found in stacked.items()} if with_std else {}
    for i, group in enumerate(of):
        scores[i] = (scores[i] - mean[group]) / (std[group] + 1e-6) if with_std else scores[i] - mean[group]
    return scores


# -------------------- policy losses, with the metrics that ours returns

LossInputs = dict[str, Tensor]
PPO = ["num_tokens", "num_masked", "clip_fraction_low", "clip_fraction_high", "approx_kl_k1", "approx_kl_k3"]
PPO += ["ratio_mean", "ratio_min", "ratio_max"]
FULL = [*PPO, "rollout_weight_mean", "rollout_weight_max", "effective_sample_size", "kl", "rollout_kl_k1", "rollout_kl_k3"]


def per_token(b: LossInputs) -> Tensor:
    """Return the advantages in the layout of the tokens."""
    if "cu_seqlens" not in b:
        return b["advantages"][:, None]
    return torch.repeat_interleave(b["advantages"], b["cu_seqlens"].diff(), output_size=len(b["mask"]))


def ppo(b: LossInputs) -> tuple[Tensor, ...]:
    """Compute the token-mean PPO loss and the metrics of PPO."""
    mask, tokens, adv = b["mask"], b["mask"].sum(), per_token(b)
    d = (b["logprobs"] - b["old"]).clamp(-20, 20)
    ratio = d.exp()
    loss = (torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.28)) * mask).sum() / tokens
    return loss, *_ppo_metrics(mask, tokens, adv, d.detach(), ratio.detach())


def ppo_with_correction_and_kl(b: LossInputs) -> tuple[Tensor, ...]:
    """Compute the loss of `ppo` with a truncated rollout correction and k3 to a reference, and the metrics of FULL."""
    mask, tokens, adv = b["mask"], b["mask"].sum(), per_token(b)
    d = (b["logprobs"] - b["old"]).clamp(-20, 20)
    ratio = d.exp()
    gap = (b["old"] - b["rollout"]).clamp(-20, 20)
    weight = gap.exp().clamp(max=2)
    y = (b["ref"] - b["logprobs"]).clamp(-20, 20)
    kl = (y.exp() - y - 1).clamp(max=10)
    loss = ((torch.max(-adv * ratio, -adv * ratio.clamp(0.8, 1.28)) * weight + 0.01 * kl) * mask).sum() / tokens
    metrics = _ppo_metrics(mask, tokens, adv, d.detach(), ratio.detach())
    with torch.no_grad():
        w = weight * mask
        metrics += [w.sum() / tokens, w.max(), w.sum() ** 2 / (tokens * (w * w).sum()), (kl * mask).sum() / tokens]
        metrics += [-(gap * mask).sum() / tokens, ((gap.exp() - 1 - gap) * mask).sum() / tokens]
    return loss, *metrics


def _ppo_metrics(mask: Tensor, tokens: Tensor, adv: Tensor, d: Tensor, ratio: Tensor) -> list[Tensor]:
    with torch.no_grad():
        low, high = (adv < 0) & (ratio < 0.8) & mask, (adv > 0) & (ratio > 1.28) & mask
        metrics = [tokens, (~mask).sum(), low.sum() / tokens, high.sum() / tokens]
        metrics += [-(d * mask).sum() / tokens, ((ratio - 1 - d) * mask).sum() / tokens]
        return [*metrics, (ratio * mask).sum() / tokens, ratio.where(mask, torch.inf).min(), ratio.where(mask, -torch.inf).max()]
