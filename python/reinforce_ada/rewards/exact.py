"""The reward of tasks whose record has an `answer`: right or wrong."""

from __future__ import annotations

import contextlib
import math

from reinforce_ada.errors import InputError
from reinforce_ada.rewards.answers import extract_answer
from reinforce_ada.types import Prompt


def exact_match(prompt: Prompt, completion: str) -> float:
    """1.0 when the completion's answer equals `prompt.data["answer"]`, else 0.0.

    Both are stripped; where both read as finite numbers they are compared as numbers: "12.0" and "1,200" match 12 and "1200".
    The completion's answer is what `extract_answer` finds.

    Args:
        prompt: its data holds "answer", a string or a number.
        completion: the sampled text.
    Raises: InputError when there is no "answer".
    """
    if "answer" not in prompt.data:
        raise InputError("exact_match", f"prompt {prompt.prompt_id!r} has no answer", 'data["answer"] is needed')
    given, expected = extract_answer(completion), str(prompt.data["answer"]).strip()
    given_number, expected_number = _number(given), _number(expected)
    if given_number is not None and expected_number is not None:
        return float(given_number == expected_number)
    return float(given == expected)


def _number(text: str) -> int | float | None:
    """The finite number a text spells, exact for integers (past 2**53 a float would call neighbours equal)."""
    plain = text.replace(",", "")
    with contextlib.suppress(ValueError):  # also past the 4300 digits int() reads
        return int(plain)
    with contextlib.suppress(ValueError):
        value = float(plain)
        return value if math.isfinite(value) else None
    return None
