r"""MathMatch by a table: what MATH and models write, and whether it is right; and expressions that never end, in a real pool."""

from __future__ import annotations

import logging
import time

import pytest
from test_reward_pool import score

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import MathMatch, RewardPool, names
from reinforce_ada.types import Prompt

# The answer of the record, the completion, and whether it is right.
PAIRS: list[tuple[object, str, bool]] = [
    # where the answer stands
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", True),
    (r"\frac{1}{2}", r"Thus the answer is $\boxed{\dfrac{1}{2}}$.", True),
    (r"\frac{1}{2}", "The answer is 1/2.", True),
    (r"\frac{1}{2}", "<answer>0.5</answer>", True),
    (r"\frac{1}{2}", r"We get \[x = \frac12\]", True),
    (r"\frac{1}{2}", r"First $x=3$, then \(x=\frac{1}{2}\), which is right.", True),
    (r"\frac{1}{2}", r"\boxed{3} no, I was wrong: \boxed{\frac{1}{2}}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}} no, I was wrong: \boxed{3}", False),
    (r"\frac{1}{2}", r"<think>\boxed{\frac{1}{2}}</think> I do not know", False),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2", False),
    ("5", "I think that it is 5 in all", True),
    ("18", "It costs $18", True),
    (["3", "5"], r"\boxed{5}", True),
    (5, r"\boxed{5.0}", True),
    # numbers
    ("0.75", r"\frac{3}{4}", True),
    ("0.75", r"\tfrac34", True),
    (r"\frac{\pi}{2}", r"\frac\pi2", True),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
    ("7/4", "1 3/4", True),
    ("7/4", r"1\frac{3}{4}", True),
    (r"10,\!000", "10000", True),
    ("1234567", "1,234,567", True),
    (r"\$32{,}348", "32348", True),
    (r"6.02\times10^{23}", "6.02e23", True),
    (r"3.2\times10^5", "320000", True),
    ("-5", "\u22125", True),
    ("0", "-0", True),
    ("3.5", "3,5", False),
    ("3.5", r"\boxed{3,5}", False),
    ("1/3", "0.33", False),
    ("12", "１２", False),
    ("5", "6", False),
    ("1" * 3000, "1" * 3000, True),
    ("1" * 3000, "1" * 2999 + "2", False),
    (r"50\%", "0.5", True),
    ("50", r"50\%", True),
    # roots, powers, constants
    (r"3\sqrt{13}", r"\sqrt{117}", True),
    (r"11\sqrt2", r"11\sqrt{2}", True),
    (r"\sqrt{3}", "sqrt(3)", True),
    (r"2\pi", "2pi", True),
    ("2^{10}", "1024", True),
    ("10!", "3628800", True),
    (r"\log_2 8", "3", True),
    (r"\infty", "infinity", True),
    (r"\pi", "3.14", False),
    ("1+2i", "2i+1", True),
    # units
    ("5", r"5\text{ apples}", True),
    ("5", r"\boxed{5 apples}", True),
    ("90", r"90^\circ", True),
    ("8", r"8\text{ cm}", True),
    ("5", r"5\text{ cm}^2", True),
    # variables, equations, relations
    ("5", "x=5", True),
    ("x=5", "5", True),
    ("x=5", "y=5", False),
    ("y=2x+3", "2x+3", True),
    ("y=2x+3", "y=3+2x", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("2x+3", "2x-3", False),
    ("p-q", "q-p", False),
    (r"x\le 3", r"x \leq 3", True),
    ("x>3", "3<x", True),
    # sets, tuples, intervals, matrices
    ("1,2,3", "3,2,1", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    (r"\{1,2\}", r"\{1,2,3\}", False),
    ("2,-2", r"\pm 2", True),
    ("2,-2", r"x=2 \text{ or } x=-2", True),
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "(2,1)", False),
    ("(3,1)", "1,3", False),
    (r"(-\infty,3]", r"(-\infty, 3]", True),
    ("[0,1)", "(0,1)", False),
    (r"x\in[0,1)", "[0,1)", True),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)", True),
    (r"\emptyset", r"\emptyset", True),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", False),
    # words and letters
    (r"\text{Evelyn}", "The answer is Evelyn.", True),
    ("east", r"\boxed{\text{East}}", True),
    ("listen", "silent", False),
    (r"\text{June 20}", "June 20", True),
    (r"\text{June 20}", "July 20", False),
    ("no solution", r"\text{No solution}", True),
    (r"\text{(C)}", "C", True),
    ("B", r"\boxed{D}", False),
    # nothing to read
    ("5", "", False),
    ("5", "...", False),
    ("0", r"\boxed{}", False),
    ("5", r"\boxed{\frac{}{}}", False),
    ("5", "\\" * 50, False),
    ("5", "{" * 500 + "}" * 500, False),
    ("5", r"\frac{" * 40 + "1" + "}{2}" * 40, False),
]


@pytest.fixture(scope="module")
def math() -> MathMatch:
    reward = MathMatch()
    reward.prepare()
    return reward


@pytest.mark.parametrize(("answer", "completion", "is_right"), PAIRS)
def test_math(math: MathMatch, answer: object, completion: str, is_right: bool) -> None:
    assert math(Prompt("p", data={"answer": answer}), completion) == float(is_right)


def test_a_formula_that_cannot_be_read_says_nothing(math: MathMatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert math(Prompt("p", data={"answer": "5"}), r"\boxed{\left(}") == 0.0
    assert caplog.records == []
    with pytest.raises(InputError, match=r"^reward math: prompt 'p' has no answer"):
        math(Prompt("p"), "5")


def test_without_the_package_one_line_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reinforce_ada.errors.is_installed", lambda module: module != "math_verify")
    with pytest.raises(InputError, match=r'^reward math: math_verify is not installed; pip install "reinforce-ada\[math\]"$'):
        RewardPool("number,math:0.5")


HANGING = [
    pytest.param(r"\boxed{9^{9^{9^{9}}}}", id="a tower of powers"),
    pytest.param(r"\boxed{(10^9)!}", id="a factorial", marks=pytest.mark.slow),
    pytest.param("(" * 12 + "1" + ")" * 12, id="nested brackets", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("expression", HANGING)
def test_an_expression_that_never_ends_costs_its_own_limit(expression: str) -> None:
    """It is wrong, and no void; its neighbours are scored, and its worker is replaced."""
    with RewardPool("math,exact:0.5", num_workers=1, timeout_s=1.0) as pool:
        assert score(pool, ["4"], data={"answer": "4"}) == [1.5]
        started = time.monotonic()
        results = score(pool, ["4", expression, r"\boxed{\frac{8}{2}}", "5"], data={"answer": "4"})
        assert results == [1.5, 0.0, 1.0, 0.0]
        counters = pool.counters
        assert (counters.num_timeouts, counters.num_workers_replaced, counters.num_voids, counters.num_retries) == (1, 1, 0, 0)
        assert time.monotonic() - started < 60.0  # and not ten limits, as for a reward that loads in its first call
    assert counters.last_traceback == ""


def test_every_name_can_be_loaded() -> None:
    for name in names.BUILT_IN:
        assert callable(names.load_reward(name, run_code=True))
