"""What comes from outside this program (servers, files, rewards, models) is read and shown through these functions. Stdlib only."""

from __future__ import annotations

import importlib.util
import json
import re
from typing import Any
from urllib.parse import urlsplit


class GarbageError(ValueError):
    """Text from outside that cannot be used; the message is one line and says why."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises: GarbageError for whatever Python's parser raises on a hostile text: no JSON, no UTF-8, too deep a nesting, an integer of more
    than 4300 digits, and for half of a surrogate pair, which could not be written anywhere.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise GarbageError("JSON that is nested too deeply") from None
    except UnicodeDecodeError as e:
        raise GarbageError(f"not UTF-8: byte {e.object[e.start]:#04x} at {e.start}") from None
    except UnicodeEncodeError:
        raise GarbageError("half of a surrogate pair") from None
    except ValueError as e:
        raise GarbageError(f"not JSON: {e}") from None
    return value


# C0 and C1 control characters but for tab and newline, halves of surrogate pairs, and the characters that turn the direction of a line.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""`text` with every character that steers a terminal written as an escape, such as \x1b. Applied once, where text is shown."""
    return _UNPRINTABLE.sub(lambda match: repr(match.group())[1:-1], text)


def one_line(text: str, most: int = 300) -> str:
    """`printable` text on one line, cut after `most` characters: for a text of unknown length inside a message."""
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


_USER_INFO = re.compile(r"(?<=//)[^/?#\s]*@")


def without_credentials(text: str) -> str:
    """`text` without the `user:password@` of the URLs in it, for messages."""
    return _USER_INFO.sub("", text)


def server_url(text: str) -> str:
    """The base URL of a server, without a slash at its end and without `/v1`.

    A URL is written to the configuration of a run, to its log and to the terminal, so it must not hold credentials.
    Raises: GarbageError for anything but http(s)://host[:port][/path]; the message holds no credentials either.
    """
    shown = one_line(repr(without_credentials(text)), 100)
    if "@" in text:
        raise GarbageError(f"{shown} came with credentials, which would be written to files")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as e:  # a port that is no number or above 65535, half of an IPv6 address
        raise GarbageError(f"{shown}: {e}") from None
    if not re.fullmatch(r"https?://[!-~]+", text) or not parts.hostname or port == 0 or "?" in text or "#" in text:
        raise GarbageError(f"{shown} is not http://host:port")
    return text.rstrip("/").removesuffix("/v1")


def is_installed(module: str) -> bool:
    """Whether this top-level module can be imported: a folder of that name in the working folder alone is not one."""
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None
