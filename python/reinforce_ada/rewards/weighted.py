"""Several rewards as one: their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.rewards.loading import as_reward, check_reward
from reinforce_ada.rewards.protocol import Reward
from reinforce_ada.types import Prompt

_MAX_WEIGHT = 1e6  # in magnitude


class WeightedSum:
    """The reward sum_i weight_i * reward_i(prompt, completion), a Reward itself.

    If one of them raises, the whole attempt has failed. If the call runs out of time, it is made once more with the values that the rewards
    declare for this case (see `Reward`); a reward that declares none is called again.

    Args:
        parts: pairs (weight, reward) with finite weights other than 0.
    Raises: InputError for another weight, or for a reward that cannot be called as one.
    """

    def __init__(self, parts: Sequence[tuple[float, Reward]]) -> None:
        self.parts = tuple(parts)
        for weight, reward in self.parts:
            check_weight(weight, "WeightedSum")
            check_reward(reward, repr(reward))

    def __call__(self, prompt: Prompt, completion: str) -> float:
        return math.fsum(weight * as_reward(reward(prompt, completion)) for weight, reward in self.parts)

    @property
    def timed_out(self) -> Reward | None:
        """Return the call that is made after a time-out; None if no reward declares a value for it."""
        late = [(weight, getattr(reward, "timed_out", None)) for weight, reward in self.parts]
        if all(call is None for _, call in late):
            return None
        return WeightedSum([(weight, call or reward) for (weight, call), (_, reward) in zip(late, self.parts, strict=True)])

    @property
    def prepare(self) -> Callable[[], None] | None:
        """Return the call that prepares the rewards; None if one of them may load something in its first call."""
        calls = [getattr(reward, "prepare", None) for _, reward in self.parts]
        if any(call is None and not _is_ours(reward) for call, (_, reward) in zip(calls, self.parts, strict=True)):
            return None
        return partial(_call_all, [call for call in calls if call is not None])


def check_weight(weight: float, where: str) -> None:
    """Raise InputError unless the weight is a finite number other than 0."""
    if not (0 < abs(weight) <= _MAX_WEIGHT):
        raise InputError(where, f"reward with the weight {weight:g}", f"a number other than 0 and at most {_MAX_WEIGHT:g} is needed")


def _is_ours(reward: object) -> bool:
    return str(getattr(reward, "__module__", "")).startswith("reinforce_ada.rewards.")


def _call_all(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()
