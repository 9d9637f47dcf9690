"""exact_match and extract_answer, by tables."""

from __future__ import annotations

import time

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
        ("<answer>7 or rather <answer>8</answer>", "8"),
        ("</answer>7<answer>8</answer>", "8"),
        ("<answer>8</answer></answer>", "8"),
        ("<answer></answer>", ""),
        ("\u0130\u0130\u0130 <answer>8</answer>", "8"),  # longer in lower case
        ("<an\u017fwer>8</an\u017fwer>", "<an\u017fwer>8</an\u017fwer>"),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@settings(max_examples=30)
@given(text=st.text().filter(lambda t: "answer" not in t.lower()))
def test_text_without_a_label_is_its_own_answer(text: str) -> None:
    assert extract_answer(text) == text.strip()
    assert extract_answer(f"{text} answer: {text}") == text.strip()


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "answer ", "answer:", "answer", "<answer>a</answer>", " ", "<"])
def test_the_time_is_linear_in_the_text(piece: str) -> None:
    start = time.process_time()
    extract_answer(piece * (2_000_000 // len(piece)))
    assert time.process_time() - start < 5.0  # the square of it would be hours


# What is equal to what: the answer of the record, the completion, and whether it is right.
EQUAL = [
    ("12", " 12\n", True),
    (12, "12.0", True),
    (12.0, "12", True),
    ("12", "answer: 12", True),
    ("12", "12.", True),
    ("12.5", "12.50", True),
    ("0.5", ".50", True),
    ("12", "+12", True),
    ("-5", "\u22125", True),  # the minus sign of typeset text
    ("-0", "0", True),
    ("7", "007", True),
    ("1200", "1,200", True),
    ("1200", "1,200.00", True),
    ("-1234567", "-1,234,567", True),
    ("1000", "1e3", True),
    (1e22, "10000000000000000000000", True),
    (0.1, "0.10", True),
    ("Paris", "Paris", True),
    ("nan", "nan", True),
    ("1" * 400, "1" * 400, True),
    ("1" * 5000, "1" * 5000, True),
    ("1" * 5000, "1" * 5000 + ".0", True),
    (["Paris", "paris"], "paris", True),
    ([3, "three"], "3.0", True),
    (("a", "b"), "b", True),
    ("1,2", "1,2", True),  # no number, but the same text
    ("1/2", "1/2", True),
    ("$5", "$5", True),
    ("12%", "12%", True),
    (True, "True", True),
    ("12", "13", False),
    ("12", "12 apples", False),
    ("12", "", False),
    ("", "12", False),
    ("12", "1,2", False),
    ("12", "1,,,2", False),
    ("12", ",12", False),
    ("12", "12,", False),
    ("01", "0,1", False),
    ("1", "0,001", False),
    ("1200", "12,00", False),
    ("12000", "1,2000", False),
    ("1234567", "1234,567", False),
    ("1000", "1_000", False),
    ("1000", "1 000", False),
    ("1000", "1.000", False),
    ("1000", "1'000", False),
    ("0.5", "1/2", False),
    ("0.5", "50%", False),
    ("5", "$5", False),
    ("5", "5$", False),
    ("12", "1 2", False),
    ("12", "\uff11\uff12", False),  # full-width digits
    ("12", "\u0661\u0662", False),  # Arabic-Indic digits
    ("2", "\u00b2", False),
    ("16", "0x10", False),
    ("5", "--5", False),
    ("5", "+-5", False),
    ("5", "- 5", False),
    ("0", "", False),
    ("0", ".", False),
    ("0", "e0", False),
    ("Paris", "paris", False),
    ("nan", "NaN", False),
    ("inf", "1e999", False),
    ("1e999999", "1e9999999999", False),
    ("9007199254740993", "9007199254740992", False),
    ("0.1", "0.1000000000000000055", False),
    ("1", "1" * 400, False),
    ("1.5", "1" * 400, False),
    (["Paris", "paris"], "['Paris', 'paris']", False),
    ([], "", False),
]


@pytest.mark.parametrize(("expected", "completion", "is_right"), EQUAL)
def test_exact_match(expected: object, completion: str, is_right: bool) -> None:
    assert exact_match(Prompt("p", data={"answer": expected}), completion) == float(is_right)


@settings(max_examples=200)
@given(number=st.integers(-(10**15), 10**15), text=st.text("0123456789,._+-eE ", max_size=12))
def test_a_text_is_a_number_only_in_one_of_its_forms(number: int, text: str) -> None:
    prompt = Prompt("p", data={"answer": number})
    assert exact_match(prompt, f"{number:,}") == exact_match(prompt, f"{number}.0") == exact_match(prompt, str(number)) == 1.0
    if exact_match(prompt, text):
        assert float(text.replace(",", "")) == number
        assert "_" not in text
        assert all(len(group) == 3 for group in text.strip().partition(".")[0].split(",")[1:])


def test_a_prompt_without_an_answer_is_an_error() -> None:
    with pytest.raises(InputError, match=r"^exact_match: prompt 'p' has no answer; "):
        exact_match(Prompt("p", data={"question": "?"}), "1")
