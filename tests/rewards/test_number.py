"""number_match by a table: what people and models write, and whether it is the record's number."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import number_match
from reinforce_ada.rewards.number import number_of
from reinforce_ada.types import Prompt

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips altogether.\n#### 72"

# The answer of the record, the completion, and whether it is right.
PAIRS: list[tuple[object, str, bool]] = [
    # where the number stands
    (GSM8K, "In April 48, in May 24: 48 + 24 = 72 clips.\n#### 72", True),
    (GSM8K, "72", True),
    (GSM8K, "#### 24", False),
    ("#### 1,234", "#### 1234", True),
    ("#### -7", "####-7", True),
    ("72", "She sold 48 and then 24, so 72 clips in all.", True),
    ("72", "72 clips, which are 48 and 24", False),
    ("72", "Answer: 72", True),
    ("72", "ANSWER : 72 clips", True),
    ("72", "Answer:\n\n72\n\nI added 48 and 24.", True),
    ("72", "Answer: 72. I added 48 and 24.", True),
    ("72", "Answer: 72 (48 plus 24)", True),
    ("72", "**Answer:** 72", True),
    ("72", "The answer is **72**.", True),
    ("72", "The final answer is: $72$.", True),
    ("72", "The answer is 48 + 24 = 72", True),
    ("72", "<answer>72</answer> of 100", True),
    ("72", "<answer>48 + 24 = 72</answer>", True),
    ("72", "<answer>72", True),  # a stop string has taken the closing tag
    ("72", r"So \boxed{72}. There were 100 at first.", True),
    ("72", r"\boxed{\boxed{72}}", True),
    ("72", r"\fbox{72}", True),
    ("72", r"\boxed{72", True),  # not closed, so the last number of the text
    ("72", r"\boxed{71} no, wait: \boxed{72}", True),
    ("72", r"\boxed{72} no, wait: \boxed{71}", False),
    ("72", "Answer: 71. Wait, that is wrong.\nAnswer: 72", True),
    ("72", "answer: 71\nThe answer is 72.", True),
    ("72", r"\boxed{72} Is there another answer: no.", True),  # the last mark holds no number
    ("72", "72\n72\n72", True),
    ("72", "<think>The answer: 71</think>\nIt is 72.", True),
    ("71", "<think>The answer: 71</think>\nIt is 72.", False),
    ("71", "<think>The answer: 71</think>", False),
    (["72", "seventy-two 72"], "72", True),
    ([71, 72], "72", True),
    ([71, 73], "72", False),
    (72, "72.0", True),
    (0.1, "0.10", True),
    # groups and decimals
    ("1234", "1,234", True),
    ("1234", "1,234.", True),
    ("1234", "1,234, as I said", True),
    ("1234567.5", "1,234,567.50", True),
    ("1234", "1{,}234", True),
    ("10000", r"\boxed{10,\!000}", True),
    ("1234", r"1\,234", True),
    ("1234", "1\u202f234", True),  # a narrow no-break space
    ("1234", "1\u00a0234", True),
    ("234", "1 234", False),  # one number or two
    ("1234", "1 234", False),
    ("12", "1,2", False),
    ("2", "1,2", False),
    ("12", "1,,,2", False),
    ("1", "0,1", False),
    ("1200", "12,00", False),
    ("1234567", "1234,567", False),
    ("1000", "1_000", False),
    ("1000", "1'000", False),
    ("1000", "1.000", False),
    ("1", "1.000", True),
    ("3.5", "3,5", False),  # a decimal comma
    ("5", "3,5", False),
    ("1234.5", "1.234,5", False),
    ("1234567", "1.234.567", False),
    ("0.5", ".5", True),
    ("0.5", "0.50", True),
    ("5", "5.", True),
    ("5", "5...", True),
    ("7", "007", True),
    ("3.14", "3.14159", False),
    # signs
    ("-5", "-5", True),
    ("-5", "\u22125", True),
    ("-5", "\u20135", True),  # an en dash
    ("-5", "-$5", True),
    ("-5", "$-5$", True),
    ("-5", "x = -5", True),
    ("-5", "(-5)", True),
    ("5", "+5", True),
    ("5", "-5", False),
    ("-5", "5", False),
    ("5", "--5", False),
    ("-5", "--5", False),
    ("5", "\u00b15", False),
    ("5", r"\pm 5", False),
    ("5", "- 5 apples", True),  # the mark of a list
    # units, currencies, percent
    ("5", "5 apples", True),
    ("5", "5kg", True),
    ("5", r"\boxed{5\text{ cm}^2}", True),
    ("5", "5 cm^3", True),
    ("5", "5 m²", True),
    ("72", "72 km/h", True),
    ("18", "$18", True),
    ("18", "$18.00", True),
    ("18", r"\$18", True),
    ("18", "$18$ dollars", True),
    ("18", "18€", True),
    ("18", "€ 18", True),
    ("500", "Rs. 500", True),
    ("500", "Rs.500", True),
    ("18", "USD18", True),
    ("18", "$18/hour", True),
    ("90", r"90^\circ", True),
    ("90", r"90^{\circ}", True),
    ("90", "90°", True),
    ("50", "50%", True),
    ("50", r"50\%", True),
    ("50%", "50 percent", True),
    ("50%", "50", True),
    ("0.5", "50%", True),
    ("50%", "0.5", True),
    ("50%", "0.5%", False),
    ("50", "0.5", False),
    # fractions
    ("3/4", "3/4", True),
    ("3/4", "0.75", True),
    ("0.75", "3/4", True),
    ("0.75", r"\boxed{\frac{3}{4}}", True),
    ("0.75", r"\dfrac{3}{4}", True),
    ("0.75", r"\tfrac34", True),
    ("-3/4", r"-\frac{3}{4}", True),
    ("3/4", "6/8", True),
    ("3/4", "3 / 4", True),
    ("3/4", "¾", True),
    ("4", "3/4", False),
    ("1/3", "0.333", False),
    ("1/3", "0.3333333333333333", False),
    ("7/4", "1 3/4", True),
    ("7/4", r"1\frac{3}{4}", True),
    ("1.5", "1½", True),
    ("-1.5", "-1 1/2", True),
    ("5", "10/2", True),
    ("5", "5/0", False),
    ("3", "3/4/5", False),
    ("24", "24/7", False),
    # powers of ten
    ("320000", r"3.2 \times 10^5", True),
    ("320000", r"3.2\cdot10^{5}", True),
    ("320000", "3.2e5", True),
    ("320000", "3.2 * 10**5", True),
    ("0.001", "10^{-3}", True),
    ("0.001", "1e-3", True),
    ("5", r"3.2 \times 10^5", False),
    ("1e400", "1e400", True),
    ("1", "1e9999999", False),
    # parts of a calculation, and names
    ("5", "10 - 5", False),
    ("5", "10-5", False),
    ("5", "10 - 5 = 5", True),
    ("3", "2*3", False),
    ("3", "2 + 3", False),
    ("3", r"2\sqrt{3}", False),
    ("4", r"\sqrt{16} = 4", True),
    ("2", r"\frac{\sqrt{3}}{2}", False),
    ("3", r"3\pi", False),
    ("2", r"\frac{\pi}{2}", False),
    ("5", "2^5", False),
    ("2", "2^5", False),
    ("5", "5²", False),
    ("5", "x + 5", False),
    ("2", "H2O", False),
    ("1", "x_1", False),
    ("0", "0x10", False),
    ("3", "2x3", False),
    ("5", "2024-01-05", False),
    ("30", "10:30", False),
    ("5", "5x", True),
    # nothing to read
    ("0", "", False),
    ("0", "...", False),
    ("0", "- , . %", False),
    ("0", "nan", False),
    ("0", r"\boxed{}", False),
    ("0", "none", False),
    ("12", "１２", False),  # full-width digits
    ("12", "\u0661\u0662", False),
    ("1", "1２", False),
    ("2", "²", False),
    ("\u22127", "-7", True),
    ("9007199254740993", "9007199254740992", False),
    ("1" * 5000, "1" * 5000, True),
    ("1" * 5000, "1" * 4999 + "2", False),
    ("1/3", "1" * 5000 + "/3", False),
]


@pytest.mark.parametrize(("answer", "completion", "is_right"), PAIRS)
def test_number(answer: object, completion: str, is_right: bool) -> None:
    assert number_match(Prompt("p", data={"answer": answer}), completion) == float(is_right)


UNITS = ["", " apples", "%", " km/h", "$", ".", "**"]


@settings(max_examples=150, deadline=None)
@given(number=st.decimals(-(10**12), 10**12, allow_nan=False, places=3), unit=st.sampled_from(UNITS))
def test_a_number_is_right_in_every_form(number: Decimal, unit: str) -> None:
    prompt = Prompt("p", data={"answer": str(number)})
    for form in ("{:,}", "{:f}", "answer: {:f}", r"\boxed{{{:f}}}", "a 7 and a 9 make {:f}"):
        assert number_match(prompt, form.format(number) + unit) == 1.0
        assert number_match(prompt, form.format(number + 1) + unit) == 0.0 or (unit == "%" and number == (number + 1) / 100)


@settings(max_examples=200, deadline=None)
@given(text=st.text("0123456789,.-+/ %$\\{}^_abexЖ²½\u2212\u00a0\n", max_size=30))
def test_any_text_is_a_number_or_none(text: str) -> None:
    found = number_of(text)
    assert found is None or isinstance(found.value, (Decimal, Fraction))
    assert number_match(Prompt("p", data={"answer": 1}), text) in (0.0, 1.0)


@pytest.mark.parametrize("answer", ["seventy-two", "1,2", "", "2*3", "x"])
def test_an_answer_that_is_no_number_is_refused(answer: str) -> None:
    with pytest.raises(InputError, match=r"^reward number: the record's answer .*; an answer with a number"):
        number_match(Prompt("p", data={"answer": answer}), "1")
    with pytest.raises(InputError, match=r'^reward number: prompt \'p\' has no answer; data\["answer"\]'):
        number_match(Prompt("p", data={}), "1")


PIECES = [
    "<answer>",
    "</answer>",
    "answer:",
    "answer is ",
    "answer ",
    "#### ",
    "1",
    "1,",
    "1 ",
    "1.",
    "1/",
    "1 1/2 ",
    "1e",
    "-",
    "$",
    "^",
    "10^",
]
PIECES += [r"\boxed{", "{", "}", r"\frac{1}", "\\", "√", "½", "**", "Rs. ", "( ", " ", "\n", "\u202f1", r"\frac{"]


@pytest.mark.parametrize("piece", PIECES)
def test_the_time_is_linear_in_the_text(piece: str) -> None:
    start = time.process_time()
    number_of(piece * (200_000 // len(piece)))
    assert time.process_time() - start < 5.0  # the square of it would be hours
