"""What a completion answers, as its reward reads it: the votes of maj@k."""

from __future__ import annotations

from reinforce_ada.rewards.exact import answer_given, exact_match
from reinforce_ada.rewards.loading import load_reward
from reinforce_ada.rewards.protocol import Answer, Answering


def answer_of_reward(reward: object) -> Answer | None:
    """Return the function that reads a completion's answer; None for a reward that names none.

    Args:
        reward: an object with a method `answer`, `exact_match`, or the name of one, as "module:object".
    """
    loaded = load_reward(reward) if isinstance(reward, str) else reward
    if isinstance(loaded, Answering):
        return loaded.answer
    return answer_given if loaded is exact_match else None
