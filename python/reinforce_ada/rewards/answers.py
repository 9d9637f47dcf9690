"""Where a completion's answer is."""

from __future__ import annotations

import re

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_LABEL = re.compile(r"\banswer\s*:", re.IGNORECASE)


def extract_answer(text: str) -> str:
    """The answer in a completion, stripped: the last <answer>…</answer>, else what follows the last "answer:", else all."""
    tagged = _TAGGED.findall(text)
    if tagged:
        return str(tagged[-1]).strip()
    return _LABEL.split(text)[-1].strip()
