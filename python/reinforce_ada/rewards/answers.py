"""Finding the answer in a completion. The time of everything here is linear in the text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.types import Prompt

_TAG = re.compile(r"<(/?)answer>", re.ASCII | re.IGNORECASE)
_LABEL = re.compile(r"\banswer\s*:", re.IGNORECASE)
# The lookahead makes it four times faster: most places of a text begin no mark.
_MARK = re.compile(r"(?=[<#a])(?:(?P<open><answer>)|(?P<close></answer>)|####|\banswer(?:\s*:|\s+is\b\s*:?))", re.ASCII | re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|\{|(?P<close>\})", re.ASCII | re.DOTALL)
_LINE = re.compile(r"\S[^\n]*")


def extract_answer(text: str) -> str:
    """Return the stripped answer: the last <answer>…</answer>, otherwise what follows the last "answer:", otherwise the whole text.

    If several <answer> precede one </answer>, the last counts. The time is linear in the text.
    """
    opened: int | None = None
    found: tuple[int, int] | None = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            opened = tag.end()
        elif opened is not None:
            found, opened = (opened, tag.start()), None
    if found is not None:
        return text[slice(*found)].strip()
    labels = list(_LABEL.finditer(text))
    return (text[labels[-1].end() :] if labels else text).strip()


def after_thoughts(text: str) -> str:
    """Return what follows the last </think>, after which a reasoning model answers; the whole text if there is none."""
    return text.rpartition("</think>")[2]


def marked_answers(text: str) -> list[str]:
    r"""Return the marked parts of a completion, the one that begins last first.

    A part is marked by \boxed{…} (or \fbox{…}), by <answer>…</answer> (without the closing tag it ends with the text), or it is the first
    line that is not empty after `####`, "answer:" or "answer is", up to the next mark. Case does not matter.
    """
    found: list[tuple[int, str]] = []
    if box := _BOX.search(text):
        found += [(start, text[start:end]) for start, end in _boxes(text, box.start())]
    end = len(text)
    for mark in reversed(list(_MARK.finditer(text))):
        if mark["open"]:
            found.append((mark.end(), text[mark.end() : end]))
        elif not mark["close"] and (line := _LINE.search(text, mark.end(), end)):
            found.append((mark.end(), line[0]))
        end = mark.start()
    return [part for _, part in sorted(found, reverse=True)]


def _boxes(text: str, first: int) -> list[tuple[int, int]]:
    """Return (start, end) of the content of every box whose brace is closed, from the place of the first box on."""
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []
    for brace in _BRACE.finditer(text, first):
        if brace["box"]:
            opened.append(brace.end())
        elif brace["close"]:
            if opened and (start := opened.pop()) is not None:
                found.append((start, brace.start()))
        elif brace[0] == "{":
            opened.append(None)
    return found


def accepted_answers(prompt: Prompt, where: str) -> list[Any]:
    """Return the right answers of a record: the elements of its "answer" if that is a list, otherwise the answer alone.

    Raises: InputError without an answer.
    """
    answer = prompt.data.get("answer")
    if answer is None:
        raise InputError(where, f"prompt {prompt.prompt_id!r} has no answer", 'data["answer"] is needed')
    return list(answer) if isinstance(answer, Sequence) and not isinstance(answer, (str, bytes)) else [answer]


def unreadable(where: str, answer: object, needed: str) -> InputError:
    """Return the error for an answer of a record that its reward cannot read."""
    return InputError(where, f"the record's answer {one_line(repr(answer), 60)}", needed)
