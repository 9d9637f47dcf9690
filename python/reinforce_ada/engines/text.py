"""The text of a completion, as rewards see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 16  # tokens before a piece of text that decide how it begins


def decode_after(tokenizer: Any, before: Sequence[int], token_ids: Sequence[int]) -> str:
    """What `token_ids` add to the text of `before`: whether a word begins with a space can depend on what comes before it.

    Special tokens have no text, and a character of which the last bytes are missing has none, as in vLLM's own texts.
    """
    context = list(before[-_CONTEXT:])
    return _decode(tokenizer, [*context, *token_ids])[len(_decode(tokenizer, context)) :].rstrip("\ufffd")


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def find_stop(text: str, stop: Sequence[str]) -> int:
    """Where the first of the stop strings begins in the text; -1 without any."""
    return min((at for s in stop if (at := text.find(s)) >= 0), default=-1)


def tail_for_stop(stop: Sequence[str]) -> int:
    """Tokens at the end of a text in which a stop string that the last token completes must show: a character is up to 4 of them."""
    return 4 * max(map(len, stop), default=0)
