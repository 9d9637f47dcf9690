"""The reward for tasks whose records have an `answer`: right or wrong."""

from __future__ import annotations

import re
from collections.abc import Hashable
from decimal import Decimal, InvalidOperation

from reinforce_ada.rewards.answers import accepted_answers, extract_answer
from reinforce_ada.types import Prompt

# ASCII digits, in groups of three or in none; a point and an exponent as Python writes them; U+2212 is the minus sign of typeset text.
_NUMBER = re.compile(r"[+\-\u2212]?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,6})?")


def exact_match(prompt: Prompt, completion: str) -> float:
    """Return 1.0 if the completion's answer equals `prompt.data["answer"]`, or one element of it if that is a list, otherwise 0.0.

    Both are stripped. Two numbers are compared as numbers, exactly: "12.0" and "1,200" match 12 and "1200", but "1,2" and "1_200" are not
    numbers and match only themselves. `extract_answer` finds the completion's answer.

    An answer is a string or a number, or a list of them. Raises: InputError when there is no "answer".
    """
    given = extract_answer(completion)
    number, texts = _number(given), [str(one).strip() for one in accepted_answers(prompt, "exact_match")]
    return float(given in texts or (number is not None and any(number == _number(text) for text in texts)))


def answer_given(completion: str) -> Hashable | None:
    """Return what `exact_match` compares: the completion's answer, as a Decimal if it is a number; None if it is empty."""
    text = extract_answer(completion)
    number = _number(text)
    return (text or None) if number is None else number


def _number(text: str) -> Decimal | None:
    """Return the exact number that a text spells: past 2**53 a float would make neighbours equal."""
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:  # an exponent past what a decimal holds
        return None
