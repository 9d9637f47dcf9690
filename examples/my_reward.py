"""A reward of your own: `reward = "my_reward:score"` in the configuration, or `--reward ./my_reward.py:score`."""

from __future__ import annotations

from reinforce_ada.types import Prompt


def score(prompt: Prompt, completion: str) -> float:
    """1 for the right number, 0.2 for a wrong one, 0 for anything that is no number; `prompt.data` is the record of the task."""
    text = completion.strip()
    if not text.isdecimal():
        return 0.0
    return 1.0 if int(text) == int(prompt.data["answer"]) else 0.2
