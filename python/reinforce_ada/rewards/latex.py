"""The reward for answers that are mathematics, such as those of MATH: math-verify reads and compares them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from reinforce_ada.errors import needs
from reinforce_ada.rewards.answers import accepted_answers, after_thoughts, marked_answers
from reinforce_ada.rewards.number import number_of
from reinforce_ada.types import Prompt

_WHERE = "reward math"
_LONGEST = 2000  # characters of a formula; a longer one is a wrong answer
_DEEPEST = 12  # brackets in brackets, likewise: the time of the parser doubles with each
# Parsers build tables for what they read first; these formulas make them build most of what answers need.
_WARM_UP = (r"\frac{1}{2}", r"3\sqrt{2}+x^2", r"(0,\infty)", r"\{1,2\}", r"x=5\pi", "3.2", r"\begin{pmatrix}1\\2\end{pmatrix}")

_FORMULA = re.compile(r"\$\$?([^$]+)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]*\}|\\[A-Za-z]+|\b(?:sin|cos|tan|log|exp|sqrt|max|min|pi|infinity|infty)\b")
_WORD = re.compile(r"[^\W\d_]{3,}")
# What people write without a backslash, or without braces, as LaTeX.
_REWRITTEN = (
    (re.compile(r"\\[dtc]?frac\s*(\\[A-Za-z]+|[A-Za-z0-9])\s*(\\[A-Za-z]+|[A-Za-z0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<!\\)\bsqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])infinity(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![A-Za-z\\])(sin|cos|tan|log|exp|pi|infty)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"(?<![0-9.,])([0-9]+) ([0-9]+)/([0-9]+)(?![0-9.,])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![A-Za-z0-9_.])([0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]+)(?![A-Za-z0-9.])"), r"\1\\times10^{\2}"),
    (re.compile("\u2212|\u2013"), "-"),
)


class MathMatch:
    r"""The reward 1.0 if the completion's answer is mathematically equal to `prompt.data["answer"]`, or to one element of a list, else 0.0.

    The answer is the part that is marked last (see `marked_answers`), otherwise the text after a model's thoughts; of that the last formula
    between dollar signs or in \(…\) or \[…\], of prose without one the last number. An answer of words, such as "east", is compared as text
    without regard to case. A formula that cannot be read, raises, is longer than 2000 characters, nests more than 12 brackets or takes too
    long is wrong. Only a pool (`RewardPool`) can end a comparison that does not end by itself.

    Raises: InputError when the record has no answer, or math-verify is not installed.
    """

    def __call__(self, prompt: Prompt, completion: str) -> float:
        part = _answer(after_thoughts(completion))
        formula = _formula(part)
        return float(any(_same_text(right, part) or _equal(right, formula) for right in map(str, accepted_answers(prompt, _WHERE))))

    def timed_out(self, prompt: Prompt, completion: str) -> float:
        """Return 0.0: a model's answer that cannot be compared in time is wrong."""
        return 0.0

    def prepare(self) -> None:
        """Import math-verify and let it read some formulas, which takes seconds."""
        for formula in _WARM_UP:
            _equal(formula, "0")


def formula_given(completion: str) -> str | None:
    """Return the formula that a completion gives as its answer, without spaces and text commands; None if it is empty."""
    return _plain(_formula(_answer(after_thoughts(completion)))) or None


def _answer(text: str) -> str:
    """Return the marked answer, otherwise the text."""
    return next((part for part in marked_answers(text) if part.strip(" .,$*")), text)


def _formula(part: str) -> str:
    """Return the last formula of an answer; without one the last number of prose, or the answer itself."""
    if formulas := _FORMULA.findall(part):
        inside = "".join(formulas[-1])
        if not _is_prose(inside):
            return inside
    if _is_prose(part) and (number := number_of(part)) is not None:
        return str(number.value)
    return part


def _is_prose(text: str) -> bool:
    r"""Return whether a text holds words, other than LaTeX's own and those inside of \text."""
    return _WORD.search(_COMMAND.sub(" ", _TEXT.sub(" ", text))) is not None


def _plain(text: str) -> str:
    r"""Return a text without \text, dollar signs, spaces and a final full stop, in lower case."""
    return re.sub(r"[\s$*]|\\[ ,;!]", "", _TEXT.sub(r"\1", text)).removesuffix(".").casefold()


def _is_balanced(formula: str) -> bool:
    """Return whether braces are closed, and no bracket of any kind is nested too deeply."""
    depths = list(accumulate((c in "({[") - (c in ")}]") for c in formula))
    return formula.count("{") == formula.count("}") and max(depths, default=0) <= _DEEPEST


def _same_text(right: str, given: str) -> bool:
    return _plain(right) == _plain(given) != ""


def _equal(right: str, given: str) -> bool:
    if _same_text(right, given):
        return True
    is_words = _is_prose(right) or _WORD.fullmatch(_plain(right)) is not None  # letters would be the factors of a product
    if is_words or len(given) > _LONGEST or not _is_balanced(given):
        return False
    needs(_WHERE, "math_verify")
    import math_verify

    # It warns that nothing limits its time, which the pool does, and logs what it cannot read, which is then wrong.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        # Its own time limits need signals of the main thread, and would end nothing that hangs in C.
        return bool(math_verify.verify(list(_parsed(right)), list(_parsed(given)), timeout_seconds=None))
    except Exception:  # a formula can make it raise anything, RecursionError included
        return False


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Sequence[Any]:
    import math_verify

    for pattern, instead in _REWRITTEN:
        text = pattern.sub(instead, text)
    return tuple(math_verify.parse(f"\\boxed{{{text.strip(' .,;$*')}}}", parsing_timeout=None))
