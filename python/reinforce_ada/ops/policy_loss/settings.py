"""The names of the policy losses: the choices, and the metrics."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from reinforce_ada.errors import InputError, unknown_name

WHERE = "policy_loss"
LOSSES = ("reinforce", "ppo", "cispo", "gspo", "sapo")
CustomLoss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # logprobs, old_logprobs, advantages, mask -> one loss a token
LOSS_AGGS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+")
CORRECTION_LEVELS = ("token", "sequence")
CORRECTION_MODES = ("truncate", "mask")
RATIO_LEVELS = ("token", "sequence")
KL_WEIGHTINGS = ("none", "ratio")
ADVANTAGES_PER = ("sequence", "token")

LOG_RATIO_BOUND = 20.0  # verl's: e^20 = 4.9e8, a log-ratio past it says nothing more
SEQUENCE_LOG_RATIO_BOUND = 10.0  # gspo's bound on the mean log-ratio, above only
KL_BOUND = 10.0  # verl's, of the k3 estimate
KL_LOG_RATIO_BOUND = 20.0  # of what k3 is computed from, where it is bounded
_LARGEST_INTEGER = int(sys.float_info.max)
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
    "entropy",
)


def check_integers(where: str, of: object, names: Sequence[str]) -> None:
    """Raise InputError for an integer that no float holds, since kernels compute with floats."""
    for name in names:
        value = getattr(of, name)
        if type(value) is int and abs(value) > _LARGEST_INTEGER:
            raise InputError(where, f"{name} is an integer of {value.bit_length()} bits", "a number that a float holds")


@dataclass(frozen=True, slots=True)
class RolloutCorrection:
    """Importance weights for tokens that an engine sampled with slightly other probabilities than the trainer computes.

    `rho = exp(old_logprobs - rollout_logprobs)` is taken per token or from a sequence's sum, with the exponent within `log_ratio_bound`;
    `truncate` gives `clamp(rho, low, high)`, `mask` gives rho inside `[low, high]` and 0 outside. The weight multiplies the token's
    loss, not its KL or entropy, and carries no gradient; the denominators of the aggregation keep counting a token of weight 0.

    Args:
        level: "token", or "sequence": one weight for all tokens of a sequence.
        mode: "truncate" (TIS) or "mask" (IcePop).
        low: smallest weight that is kept; None for no lower bound.
        high: largest weight, > 0; math.inf for no upper bound.
        normalizer: every weight is divided by it, > 0. verl's batch normalisation: the mean weight of the whole batch, which is the
            metric rollout_weight_mean of a call over all of it.
        allow_missing: NaN in rollout_logprobs means that the engine gave none: the token's own rho is 1, as in TRL.

    Raises:
        InputError: for bounds that cannot hold.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float | None = None
    high: float = 2.0
    normalizer: float = 1.0
    allow_missing: bool = False

    def __post_init__(self) -> None:
        where = "RolloutCorrection"
        check_integers(where, self, ("low", "high", "normalizer"))
        if self.level not in CORRECTION_LEVELS:
            raise unknown_name(where, "level", self.level, CORRECTION_LEVELS)
        if self.mode not in CORRECTION_MODES:
            raise unknown_name(where, "mode", self.mode, CORRECTION_MODES)
        if not self.high > 0:
            raise InputError(where, f"high={self.high}", "high > 0")
        if self.low is not None and not 0 <= self.low <= self.high:
            raise InputError(where, f"low={self.low}, high={self.high}", "0 <= low <= high")
        if not 0 < self.normalizer < math.inf:
            raise InputError(where, f"normalizer={self.normalizer}", "a finite number > 0")
