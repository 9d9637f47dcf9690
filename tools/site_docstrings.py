"""Shows the one-line `Returns: ...` and `Raises: ...` of docstrings as paragraphs of their own on the page of the Python API."""

from __future__ import annotations

import re
from typing import Any

import griffe


class OneLineSections(griffe.Extension):
    """Google's style knows these words only above an indented block; most docstrings here say it in one line."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(Returns|Raises): (?=\S)", r"\n**\1:** ", obj.docstring.value, flags=re.MULTILINE)
