"""The reward for multiple-choice questions: the letter of an option, or its text."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.rewards.answers import accepted_answers, after_thoughts, marked_answers, unreadable
from reinforce_ada.types import Prompt

_WHERE = "reward choice"
_AROUND = " \t\r\n.,;:!?*_`'\"$()[]{}<>"
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\[()\[\]]")
_LABEL = re.compile(r"\W*(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|letter)\s+)?\W*([A-Za-z])(?![^\W_])(.*)", re.DOTALL | re.IGNORECASE)
_LEADING = re.compile(r"\s*\**\(?([A-Za-z])(?:[).:]|\*\*)(?=[\s*]|\Z)")
_NAMED = re.compile(r"\(([A-Za-z])\)|\*\*\(?([A-Z])\)?[.:]?\*\*|\b(?:[Oo]ption|[Cc]hoice) ([A-Z])\b")
_REASON = re.compile(r"\s+(?:because|since|as|is|for|which|and)\b")


def choice_match(prompt: Prompt, completion: str) -> float:
    """Return 1.0 if the completion chooses the option that is `prompt.data["answer"]`, or one element of it if that is a list, else 0.0.

    The answer is a letter, the text of an option, or an integer, which counts the options from 0. The options are
    `prompt.data["choices"]`: a list of texts, {"A": text, ...} or {"label": [...], "text": [...]}; without it they are the letters A to E.
    The completion chooses in the part that is marked last (see `marked_answers`), or else in a whole text that is a letter or the text of
    an option, begins with a letter as "B)" or names exactly one option as "(B)", **B** or "option B". The time is linear in the text.

    Raises: InputError when the record has no answer, or one that is no option.
    """
    rights = options_of_answers(prompt)
    return float(_chosen(after_thoughts(completion), _options(prompt), rights) in rights)


def options_of_answers(prompt: Prompt) -> list[str]:
    """Return the letters of a record's answers. Raises: InputError when there is no answer, or one that is no option."""
    options = _options(prompt)
    return [_right(answer, options) for answer in accepted_answers(prompt, _WHERE)]


def _options(prompt: Prompt) -> dict[str, str]:
    """Return letter -> text in comparable form; "" where the record does not tell the texts."""
    choices: Any = prompt.data.get("choices")
    if choices is None:
        return dict.fromkeys("ABCDE", "")
    if isinstance(choices, Mapping):
        labels, texts = (
            (choices["label"], choices["text"]) if {"label", "text"} <= choices.keys() else (list(choices), list(choices.values()))
        )
    else:
        labels, texts = list(string.ascii_uppercase), choices
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not 0 < len(texts) <= len(labels):
        raise InputError(_WHERE, f"choices of prompt {prompt.prompt_id!r}", "a list of 1 to 26 texts is needed")
    return {str(label).upper(): _comparable(str(text)) for label, text in zip(labels, texts, strict=False)}


def _comparable(text: str) -> str:
    return " ".join(_LATEX.sub(r"\1", text).split()).strip(_AROUND).casefold()


def _right(answer: object, options: Mapping[str, str]) -> str:
    if isinstance(answer, int) and 0 <= answer < len(options):
        return list(options)[answer]
    text = _comparable(str(answer))
    letters = [letter for letter, said in options.items() if said == text] if text else []
    letter = text.upper() if text.upper() in options else (letters or [""])[0]
    if not letter:
        raise unreadable(_WHERE, answer, f"one of the options {', '.join(options)}, or the text of one, is needed")
    return letter


def _chosen(text: str, options: Mapping[str, str], rights: Sequence[str]) -> str | None:
    """Return the letter that a completion chooses."""
    for part in marked_answers(text):
        if any(c.isalnum() for c in part):
            return _of_part(_LATEX.sub(r"\1", part), options)
    plain = _LATEX.sub(r"\1", text)
    by_text = _of_text(plain, options)
    if by_text or len(plain.strip(_AROUND)) == 1:
        return by_text or _known(plain.strip(_AROUND), options)
    if leading := _LEADING.match(plain):
        return _known(leading[1], options)
    named = {_known(letter, options) for found in _NAMED.findall(plain) for letter in found if letter} - {None}
    return named.pop() if len(named) == 1 else None


def _of_part(part: str, options: Mapping[str, str]) -> str | None:
    """Return the option of a marked answer, which begins with it."""
    if by_text := _of_text(part, options):
        return by_text
    found = _LABEL.match(part)
    if found is None:
        return None
    letter, rest = found[1], found[2]
    ends = not rest.strip() or not (rest[0].isalnum() or (rest[0].isspace() and rest.strip()[0].isalpha()))
    if ends or _REASON.match(rest) or (letter.isupper() and letter not in "AI"):  # "A dog" begins with an article
        return _known(letter, options)
    return None


def _of_text(text: str, options: Mapping[str, str]) -> str | None:
    said = _comparable(text)
    return next((letter for letter, option in options.items() if said and option == said), None)


def _known(letter: str, options: Mapping[str, str]) -> str | None:
    return letter.upper() if letter.upper() in options else None
