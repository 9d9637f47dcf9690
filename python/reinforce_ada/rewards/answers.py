"""Finding the answer in a completion."""

from __future__ import annotations

import re

_TAG = re.compile(r"<(/?)answer>", re.ASCII | re.IGNORECASE)
_LABEL = re.compile(r"\banswer\s*:", re.IGNORECASE)


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
