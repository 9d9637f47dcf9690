"""What comes from outside this program (servers, files, rewards, models) is read and shown through these functions. Stdlib only."""

from __future__ import annotations

import json
import re
from typing import Any


class GarbageError(ValueError):
    """Text from outside that cannot be used; the message is one line and says why."""


def parse_json(text: str | bytes, *, unique_keys: bool = False) -> Any:
    """The value of a JSON text.

    Raises: GarbageError for whatever Python's parser raises on a hostile text: no JSON, no UTF-8, too deep a nesting, an integer of more
    than 4300 digits, and for half of a surrogate pair, which could not be written anywhere; with `unique_keys` also for an object that has
    a key twice.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except GarbageError:
        raise
    except RecursionError:
        raise GarbageError("JSON that is nested too deeply") from None
    except UnicodeDecodeError as e:
        raise GarbageError(f"not UTF-8: byte {e.object[e.start]:#04x} at {e.start}") from None
    except UnicodeEncodeError:
        raise GarbageError("half of a surrogate pair") from None
    except ValueError as e:
        raise GarbageError(f"not JSON: {e}") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise GarbageError(f"the key {one_line(next(k for k in keys if keys.count(k) > 1), 40)!r} is there twice")
    return found


# C0 and C1 control characters but for tab and newline, halves of surrogate pairs, and the characters that turn the direction of a line.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""`text` with every character that steers a terminal written as an escape, such as \x1b. Applied once, where text is shown."""
    return _UNPRINTABLE.sub(lambda match: repr(match.group())[1:-1], text)


def one_line(text: str, most: int = 300) -> str:
    """`printable` text on one line, cut after `most` characters: for a text of unknown length inside a message."""
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"
