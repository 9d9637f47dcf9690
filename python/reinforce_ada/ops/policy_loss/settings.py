"""The words of the policy losses: what can be chosen, what is measured, and the record that carries the choices to every form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reinforce_ada.errors import InputError, unknown_name

WHERE = "policy_loss"
LOSSES = ("reinforce", "ppo", "cispo", "gspo", "sapo")
LOSS_AGGS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")
CORRECTION_LEVELS = ("token", "sequence")
CORRECTION_MODES = ("truncate", "mask")

LOG_RATIO_BOUND = 20.0  # e^20 = 4.9e8: a log-ratio past it says nothing more, and its exponential still fits fp32
SEQUENCE_LOG_RATIO_BOUND = 10.0  # gspo's bound on the mean log-ratio, above only
KL_BOUND = 10.0  # of the k3 estimate
SAPO_TAU = (1.0, 1.05)  # temperature for advantage > 0, and for the others

# Every form returns these in this order; those that do not apply are left out of the dictionary the caller gets.
METRICS = (
    "num_tokens",
    "num_masked",
    "approx_kl_k1",
    "approx_kl_k3",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction_dual",
    "rollout_kl_k1",
    "rollout_kl_k3",
    "rollout_weight_mean",
    "rollout_weight_max",
    "effective_sample_size",
    "kl",
)


@dataclass(frozen=True, slots=True)
class RolloutCorrection:
    """Importance weights for tokens that an engine sampled with slightly other probabilities than the trainer computes.

    `rho = exp(clamp(old_logprobs - rollout_logprobs, -20, 20))`, of each token or of a sequence's sum; `truncate` gives
    `min(rho, high)`, `mask` gives rho inside `[low, high]` and 0 outside. The weight multiplies the token's loss and carries no
    gradient; the denominators of the aggregation keep counting a token whose weight is 0.

    Args:
        level: "token", or "sequence": one weight for all tokens of a sequence.
        mode: "truncate" (TIS) or "mask" (IcePop).
        low: smallest weight kept by "mask"; None for no lower bound. "truncate" has none.
        high: largest weight, > 0.

    Raises:
        InputError: for bounds that cannot hold.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float | None = None
    high: float = 2.0

    def __post_init__(self) -> None:
        where = "RolloutCorrection"
        if self.level not in CORRECTION_LEVELS:
            raise unknown_name(where, "level", self.level, CORRECTION_LEVELS)
        if self.mode not in CORRECTION_MODES:
            raise unknown_name(where, "mode", self.mode, CORRECTION_MODES)
        if not self.high > 0:
            raise InputError(where, f"high={self.high}", "high > 0")
        if self.low is not None and self.mode == "truncate":
            raise InputError(where, f'low={self.low} with mode="truncate"', "truncation only has high", 'use mode="mask"')
        if self.low is not None and not 0 <= self.low <= self.high:
            raise InputError(where, f"low={self.low}, high={self.high}", "0 <= low <= high")


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked choices of one `policy_loss` call; fields as its arguments."""

    loss: str = "ppo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    loss_agg: str = "token-mean"
    num_tokens_global: float | None = None
    num_seqs_global: float | None = None
    norm_length: float | None = None
    rollout_correction: RolloutCorrection | None = None
    kl: str | None = None
    kl_coef: float = 0.0
    advantages_per_token: bool = False

    def named(self, metrics: Tensor, *, has_old: bool, has_rollout: bool) -> dict[str, Tensor]:
        """The metrics that mean something for these settings and inputs, by name; `metrics` is in the order of `METRICS`."""
        names = {"num_tokens", "num_masked"}
        if has_old:
            names |= {"approx_kl_k1", "approx_kl_k3", "ratio_mean", "ratio_min", "ratio_max"}
            if self.loss in ("ppo", "cispo", "gspo"):
                names |= {"clip_fraction_low", "clip_fraction_high"}
            if self.dual_clip is not None:
                names |= {"clip_fraction_dual"}
        if has_rollout:
            names |= {"rollout_kl_k1", "rollout_kl_k3"}
        if self.rollout_correction is not None:
            names |= {"rollout_weight_mean", "rollout_weight_max", "effective_sample_size"}
        if self.kl is not None:
            names |= {"kl"}
        return {name: x for name, x in zip(METRICS, metrics.unbind(), strict=True) if name in names}
