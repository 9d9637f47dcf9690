"""Hostile text: every kind becomes a value, one error, or something a terminal shows as it is."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import pytest

from reinforce_ada.outside import (
    GarbageError,
    finite,
    one_line,
    parse_json,
    printable,
    read_text,
    server_url,
    show,
    without_credentials,
)

GARBAGE = {
    "empty": "",
    "cut short": '{"a": ',
    "two values": "1 2",
    "nested too deeply": "[" * 200_000 + "]" * 200_000,
    "an integer of 5000 digits": "9" * 5000,
    "half of a surrogate pair": '{"text": "\\ud83d"}',
    "half a pair in a key": '{"\\uDE00": 1}',
    "bytes that are no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_one_error_of_one_line(text: str | bytes) -> None:
    with pytest.raises(GarbageError) as caught:
        parse_json(text)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [('{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}), (b'\xef\xbb\xbf"x"', "x"), ('"\\ud83d\\ude00"', "😀"), ('"\\\\ud83d"', "\\ud83d")],
)
def test_json_is_its_value(text: str | bytes, value: object) -> None:
    assert parse_json(text) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [b]é 漢字 😀\n\tx", "plain [b]é 漢字 😀\n\tx"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("\x9b31m\x7f\r", "\\x9b31m\\x7f\\r"),
        ("\ud800", "\\ud800"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
    ],
)
def test_printable_text_cannot_steer_a_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_one_line_is_one_line_of_bounded_length() -> None:
    assert one_line("a\r\n  b\x1b[2J") == "a b\\x1b[2J"
    assert len(one_line("x" * 10_000)) == 300


def test_show_prints_what_is_printable() -> None:
    out = io.StringIO()
    show("a\x1b[2J\nb\ud800", file=out, end="!\n")
    assert out.getvalue() == "a\\x1b[2J\nb\\ud800!\n"


def test_finite_has_none_where_json_has_no_number() -> None:
    assert finite({"a": [1, math.nan, (math.inf, 2.5)], "b": {"c": -math.inf}, "d": "nan"}) == {
        "a": [1, None, [None, 2.5]],
        "b": {"c": None},
        "d": "nan",
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "No such file or directory"),
        (".", "Is a directory"),
        ("file/below", "Not a directory"),
        ("n" * 300, "File name too long"),
        ("a\0b", "no file name"),
        ("\ud800", "no file name"),
        ("latin-1", "not UTF-8: byte 0xe9 at 3"),
        ("long", "longer than 100 bytes"),
    ],
)
def test_a_file_that_is_no_text_says_why(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("\ufeffyes", encoding="utf-8")
    (tmp_path / "latin-1").write_bytes(b"caf\xe9")
    (tmp_path / "long").write_bytes(b"x" * 101)
    assert read_text(tmp_path / "file", 100) == "yes"
    with pytest.raises(GarbageError, match=reason):
        read_text(Path(os.path.join(tmp_path, name)), 100)


URLS = {
    "http://host:8000": "http://host:8000",
    "https://host/v1/": "https://host",
    "http://host/behind/a/proxy/": "http://host/behind/a/proxy",
    "http://[::1]:8000": "http://[::1]:8000",
    "http://127.0.0.1:65535": "http://127.0.0.1:65535",
}
NO_URLS = [
    *(
        "",
        "host",
        "host:8000",
        "ftp://host",
        "http://",
        "http:///path",
        "http://:8000",
        "http://[::1",
        "http://host name:1",
        "http://host:x",
    ),
    *("http://host:0", "http://host:65536", "http://host:99999999999999999999", "http://host:-1", "http://host?key=1", "http://host#x"),
    *("http://h\n:1", "http://h\x1b[2J:1", "http://höst:1", "file:///etc/passwd", "http://" + "x" * 10_000 + ":x"),
]
SECRETS = [
    "http://user:secret@host:8000",
    "https://secret@host",
    "http://user:secret@[::1]:1/v1",
    "//:secret@host",
    "http://u:secret@host:x",
]


@pytest.mark.parametrize("text", URLS)
def test_the_url_of_a_server(text: str) -> None:
    assert server_url(text) == URLS[text]


@pytest.mark.parametrize("text", [*NO_URLS, *SECRETS])
def test_what_is_no_url_of_a_server_is_said_in_one_line_without_its_credentials(text: str) -> None:
    with pytest.raises(GarbageError) as caught:
        server_url(text)
    said = str(caught.value)
    assert one_line(said, 250) == said
    assert "secret" not in said
    assert ("credentials" in said) == (text in SECRETS)


def test_urls_lose_their_credentials() -> None:
    assert (
        without_credentials("see http://a:b@host/x?y=1 and https://c@d; mail me@home")
        == "see http://host/x?y=1 and https://d; mail me@home"
    )
