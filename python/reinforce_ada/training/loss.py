"""From kept completions to a loss: advantages from the pools' statistics, then the fused policy loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reinforce_ada import ops
from reinforce_ada.advantages import advantages_before_prediction
from reinforce_ada.config import Config
from reinforce_ada.errors import InputError
from reinforce_ada.loading import described
from reinforce_ada.ops import RolloutCorrection
from reinforce_ada.ops.policy_loss.custom import loss_of
from reinforce_ada.ops.policy_loss.settings import CustomLoss
from reinforce_ada.sampling import Policy, configured
from reinforce_ada.training.batching import Batch, Sample
from reinforce_ada.training.language_model import LanguageModel, token_logprobs
from reinforce_ada.training.predictor import PassRatePredictor
from reinforce_ada.training.task_defaults import max_tokens_of
from reinforce_ada.types import SamplingResult


def samples_with_advantages(result: SamplingResult, policy: Policy) -> list[list[Sample]]:
    """Return the groups that kept something, with an advantage on each completion; see `advantages_before_prediction`."""
    rows = zip(result.groups, *advantages_before_prediction(result, policy), strict=True)
    return [
        [Sample(g.pool.prompt, s.completion, a, factor) for s, a in zip(g.kept, advantages, strict=True)]
        for g, advantages, factor in rows
        if g.kept
    ]


def num_seqs_of(minibatch: Sequence[Sample], result: SamplingResult, policy: Policy, num_minibatches: int) -> float:
    """Return the number of completions by which a minibatch's loss is divided, if it averages over them.

    It is the minibatch's own count; for a policy with an objective it is group_size * prompts that entered / minibatches, whatever was
    kept: if the denominator depends on the outcomes, the mean of the quotient is not the quotient of the means. The gradients of a step's
    minibatches add up to `num_minibatches` times that of the whole, however many groups there are and wherever each falls.
    """
    if policy.objective is not None:
        return policy.group_size * len(result.pools) / num_minibatches
    return len(minibatch)


_NO_CLIPPING = 1e6  # a max_grad_norm from here on counts as none


def loss_agg_of(config: Config) -> str:
    """Return the configured aggregation. By default it is token-mean, or one with a fixed denominator for a policy with an objective."""
    if config.training.loss_agg is not None:
        return config.training.loss_agg
    return "seq-mean-token-sum-norm" if configured(config.sampling).objective is not None else "token-mean"


def inexact(config: Config, policy: Policy) -> str:
    """Return in one line what keeps objective "mean" from being exact in this configuration; "" if nothing does."""
    t = config.training
    if policy.objective != "mean":
        return ""
    causes = []
    loss_agg = loss_agg_of(config)
    if not loss_agg.startswith("seq-mean-token-sum"):
        causes.append(f"loss_agg {loss_agg!r} has a denominator that depends on the outcomes (seq-mean-token-sum and -norm do not)")
    if t.minibatches > 1:
        causes.append(f"from the second of {t.minibatches} minibatches on the weights are no longer those that sampled (minibatches 1)")
    if t.entropy_coef:
        causes.append(f"entropy_coef {t.entropy_coef} adds an objective of its own (entropy_coef 0)")
    if config.sampling.truncation:
        causes.append(f"{config.sampling.truncation} samples from another distribution than the one whose gradient is taken (leave it out)")
    if t.kl_coef:
        causes.append(f"kl_coef {t.kl_coef} adds the KL to a reference as an objective of its own (kl_coef 0)")
    if ":" in t.loss:
        causes.append(f"loss {t.loss} may have another gradient than -advantage where the ratio is 1 (the built-in losses have that one)")
    if t.max_grad_norm < _NO_CLIPPING:
        causes.append(f"gradients longer than max_grad_norm {t.max_grad_norm:g} are cut, the longer the more (max_grad_norm 1e6)")
    return f'objective "mean" is only approximate here: {"; ".join(causes)}' if causes else ""


@dataclass(frozen=True, slots=True)
class RunLoss:
    """The loss of the configuration, exact under gradient accumulation: denominators are those of the whole minibatch."""

    loss: str | CustomLoss
    loss_agg: str
    clip_low: float
    clip_high: float
    entropy_coef: float
    kl: str | None  # the estimator; None: no KL
    kl_coef: float
    rollout_correction: RolloutCorrection | None
    temperature: float
    norm_length: int

    @classmethod
    def from_config(cls, config: Config) -> RunLoss:
        """Return the loss that a configuration describes. Raises: InputError for settings that the loss refuses."""
        t = config.training
        correction = None
        if t.rollout_correction != "none" and config.sampling.truncation:
            given = f"rollout_correction {t.rollout_correction} with {config.sampling.truncation}"
            needed = "one of them: its weights would be the sampled share of each token's distribution, not the difference of two engines"
            raise InputError("train", given, needed, "docs/evaluation.md")
        if t.rollout_correction != "none":
            level, mode = t.rollout_correction.split("-")
            correction = RolloutCorrection(level=level, mode=mode, high=t.correction_high)
        loss = cls(
            loss=loss_of("train", t.loss),
            loss_agg=loss_agg_of(config),
            clip_low=t.clip_low,
            clip_high=t.clip_high,
            entropy_coef=t.entropy_coef,
            kl=t.kl_estimator if t.kl_coef else None,
            kl_coef=t.kl_coef,
            rollout_correction=correction,
            temperature=config.sampling.temperature,
            norm_length=max_tokens_of(config),
        )
        loss._check(t.loss)
        return loss

    def _check(self, named: str) -> None:
        """Compute the loss and gradient of some tokens, so that a refused setting or a failing loss is known before sampling.

        Raises: InputError, which names a custom loss as it was `named`.
        """
        names = ("loss", "loss_agg", "clip_low", "clip_high", "kl", "kl_coef", "rollout_correction")
        settings = {name: getattr(self, name) for name in names}
        drift = torch.tensor([0.0, 0.0, -1.0, 1.0, -1.0, 1.0])  # ratios of 1, and clipped ones, for advantages of both signs and of 0
        logprobs = torch.tensor([-0.5, -1.0, -1.5, -2.0, -0.5, -20.0]).requires_grad_()
        old, advantages, offsets = logprobs.detach() - drift, torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0, 2, 4, 6])
        try:
            loss, _ = ops.policy_loss(
                logprobs, advantages, torch.tensor([1, 1, 1, 1, 1, 0]) != 0, old_logprobs=old, rollout_logprobs=old,
                ref_logprobs=None if self.kl is None else old, cu_seqlens=offsets, entropy=-old, entropy_coef=self.entropy_coef,
                backend="reference", **settings,
            )  # fmt: skip
            torch.autograd.backward(loss)
        except InputError:
            raise
        except Exception as error:  # whatever the code of a loss raises
            needed = "one loss a token from (logprobs, old_logprobs, advantages, mask) is needed"
            raise InputError("train", f"loss {named}: {described(error)}", needed) from error

    def __call__(
        self, model: LanguageModel, batch: Batch, old_logprobs: Tensor | None, num_tokens: int, num_seqs: float,
        predictor: PassRatePredictor | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:  # fmt: skip
        """Return loss and metrics of one micro-batch.

        Args:
            old_logprobs: [T] of the weights before the step's first update; None while the weights are still these (ratio 1).
            num_tokens, num_seqs: of the whole minibatch (see `num_seqs_of`); micro-batch losses then sum to its loss.
            predictor: completes the advantages, where the policy's baseline is predicted.
        """
        settings: dict[str, Any] = {
            "old_logprobs": old_logprobs,
            "rollout_logprobs": batch.rollout_logprobs,
            "cu_seqlens": batch.cu_seqlens,
            "advantages_per": "sequence",
            "loss": self.loss,
            "loss_agg": self.loss_agg,
            "clip_low": self.clip_low,
            "clip_high": self.clip_high,
            "rollout_correction": self.rollout_correction,
            "ref_logprobs": batch.ref_logprobs,
            "kl": self.kl,
            "kl_coef": self.kl_coef,
            "num_tokens_global": max(num_tokens, 1),
            "num_seqs_global": num_seqs,
            "norm_length": self.norm_length if self.loss_agg == "seq-mean-token-sum-norm" else None,
        }
        mask = batch.token_mask
        if not model.use_head:
            return ops.policy_loss(token_logprobs(model, batch, self.temperature), batch.advantages, mask, **settings)
        hidden, head = model.hidden(batch), model.head()
        advantages = batch.advantages if predictor is None else predictor.complete(batch, hidden)
        settings["entropy_coef"] = self.entropy_coef
        form: dict[str, Any] = {"bias": head.bias, "logit_scale": head.logit_scale, "soft_cap": head.soft_cap}
        form["temperature"] = self.temperature
        if isinstance(self.loss, str):
            return ops.linear_policy_loss(hidden, head.weight, batch.token_ids, advantages, mask, **form, **settings)
        # linear_policy_loss has only the reference for it, which keeps all logits.
        scored = ops.linear_token_logprobs(hidden, head.weight, batch.token_ids, entropy=self.entropy_coef != 0, **form)
        logprobs, entropy = (scored, None) if isinstance(scored, Tensor) else (scored.logprobs, scored.entropy)
        return ops.policy_loss(logprobs, advantages, mask, entropy=entropy, **settings)


def combine_metrics(parts: Iterable[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Merge the metrics of several micro-batches: counts add, extremes stay extreme, the rest is averaged by tokens."""
    values: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
    for metrics, num_tokens in parts:
        for name, value in metrics.items():
            values[name].append((value, num_tokens))
    return {name: _combined(name, pairs) for name, pairs in values.items()}


def _combined(name: str, pairs: list[tuple[float, int]]) -> float:
    if name.startswith("num_"):
        return sum(value for value, _ in pairs)
    if name.endswith("_max"):
        return max(value for value, _ in pairs)
    if name.endswith("_min"):
        return min(value for value, _ in pairs)
    total = sum(count for _, count in pairs)
    return sum(value * count for value, count in pairs) / total if total else 0.0
