"""Functions that read and show everything from outside this program: servers, files, rewards, models.

They need the standard library alone, and matplotlib where a figure is drawn.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from reinforce_ada import heartbeat


class GarbageError(ValueError):
    """Text from outside that cannot be used; the message is one line and gives the reason."""


def parse_json(text: str | bytes, *, unique_keys: bool = False, exact_numbers: bool = False) -> Any:
    """Return the value of a JSON text.

    Raises: GarbageError for everything that Python's parser raises on a hostile text (not JSON, not UTF-8, too deep a nesting, an integer
        of more than 4300 digits), and for half of a surrogate pair, which could not be written anywhere; with `unique_keys` also for an
        object with a duplicate key. With `exact_numbers` every number is a Decimal of any length, and NaN and the infinities are refused.
    """
    numbers: Any = {"parse_int": _decimal, "parse_float": _decimal, "parse_constant": _decimal} if exact_numbers else {}
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None, **numbers)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False, default=str).encode()
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


def read_text(path: Path, most_bytes: int) -> str:
    """Return the text of a small file: UTF-8, with or without a byte order mark.

    Raises: GarbageError for a file that cannot be read, is longer than `most_bytes` or holds anything but text.
    """
    try:
        with path.open("rb") as file:
            found = file.read(most_bytes + 1)  # not more: it may be a device without an end
        if len(found) > most_bytes:
            raise GarbageError(f"longer than {most_bytes} bytes")
        return found.decode("utf-8-sig")
    except OSError as e:
        raise GarbageError(e.strerror or type(e).__name__) from None
    except UnicodeDecodeError as e:
        raise GarbageError(f"not UTF-8: byte {e.object[e.start]:#04x} at {e.start}") from None
    except GarbageError:
        raise
    except ValueError as e:  # a name with a NUL in it, or with half of a surrogate pair
        raise GarbageError(f"no file name: {e}") from None


def finite(value: Any) -> Any:
    """Return `value` with None for every number that JSON cannot hold, nan and the infinities, in mappings and sequences too."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _decimal(number: str) -> Decimal:
    try:
        found = Decimal(number)
    except InvalidOperation:  # an exponent past what a decimal holds
        found = Decimal("NaN")
    if not found.is_finite():
        raise GarbageError(f"{one_line(number, 40)} is no number of JSON that can be held")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise GarbageError(f"the key {one_line(next(k for k in keys if keys.count(k) > 1), 40)!r} is there twice")
    return found


# C0 and C1 control characters except tab and newline, halves of surrogate pairs, and the characters that change the direction of a line.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Return `text` with every character that steers a terminal as an escape, such as \x1b. Applied once, where text is shown."""
    return _UNPRINTABLE.sub(lambda match: repr(match.group())[1:-1], text)


def one_line(text: str, most: int = 300) -> str:
    """Return `printable` text on one line, cut after `most` characters: for a text of unknown length inside a message."""
    flat = printable(" ".join(text.split()))
    return flat if len(flat) <= most else f"{flat[: most - 1]}…"


def show(text: str, *, file: IO[str] | None = None, end: str = "\n") -> None:
    """Print `text` so that it cannot steer the terminal; on standard output by default."""
    print(printable(text), file=sys.stdout if file is None else file, end=end, flush=True)
    heartbeat.heard()


class _OnStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        show(self.format(record), file=sys.stderr)


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Show what the package logs, from INFO on, on standard error; a program that has configured logging itself keeps its own ways."""
    logger = logging.getLogger("reinforce_ada")
    if logger.handlers or logging.getLogger().handlers:
        yield
        return
    handler, level, propagates = _OnStderr(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level or logging.INFO)
    logger.propagate = False  # a library may give the root logger a handler meanwhile
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates


@contextmanager
def literal_names() -> Iterator[None]:
    """Show every name in matplotlib figures literally, if they are made and saved inside: a `$` starts no formula.

    A character that the font lacks becomes a box without a warning.
    """
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield


def is_utf8(text: str) -> bool:
    """Return whether the text has no halves of surrogate pairs, which files and databases do not accept."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_USER_INFO = re.compile(r"(?<=//)[^/?#\s]*@")


def without_credentials(text: str) -> str:
    """Return `text` without the `user:password@` of the URLs in it, for messages."""
    return _USER_INFO.sub("", text)


def server_url(text: str) -> str:
    """Return the base URL of a server, without a final slash and without `/v1`.

    A URL is written to the configuration of a run, to its log and to the terminal, so it must not hold credentials.
    Raises: GarbageError for anything but http(s)://host[:port][/path]; the message holds no credentials either.
    """
    shown = one_line(repr(without_credentials(text)), 100)
    if "@" in text:
        raise GarbageError(f"{shown} came with credentials, which would be written to files")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as e:  # a port that is not a number or above 65535, half of an IPv6 address
        raise GarbageError(f"{shown}: {e}") from None
    if not re.fullmatch(r"https?://[!-~]+", text) or not parts.hostname or port == 0 or "?" in text or "#" in text:
        raise GarbageError(f"{shown} is not http://host:port")
    return text.rstrip("/").removesuffix("/v1")


def is_installed(module: str) -> bool:
    """Return whether this top-level module can be imported. A mere folder of that name in the working folder does not count."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # raised for a half-removed or replaced package
        return False
    return spec is not None and spec.origin is not None


def installed_version(*names: str) -> str:
    """Return the version of the first of these distributions that is installed."""
    from importlib import metadata  # 15 ms, which --help need not spend

    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "not installed"
