"""Inputs of a form of linear_policy_loss. Device-independent."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from reinforce_ada.ops.policy_loss.contract import Settings

WHERE = "linear_policy_loss"


class Inputs(NamedTuple):
    """The checked arguments of the public function; tokens are [T] with cu_seqlens, or [N, L] without."""

    hidden: Tensor  # [T, D] or [N, L, D]
    weight: Tensor  # [V, D]
    token_ids: Tensor
    bias: Tensor | None  # [V]
    logit_scale: float
    soft_cap: float | None
    temperature: float | Tensor
    advantages: Tensor  # this and the next four without gradient, in the dtype that is computed in
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    mask: Tensor
    cu_seqlens: Tensor | None
    settings: Settings
    max_extra_bytes: int | None
    weight_grad: Tensor | None

    @property
    def flat_temperature(self) -> float | Tensor:
        """Return the temperature as one number, or as [T]."""
        return self.temperature.flatten() if isinstance(self.temperature, Tensor) else self.temperature
