"""Rewards for short trainings of an untrained model, by "toy_rewards:name"."""

from __future__ import annotations

from reinforce_ada.types import Prompt


def even_length(prompt: Prompt, text: str) -> float:
    """Right about half of the time."""
    return float(len(text) % 2 == 0)


def constant(prompt: Prompt, text: str) -> float:
    """No signal, ever."""
    return 1.0


def as_told(prompt: Prompt, text: str) -> float:
    """Raises or hangs where the record says so."""
    if prompt.data.get("do") == "raise":
        raise RuntimeError("told to")
    while prompt.data.get("do") == "hang":
        pass
    return float(len(text) % 2)
