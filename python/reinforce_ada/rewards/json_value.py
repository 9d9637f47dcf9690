"""The reward for answers in JSON: equal as values, whatever their spelling."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from reinforce_ada.outside import GarbageError, parse_json
from reinforce_ada.rewards.answers import accepted_answers, after_thoughts, unreadable
from reinforce_ada.types import Prompt

_WHERE = "reward json"
_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)
_TAG = re.compile(r"<answer>|</answer>", re.IGNORECASE)


def json_match(prompt: Prompt, completion: str) -> float:
    """Return 1.0 if the completion is JSON equal to `prompt.data["answer"]`, or to one element of it if that is a list, else 0.0.

    The JSON is the content of the last fenced block (```), otherwise of the last <answer>, otherwise the whole text after a model's
    thoughts. An answer that is a text is JSON too; so the text "Paris" is written '"Paris"'. Objects are equal in any order of their keys.
    Numbers are compared exactly, and 1.0 equals 1; a number never equals true, false or a text. NaN, an infinity and an object with a
    duplicate key are no JSON. The time is linear in the text.

    Raises: InputError when the record has no answer, or one that is no JSON.
    """
    rights = values_of_answers(prompt)
    try:
        found = _parsed(_answer(after_thoughts(completion)))
    except GarbageError:
        return 0.0
    return float(any(_equal(found, right) for right in rights))


def values_of_answers(prompt: Prompt) -> list[Any]:
    """Return the JSON values of a record's answers. Raises: InputError when there is no answer, or one that is no JSON."""
    return [_right(answer if isinstance(answer, str) else json.dumps(answer)) for answer in accepted_answers(prompt, _WHERE)]


@lru_cache(maxsize=4096)
def _right(answer: str) -> Any:
    try:
        return _parsed(answer)
    except GarbageError as error:
        raise unreadable(_WHERE, answer, f"an answer that is JSON is needed ({error}); a text stands in quotes") from None


def _answer(text: str) -> str:
    if fences := list(_FENCE.finditer(text)):
        last = fences[-1] if len(fences) % 2 else fences[-2]  # a last one alone opens a block that ends with the text
        return text[last.end() :] if last is fences[-1] else text[last.end() : fences[-1].start()]
    if tags := list(_TAG.finditer(text)):
        opened = [i for i, tag in enumerate(tags) if tag[0][1] != "/"]
        if opened:
            at = opened[-1]
            return text[tags[at].end() : tags[at + 1].start() if at + 1 < len(tags) else len(text)]
    return text


def _parsed(text: str) -> Any:
    return parse_json(text, unique_keys=True, exact_numbers=True)


def _equal(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal, without recursion, which deep nesting would exhaust."""
    pairs = [(a, b)]
    while pairs:
        left, right = pairs.pop()
        if type(left) is not type(right):  # a Decimal equals True in Python
            return False
        if isinstance(left, dict):
            if left.keys() != right.keys():
                return False
            pairs += [(value, right[key]) for key, value in left.items()]
        elif isinstance(left, list):
            if len(left) != len(right):
                return False
            pairs += zip(left, right, strict=True)
        elif left != right:
            return False
    return True
