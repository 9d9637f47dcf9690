"""choice_match and json_match by tables: the record, the completion, and whether it is right."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import choice_match, json_match
from reinforce_ada.types import Prompt

CITIES = {"choices": ["London", "Paris", "A dog", "$5$"], "answer": "B"}
CHOICES: list[tuple[dict[str, Any], str, bool]] = [
    ({"answer": "B"}, "B", True),
    ({"answer": "B"}, " b.\n", True),
    ({"answer": "B"}, "(B)", True),
    ({"answer": "(b)"}, "B)", True),
    ({"answer": "B"}, "The answer is B", True),
    ({"answer": "B"}, "The answer is (B).", True),
    ({"answer": "B"}, "The answer is B because it fits.", True),
    ({"answer": "B"}, "The correct answer is: option B", True),
    ({"answer": "B"}, "**Answer:** B) Paris", True),
    ({"answer": "B"}, r"\boxed{B}", True),
    ({"answer": "C"}, r"\boxed{\text{(C)}}", True),
    ({"answer": "B"}, "<answer>B</answer>", True),
    ({"answer": "B"}, "#### B", True),
    ({"answer": "B"}, "B. Paris is in France", True),
    ({"answer": "B"}, "So it has to be (B).", True),
    ({"answer": "B"}, "I choose **B**.", True),
    ({"answer": "B"}, "(A) is wrong, so (B)", False),  # two options without a mark
    ({"answer": "B"}, "(A) is wrong. Answer: B", True),
    ({"answer": "B"}, "Answer: A. No: answer: B", True),
    ({"answer": "B"}, r"\boxed{A} or \boxed{B}", True),
    ({"answer": "A"}, "The answer is A.", True),
    ({"answer": "A"}, "The answer is A because", True),
    ({"answer": "A"}, "The answer is a dog", False),
    ({"answer": "A"}, "A dog barks", False),
    ({"answer": "I"} | {"choices": list("abcdefghi")}, "The answer is I think B", False),
    ({"answer": "B"}, "C", False),
    ({"answer": "B"}, "", False),
    ({"answer": "B"}, "...", False),
    ({"answer": "B"}, "Because", False),
    ({"answer": "B"}, "Ｂ", False),
    ({"answer": "B"}, "AB", False),
    ({"answer": "E"}, "F", False),
    ({"answer": ["A", "B"]}, "B", True),
    (CITIES, "Paris", True),
    (CITIES, "The answer is Paris.", True),
    (CITIES, "paris", True),
    (CITIES, r"\boxed{\text{Paris}}", True),
    (CITIES, "London", False),
    (CITIES, "E", False),
    (CITIES | {"answer": "Paris"}, "b", True),
    (CITIES | {"answer": 1}, "(B)", True),
    (CITIES | {"answer": "C"}, "The answer is a dog", True),
    (CITIES | {"answer": "D"}, "The answer is $5", True),
    ({"choices": {"A": "x", "B": "y"}, "answer": "y"}, "B", True),
    ({"choices": {"label": ["1", "2"], "text": ["x", "y"]}, "answer": "2"}, "y", True),
]


@pytest.mark.parametrize(("record", "completion", "is_right"), CHOICES)
def test_choice(record: dict[str, Any], completion: str, is_right: bool) -> None:
    assert choice_match(Prompt("p", data=record), completion) == float(is_right)


@pytest.mark.parametrize(
    "record", [{"answer": "F"}, {"answer": "Paris"}, {"answer": 2, "choices": ["x"]}, {"answer": "A", "choices": "xy"}]
)
def test_a_record_without_its_option_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^reward choice: .* needed$"):
        choice_match(Prompt("p", data=record), "A")


JSON: list[tuple[object, str, bool]] = [
    ('{"a": 1, "b": [true, null]}', '{"b": [true, null], "a": 1.0}', True),
    ('{"a": 1}', 'Here it is:\n```json\n{"a": 1}\n```\nDone.', True),
    ('{"a": 1}', '```\n{"a": 2}\n```\nNo:\n```json\n{"a": 1}\n```', True),
    ('{"a": 1}', '```json\n{"a": 1}', True),  # a stop string has taken the closing fence
    ('{"a": 1}', '<answer>{"a": 1}</answer>', True),
    ('{"a": 1}', '<think>{"a": 2}</think>{"a": 1}', True),
    ('{"a": 1}', '{"a": 1} is right', False),
    ('{"a": 1}', '{"a": 1, "a": 1}', False),
    ('{"a": 1}', '{"a": 1, "b": 2}', False),
    ('{"a": 1}', '{"a": "1"}', False),
    ('{"a": 1}', '{"a": true}', False),
    ('{"a": 0}', '{"a": false}', False),
    ("[1, 2]", "[2, 1]", False),
    ("[1, 2]", "[1, 2, 3]", False),
    ('"Paris"', '"Paris"', True),
    ('"Paris"', "Paris", False),
    ('"é"', '"\\u00e9"', True),
    (7, "7.0", True),
    (0.1, "0.1", True),
    ("0.1", "0.1000000000000000055", False),
    ("9007199254740993", "9007199254740992", False),
    ("1" * 5000, "1" * 5000, True),
    ("1e2", "100", True),
    ("1", "1e99999999999999999999", False),
    ("1", "NaN", False),
    ("1", "Infinity", False),
    ("null", "null", True),
    (["1", "2"], "2", True),
    ("1", "", False),
    ("1", "{", False),
    ("1", "[" * 100_000, False),
    ("1", '"\\ud800"', False),
    ("1", "01", False),
]


@pytest.mark.parametrize(("answer", "completion", "is_right"), JSON)
def test_json(answer: object, completion: str, is_right: bool) -> None:
    assert json_match(Prompt("p", data={"answer": answer}), completion) == float(is_right)


@pytest.mark.parametrize("answer", ["Paris", "", "{", "NaN"])
def test_an_answer_that_is_no_json_is_refused(answer: str) -> None:
    with pytest.raises(InputError, match=r"^reward json: the record's answer .* a text stands in quotes$"):
        json_match(Prompt("p", data={"answer": answer}), "1")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@settings(max_examples=60, deadline=None)
@given(value=VALUES, indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_every_spelling_of_a_value_is_right(value: Any, indent: int | None, ascii_only: bool) -> None:
    import json

    prompt = Prompt("p", data={"answer": json.dumps(value)})
    assert json_match(prompt, json.dumps(value, indent=indent, ensure_ascii=ascii_only)) == 1.0
    assert json_match(prompt, json.dumps([value])) == 0.0


@settings(max_examples=100, deadline=None)
@given(text=st.text('ABCEabcx ()*.\\{}$`\n<>/answerd:[]",0', max_size=30))
def test_any_text_is_right_or_wrong(text: str) -> None:
    assert choice_match(Prompt("p", data=CITIES), text) in (0.0, 1.0)
    assert json_match(Prompt("p", data={"answer": "0"}), text) in (0.0, 1.0)


@pytest.mark.parametrize("piece", ["(B) ", "**", "option ", "<answer>", "```\n", " ", "\\text{", "[", "B ", "*B", '{"a":', "("])
def test_the_time_is_linear_in_the_text(piece: str) -> None:
    start = time.process_time()
    text = piece * (200_000 // len(piece))
    choice_match(Prompt("p", data=CITIES), text)
    choice_match(Prompt("p", data=CITIES), f"answer: {text}")
    json_match(Prompt("p", data={"answer": "0"}), text)
    assert time.process_time() - start < 5.0  # the square of it would be hours
