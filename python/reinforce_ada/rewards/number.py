"""The reward for tasks whose answer is a number, as GSM8K's: it is read out of prose and LaTeX, and compared exactly."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, cast

from reinforce_ada.rewards.answers import accepted_answers, after_thoughts, marked_answers, unreadable
from reinforce_ada.types import Prompt

_WHERE = "reward number"
_MAX_FRACTION = 400  # characters of either part of a fraction: beyond, its arithmetic would not be linear in the text
_LOOK_BACK = 64  # characters before a number that are looked at: more would make many numbers quadratic

# LaTeX is rewritten as plain text, in this order. A separator of groups stays inside its number; any other command becomes a space.
_LATEX = [
    (re.compile(pattern), instead)
    for pattern, instead in (
        (r"\\!", ""),
        (r"\{,\}", ","),
        (r"(?<=[0-9])\\[,;: ](?=[0-9]{3}(?![0-9]))", "\u202f"),
        (r"\^\s*\{?\\(?:circ|degree)\}?", " "),
        (r"\\([$%#&])", r"\1"),
        (r"\\pm(?![A-Za-z])", "±"),
        (r"\\(?:times|cdot)(?![A-Za-z])", "×"),
        (r"\\div(?![A-Za-z])", "÷"),
        (r"\\pi(?![A-Za-z])", "π"),
        (r"(?<=[0-9])(?=\\[dtc]?frac)", " "),
        (r"\\[dtc]?frac\s*\{([^{}\\]*)\}\s*\{([^{}\\]*)\}", r"\1/\2 "),
        (r"\\[dtc]?frac\s*([0-9])\s*([0-9])", r"\1/\2 "),
        (r"\\(?:sqrt|[dtc]?frac)(?![A-Za-z])", "√"),  # what is left of fractions has parts that are no numbers
        (r"\\(?:[A-Za-z]+|[^A-Za-z0-9])", " "),
    )
]
_POWER = re.compile(r"(?<=[0-9)])\*\*(?=[0-9(+-])")
_CODE = re.compile(r"\b(?:USD|EUR|GBP|INR|Rs)\.? ?(?=[0-9])")
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5", "⅙": "1/6",
           "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}  # fmt: skip
_VULGAR_ANY = re.compile(f"(?P<mixed>(?<=[0-9]))?(?P<sign>[{''.join(_VULGAR)}])")

_SPACES = "\u00a0\u2009\u202f"  # no-break and thin: they separate the groups of typeset numbers; a plain space separates two numbers
_MINUS = r"\-\u2212\u2013"  # inside a character class: hyphen, minus sign, en dash
_PLAIN = re.compile(
    rf"(?P<whole>[1-9][0-9]{{0,2}}(?:(?:,[0-9]{{3}})+|(?:[{_SPACES}][0-9]{{3}})+)|[0-9]*)(?P<point>\.[0-9]+)?(?:[eE](?P<exponent>[+{_MINUS}]?[0-9]{{1,6}}))?"
)
# A run is everything that digits, separators and an exponent make without a break. It is a number as a whole or not at all: 1,2 is not 2.
_RUN = rf"\.?[0-9](?:[0-9]|[.,:'_{_SPACES}]+(?=[0-9])|[eE][+{_MINUS}]?(?=[0-9]))*"
# Digits after a letter are part of a name (H2O), those after ^ or _ an exponent or an index (cm^2, x_1).
_NUMERAL = re.compile(
    rf"""(?<![\w^])(?<![\^_]\{{)(?<!\^[{_MINUS}])(?<!\^\{{[{_MINUS}])
    (?P<sign>[+±{_MINUS}]{{0,2}})(?:[$€£¥₹][ ]?){{0,3}}(?P<inner>[+±{_MINUS}]{{0,2}})
    (?:10(?:\^\{{?|\*\*)(?P<power>[+{_MINUS}]?[0-9]{{1,6}})\}}?(?![0-9.]) |
    (?P<run>{_RUN})
    (?:[ ]?[×*·x][ ]?10(?:\^\{{?|\*\*)(?P<ten>[+{_MINUS}]?[0-9]{{1,6}})\}}?(?![0-9.]) |
       [ ]{{1,2}}(?P<above>[0-9]+)[/\u2044](?P<below>[0-9]+)(?![0-9.]) |
       [ ]?[/\u2044][ ]?(?P<under>{_RUN}))?)""",
    re.VERBOSE,
)
# What makes a number part of a calculation: an operator before it, with another operand before that; a root; a power, π or digits after it.
_BEFORE = re.compile(rf"(?:(?:[0-9)\]}}%]|(?<![^\W\d_])[^\W\d_]) *[+*×·÷/^±{_MINUS}] *|± *|√[^\s=]*)\Z")
_OPERAND = re.compile(r"[0-9)\]}%] *\Z")
_GROUP = re.compile(r"(?<=[0-9] )[0-9]{3}(?![0-9])")  # 1 234 may be one number or two
_AFTER = re.compile(r"\d|[^\W\d_]{0,3}[0-9\u00b2\u00b3\u00b9\u2070-\u209f^]|[ ]?[π√]|[ ]?/[ ]?[0-9]")
_STOP = re.compile(r"[.!?;](?=\s)|(?<=[\w%}$]) +\(")


class Number(NamedTuple):
    """An exact number, and whether a percent sign follows it."""

    value: Decimal | Fraction
    is_percent: bool = False


def number_match(prompt: Prompt, completion: str) -> float:
    """Return 1.0 if the completion's number equals that of `prompt.data["answer"]`, or of one element of it if that is a list, else 0.0.

    The number is the last one of the part that is marked last and holds one (see `marked_answers`), otherwise the last of the text after a
    model's thoughts. Both sides are read in the same way, and numbers are compared exactly, as decimals and fractions. Units, currencies
    and words around a number do not count; 50% equals 50% and 50, and also 0.5. What docs/rewards.md calls unreadable, such as 1,2, equals
    nothing. The time is linear in the text.

    Raises: InputError when the record has no answer or one without a readable number.
    """
    rights = readable_answers(prompt)
    found = number_of(completion)
    return float(found is not None and any(_equal(found, right) for right in rights))


def readable_answers(prompt: Prompt) -> list[Number]:
    """Return the numbers of a record's answers. Raises: InputError when there is no answer, or one without a readable number."""
    return [_right(str(answer)) for answer in accepted_answers(prompt, _WHERE)]


def number_given(completion: str) -> Decimal | Fraction | None:
    """Return the value that a completion gives as its answer; None if there is none."""
    found = number_of(completion)
    return None if found is None else found.value


def number_of(text: str) -> Number | None:
    """Return the number that a text gives as its answer; None if there is none, or if the last one is unreadable."""
    text = after_thoughts(text)
    for part in marked_answers(text):
        readable = _readable(part)
        if numerals := _numerals(readable[: _end(readable)]):
            return _read(readable, numerals[-1])
    for line in reversed(text.split("\n")):
        readable = _readable(line)
        if numerals := _numerals(readable):
            return _read(readable, numerals[-1])
    return None


@lru_cache(maxsize=4096)
def _right(answer: str) -> Number:
    found = number_of(answer)
    if found is None:
        raise unreadable(_WHERE, answer, "an answer with a number, such as 1,234.5 or 3/4, is needed")
    return found


def _equal(a: Number, b: Number) -> bool:
    if _same(a.value, b.value):
        return True
    if a.is_percent == b.is_percent:
        return False
    percent, other = (a, b) if a.is_percent else (b, a)
    exact = _fraction(percent.value)
    return exact is not None and _same(exact / 100, other.value)


def _same(a: Decimal | Fraction, b: Decimal | Fraction) -> bool:
    if isinstance(a, Decimal) and isinstance(b, Decimal):
        return a == b
    left, right = _fraction(a), _fraction(b)
    return left is not None and left == right


def _fraction(value: Decimal | Fraction) -> Fraction | None:
    """Return a number as a fraction; None if it is too long or too far from 1 to equal one that was read."""
    if isinstance(value, Fraction):
        return value
    is_short = abs(value.adjusted()) <= 3 * _MAX_FRACTION and len(value.as_tuple().digits) <= 3 * _MAX_FRACTION
    return Fraction(value) if is_short else None


# -------------------- reading


def _readable(text: str) -> str:
    """Return a text without LaTeX and markdown around its numbers."""
    if "\\" in text or "{," in text:
        for pattern, instead in _LATEX:
            text = pattern.sub(instead, text)
    if "**" in text:
        text = _POWER.sub("^", text).replace("**", " ")
    return _VULGAR_ANY.sub(lambda found: f"{'' if found['mixed'] is None else ' '}{_VULGAR[found['sign']]} ", _CODE.sub("$", text))


def _end(part: str) -> int:
    """Return where a marked answer ends: with its sentence, or before a remark in parentheses, once it has a digit."""
    digit = re.search("[0-9]", part)
    stop = _STOP.search(part, digit.start()) if digit else None
    return stop.start() if stop else len(part)


def _numerals(text: str) -> list[re.Match[str]]:
    return list(_NUMERAL.finditer(text))


def _read(text: str, found: re.Match[str]) -> Number | None:
    """Return the number of a numeral in its text; None for one that cannot be read, or is part of a calculation."""
    head, signs = text[max(0, found.start() - _LOOK_BACK) : found.start()], found["sign"] + found["inner"]
    if len(signs) > 1 or "±" in signs or (signs and _OPERAND.search(head)) or _BEFORE.search(head):
        return None
    if _AFTER.match(text, found.end()) or _GROUP.match(text, found.start()):
        return None
    value = _value(found)
    if value is None:
        return None
    if signs not in ("", "+"):
        value = value.copy_negate() if isinstance(value, Decimal) else -value
    return Number(value, text[found.end() : found.end() + 9].lstrip().startswith(("%", "percent", "per cent")))


def _value(found: re.Match[str]) -> Decimal | Fraction | None:
    if found["power"]:
        return _shifted(Decimal(1), found["power"])
    value = _plain(found["run"])
    if value is None or found["ten"]:
        return None if value is None else _shifted(value, found["ten"])
    if found["above"]:  # a mixed number, such as 1 3/4
        part = _quotient(found["above"], found["below"])
        whole = _part(found["run"])
        return None if part is None or whole is None or part >= 1 or whole.denominator > 1 else whole + part
    return _quotient(found["run"], found["under"]) if found["under"] else value


def _quotient(above: str, below: str) -> Fraction | None:
    left, right = _part(above), _part(below)
    return left / right if left is not None and right else None


def _part(run: str) -> Fraction | None:
    value = _plain(run) if len(run) <= _MAX_FRACTION and "e" not in run.lower() else None
    return None if value is None else Fraction(value)


def _plain(run: str) -> Decimal | None:
    """Return the number that a run spells as a whole: 1,234.5 does, 1,2 and 1.234.567 do not."""
    found = _PLAIN.fullmatch(run)
    if found is None:
        return None
    digits = re.sub(f"[,{_SPACES}]", "", found["whole"]) + (found["point"] or "")
    return _shifted(Decimal(digits), found["exponent"]) if found["exponent"] else Decimal(digits)


def _shifted(value: Decimal, exponent: str) -> Decimal | None:
    """Return value × 10^exponent, with all its digits."""
    sign, digits, own = value.as_tuple()
    try:
        return Decimal((sign, digits, cast(int, own) + int(re.sub(f"[{_MINUS}]", "-", exponent))))
    except InvalidOperation:  # past what a decimal holds
        return None
