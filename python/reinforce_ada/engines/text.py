"""The text of a completion, as rewards receive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 16  # tokens before a piece of text that determine how it begins


def decode_after(tokenizer: Any, before: Sequence[int], token_ids: Sequence[int]) -> str:
    """Return what `token_ids` add to the text of `before`, which can determine whether a word begins with a space.

    Special tokens have no text, and neither does a character whose last bytes are missing, as in vLLM's own texts.
    """
    context = list(before[-_CONTEXT:])
    return _decode(tokenizer, [*context, *token_ids])[len(_decode(tokenizer, context)) :].rstrip("\ufffd")


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def find_stop(text: str, stop: Sequence[str]) -> int:
    """Return where the first of the stop strings begins in the text; -1 if there is none."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=-1)


def tail_for_stop(stop: Sequence[str]) -> int:
    """Return how many last tokens can show a stop string that the newest one completes; a character takes up to 4 tokens."""
    return 4 * max(map(len, stop), default=0)
