"""exact_match and extract_answer, by tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import exact_match
from reinforce_ada.rewards.answers import extract_answer
from reinforce_ada.types import Prompt


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("  42 \n", "42"),
        ("", ""),
        ("The answer is 42", "The answer is 42"),
        ("Answer: 42", "42"),
        ("answer: 1\nno wait\nFinal ANSWER : 2 \n", "2"),
        ("<answer>7</answer>", "7"),
        ("<answer>7</answer> or <Answer>\n8\n</ANSWER> done", "8"),
        ("<answer>7</answer> answer: 9", "7"),
        ("<answer>7", "<answer>7"),
        ("an unanswer: 3", "an unanswer: 3"),
        ("answer:", ""),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@settings(max_examples=30)
@given(text=st.text().filter(lambda t: "answer" not in t.lower()))
def test_text_without_a_label_is_its_own_answer(text: str) -> None:
    assert extract_answer(text) == text.strip()
    assert extract_answer(f"{text} answer: {text}") == text.strip()


@pytest.mark.parametrize(
    ("expected", "completion", "reward"),
    [
        ("12", " 12\n", 1.0),
        (12, "12.0", 1.0),
        ("12", "answer: 12", 1.0),
        ("1200", "1,200", 1.0),
        ("0.5", ".50", 1.0),
        ("12", "13", 0.0),
        ("12", "12 apples", 0.0),
        ("12", "", 0.0),
        ("Paris", "Paris", 1.0),
        ("Paris", "paris", 0.0),
        ("nan", "nan", 1.0),
        ("nan", "NaN", 0.0),
        ("9007199254740993", "9007199254740992", 0.0),
        ("inf", "1e999", 0.0),
        ("-0", "0", 1.0),
        (True, "True", 1.0),
        ("1" * 400, "1" * 400, 1.0),
        ("1", "1" * 400, 0.0),
        ("1.5", "1" * 400, 0.0),
        ("1" * 5000, "1" * 5000, 1.0),
    ],
)
def test_exact_match(expected: object, completion: str, reward: float) -> None:
    assert exact_match(Prompt("p", data={"answer": expected}), completion) == reward


def test_a_prompt_without_an_answer_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^exact_match: prompt 'p' has no answer; "):
        exact_match(Prompt("p", data={"question": "?"}), "1")
