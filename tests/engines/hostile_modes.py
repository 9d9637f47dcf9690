"""What servers may do wrong, as one table: where, in which bytes, and what the engine has to make of it.

`Mode.outcome` is what becomes of a run with that server alone, and with a good one beside it:

| outcome | alone | beside a good one |
|---|---|---|
| ever | as with a good server | the same |
| lost | EngineLost in one line | as with the good server alone |
| silent | InputError in one line, at the start | as with the good server alone |
| refused | InputError in one line | the same |
| unfit | InputError in one line | the same, or it goes on, when the good server has answered first |
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass

from hostile_server import DONE, RIGHT, STREAM, Does, Forever, Hold, Reset, Step, chunk, event, head, message, stream, whole

GREET, LOAD, COMPLETE = "/v1/models", "/collective_rpc", "/v1/completions"


@dataclass(frozen=True)
class Mode:
    """`says` is in the one line of a run with it alone."""

    at: str
    does: Does
    outcome: str
    says: str = ""
    scheme: str = "http"

    @property
    def hangs(self) -> bool:
        """Whether only time can show what is wrong."""
        return self.says in _HANGS.values()


_HANGS = {GREET: "has not answered for", LOAD: "has not loaded", COMPLETE: "no progress for"}

# -------------------- HTTP: the same faults wherever they happen

_OUTCOME = {
    "broken": {GREET: "silent", LOAD: "lost", COMPLETE: "lost"},
    "busy": {GREET: "lost", LOAD: "lost", COMPLETE: "lost"},
    "garbage": {GREET: "refused", LOAD: "lost", COMPLETE: "lost"},
    "unfit": {GREET: "refused", LOAD: "refused", COMPLETE: "unfit"},
    "hangs": {GREET: "silent", LOAD: "lost", COMPLETE: "lost"},
}
_BOMB = gzip.compress(bytes(8 << 20))

HTTP: dict[str, tuple[list[Step], str, str]] = {
    "closes without a word": ([], "broken", "RemoteProtocolError"),
    "resets": ([Reset()], "broken", "ReadError"),
    "closes within its headers": ([b"HTTP/1.1 200 OK\r\nContent-Le", Reset()], "broken", "Error"),
    "speaks SSH": ([b"SSH-2.0-OpenSSH_9.6\r\n", Hold()], "hangs", ""),
    "speaks TLS": ([b"\x15\x03\x03\x00\x02\x02\x46\r\n\r\n", Hold()], "broken", "RemoteProtocolError"),
    "says nothing": ([Hold()], "hangs", ""),
    "stops within its headers": ([b"HTTP/1.1 200 OK\r\nX: 1\r\n", Hold()], "hangs", ""),
    "has headers without end": ([b"HTTP/1.1 200 OK\r\n", Forever(b"X-Header: " + b"x" * 90 + b"\r\n")], "broken", "RemoteProtocolError"),
    "has slow headers without end": ([b"HTTP/1.1 200 OK\r\n", Forever(b"X: 1\r\n", 0.05)], "hangs", ""),
    "is always about to answer": ([Forever(head("103 Early Hints"), 0.02)], "hangs", ""),
    "floods with 100 Continue": ([Forever(head("100 Continue") * 50, 0.02)], "hangs", ""),
    "has a NUL in a header": ([head("200 OK", "X: \0") + b"{}"], "broken", "RemoteProtocolError"),
    "has a status that is none": ([b"HTTP/1.1 abc OK\r\n\r\n"], "broken", "RemoteProtocolError"),
    "has a length that is none": ([head("200 OK", "Content-Length: -5")], "broken", "RemoteProtocolError"),
    "has two lengths": ([head("200 OK", "Content-Length: 5", "Content-Length: 6") + b"12345"], "broken", "RemoteProtocolError"),
    "has a chunk size that is none": ([STREAM + b"zz\r\n"], "broken", "RemoteProtocolError"),
    "has a transfer encoding nobody knows": ([head("200 OK", "Transfer-Encoding: rot13")], "broken", "RemoteProtocolError"),
    "stops after its headers": ([head("200 OK", "Content-Length: 10"), Hold()], "hangs", ""),
    "stops within a chunk": ([STREAM + b"ff\r\n: abc", Hold()], "hangs", ""),
    "breaks off within its body": ([head("200 OK", "Content-Length: 10") + b": ", Reset()], "broken", "Error"),
    "has a body without end": ([STREAM, Forever(chunk(b":" * 65536))], "garbage", "bytes"),
    "has one line without end": ([STREAM, Forever(chunk(b"data: " + b"x" * 65536))], "garbage", "bytes"),
    "has slow bytes without end": ([STREAM, Forever(chunk(b":"), 0.02)], "hangs", ""),
    "has chunk extensions without end": ([STREAM, b"1;", Forever(b"x" * 9000)], "broken", "RemoteProtocolError"),
    "compresses": ([whole(gzip.compress(b"{}"), "200 OK", "Content-Encoding: gzip")], "garbage", "content-encoding 'gzip'"),
    "sends a gzip bomb": ([whole(_BOMB, "200 OK", "Content-Encoding: gzip")], "garbage", "content-encoding 'gzip'"),
    "is compressed in a way nobody knows": ([whole(b"{}", "200 OK", "Content-Encoding: \x1b]0;x")], "garbage", "encoding '\\x1b]0;x'"),
    "switches protocols": ([head("101 Switching Protocols", "Upgrade: x")], "broken", "RemoteProtocolError"),
    "has no content": ([head("204 No Content")], "broken", "204"),
    "redirects": ([whole(b"", "302 Found", "Location: http://user:secret@other/")], "unfit", "302: see http://other/"),
    "redirects to itself": ([whole(b"", "308 Permanent Redirect", f"Location: {COMPLETE}")], "unfit", "308"),
    "wants another key": ([whole(b"{}", "401 Unauthorized")], "unfit", "refuses the key (401)"),
    "is a teapot": ([whole(b"\x1b[2Jshort\r\nand stout", "418 Teapot")], "unfit", "418: \\x1b[2Jshort and stout"),
    "breaks": ([whole(b"\xff\xfe", "500 Internal Server Error")], "broken", "500"),
    "breaks at length": ([head("500 Internal Server Error"), Forever(b"x" * 65536)], "broken", "500"),
    "compresses its refusal": ([whole(gzip.compress(b"no"), "401 What", "Content-Encoding: gzip")], "unfit", "refuses the key (401)"),
    "has a status of its own": ([whole(b"", "999 What")], "broken", "999"),
    "has a bad gateway": ([whole(b"<html>", "502 Bad Gateway")], "busy", "502: <html>"),
    "is busy": ([whole(b"", "503 Service Unavailable")], "busy", "503"),
    "is busy for a while": ([whole(b"", "503 Service Unavailable", "Retry-After: 1")], "busy", "503"),
    "is busy for ever": ([whole(b"", "503 Service Unavailable", "Retry-After: 9" + "9" * 400)], "busy", "503"),
    "is busy until a date": ([whole(b"", "429 Too Many Requests", "Retry-After: Wed, 21 Oct 2065 07:28:00 GMT")], "busy", "429"),
    "is busy for no time": ([whole(b"", "429 Too Many Requests", "Retry-After: -1")], "busy", "429"),
}


def _of(steps: list[Step]) -> Does:
    return lambda asked: steps


def _http() -> dict[str, Mode]:
    modes = {}
    for name, (steps, what, says) in HTTP.items():
        for at in (GREET, LOAD, COMPLETE):
            kind = "unfit" if at == LOAD and says[:3].isdecimal() and what == "broken" else what  # "does not take the weights"
            modes[f"{at} {name}"] = Mode(at, _of(steps), _OUTCOME[kind][at], _HANGS[at] if what == "hangs" else says)
    return modes


# -------------------- before anything is asked

CONNECTION: dict[str, Mode] = {
    "nobody listens": Mode("", _of([]), "silent", "Error"),
    "takes no connection further": Mode("", _of([Hold()]), "silent", "has not answered for"),
    "talks first": Mode("", _of([whole(b"{}") * 3, Hold()]), "refused", "serves 0 models"),
    "floods whoever comes": Mode("", _of([Forever(b"\0" * 65536)]), "silent", "RemoteProtocolError"),
    "has no TLS": Mode("", _of([whole(b"no")]), "silent", "Error", scheme="https"),
}
HANDSHAKE = Mode("", _of([Hold()]), "silent", "has not answered for", scheme="https")

# -------------------- JSON of another shape, where the server is greeted

_BODIES: dict[str, tuple[str, bytes, str, str]] = {
    "no JSON": (GREET, b"<html></html>", "refused", "not JSON"),
    "nothing": (GREET, b"", "refused", "not JSON"),
    "an array": (GREET, b"[1]", "refused", "an array where an object belongs"),
    "no models": (GREET, b"{}", "refused", "serves 0 models; one is needed"),
    "models that are an object": (GREET, b'{"data": {}}', "refused", "data is an object"),
    "a model that is a number": (GREET, b'{"data": [1]}', "refused", "a model is a number"),
    "a model without a name": (GREET, b'{"data": [{}]}', "refused", "the name of a model is null"),
    "a name without end": (GREET, b'{"data": [{"id": "' + b"x" * 9999 + b'"}]}', "refused", "9999 characters"),
    "a context that is a text": (GREET, b'{"data": [{"id": "m", "max_model_len": "9"}]}', "refused", "max_model_len is a string"),
    "a context that is NaN": (GREET, b'{"data": [{"id": "m", "max_model_len": NaN}]}', "refused", "max_model_len is a number"),
    "a context that is true": (GREET, b'{"data": [{"id": "m", "max_model_len": true}]}', "refused", "max_model_len is a truth value"),
    "2000 models": (GREET, b'{"data": [' + b"1," * 1999 + b"1]}", "refused", "2000 items"),
    "deep nesting": (GREET, b"[" * 100_000, "refused", "nested too deeply"),
    "5000 digits": (GREET, b'{"data": ' + b"9" * 5000 + b"}", "refused", "not JSON"),
    "half a surrogate pair": (GREET, b'{"data": [{"id": "\\ud800"}]}', "refused", "surrogate"),
    "no UTF-8": (GREET, b'{"data": "\xff"}', "refused", "not UTF-8"),
    "a version that is a list": ("/version", b'{"version": [0]}', "refused", "the version is an array"),
    "an old version with colours": ("/version", b'{"version": "0.1\\u001b[31m"}', "refused", "vLLM 0.1\\x1b[31m; at least"),
    "no version": ("/version", b"{}", "ever", ""),
    "a cache that is a text": ("/reset_prefix_cache", b'"yes"', "refused", "a string where an object belongs"),
    "a cache that says nothing": ("/reset_prefix_cache", b"", "ever", ""),
    "a healthy page": ("/health", b"<html>I am fine</html>", "ever", ""),
}


def _bodies() -> dict[str, Mode]:
    return {f"{at} says {name}": Mode(at, _of([whole(data)]), outcome, says) for name, (at, data, outcome, says) in _BODIES.items()}


# -------------------- the one field of a completion that is wrong

_NESTED = "[" * 100_000 + "]" * 100_000
VALUES: dict[str, tuple[dict[str, str], str]] = {
    "logprobs that are an array": ({"logprobs": "[1]"}, "logprobs is an array"),
    "logprobs that are a number": ({"logprobs": "7"}, "logprobs is a number"),
    "no logprobs": ({"logprobs": "null"}, "with 0 logprobs"),
    "too few logprobs": ({"logprobs": '{"token_logprobs": []}'}, "with 0 logprobs"),
    "more logprobs": ({"logprobs": '{"token_logprobs": [-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1]}'}, "13 items"),
    "logprobs that are an object": ({"logprobs": '{"token_logprobs": {"0": -1}}'}, "token_logprobs is an object"),
    "a logprob that is null": ({"logprobs": '{"token_logprobs": [null]}'}, "a logprob that is not one: None"),
    "a logprob that is a text": ({"logprobs": '{"token_logprobs": ["-1"]}'}, "a logprob that is not one: '-1'"),
    "a logprob that is true": ({"logprobs": '{"token_logprobs": [true]}'}, "a logprob that is not one: True"),
    "a logprob that is NaN": ({"logprobs": '{"token_logprobs": [NaN]}'}, "a logprob that is not one: nan"),
    "a logprob that is infinite": ({"logprobs": '{"token_logprobs": [-Infinity]}'}, "a logprob that is not one: -inf"),
    "a logprob past float64": ({"logprobs": '{"token_logprobs": [-1e999]}'}, "a logprob that is not one: -inf"),
    "a logprob past float32": ({"logprobs": '{"token_logprobs": [-1e39]}'}, "a logprob that is not one: -1e+39"),
    "a logprob of 400 digits": ({"logprobs": f'{{"token_logprobs": [-{"9" * 400}]}}'}, "a logprob that is not one: -999"),
    "a probability": ({"logprobs": '{"token_logprobs": [0.5]}'}, "a logprob that is not one: 0.5"),
    "a token of 32 bits": ({"token_ids": "[2147483648]"}, "token 2147483648 of a vocabulary of 1000"),
    "a token of 5000 digits": ({"token_ids": f"[{'9' * 5000}]"}, "not JSON"),
    "a token of 4000 digits": ({"token_ids": f"[{'9' * 4000}]"}, "token 9999"),
    "a token past the vocabulary": ({"token_ids": "[1000]"}, "token 1000 of a vocabulary of 1000"),
    "a token below 0": ({"token_ids": "[-1]"}, "token -1 of a vocabulary"),
    "a token that is a float": ({"token_ids": "[7.0]"}, "no whole number: 7.0"),
    "a token that is a text": ({"token_ids": '["7"]'}, "no whole number: '7'"),
    "a token that is true": ({"token_ids": "[true]"}, "no whole number: True"),
    "a token that is a list": ({"token_ids": "[[7]]"}, "no whole number: [7]"),
    "tokens that are a text": ({"token_ids": '"7"'}, "token_ids is a string"),
    "no tokens": ({"token_ids": "[]", "logprobs": "null"}, "0 tokens of at most 12"),
    "tokens that are null": ({"token_ids": "null"}, "0 tokens with"),
    "too many tokens": ({"token_ids": "[7" + ", 7" * 12 + "]"}, "token_ids has 13 items"),
    "a text that is a number": ({"text": "7"}, "text is a number"),
    "a text that is null": ({"text": "null"}, "text is null"),
    "a text with half a pair": ({"text": '"\\ud800"'}, "surrogate"),
    "a text of megabytes": ({"text": '"' + "x" * (2 << 20) + '"'}, "bytes"),
    "an end that is a number": ({"finish_reason": "7"}, "finish_reason is a number"),
    "an end that is a list": ({"finish_reason": '["stop"]'}, "finish_reason is an array"),
    "an end nobody knows": ({"finish_reason": '"content_filter\\u001b"'}, "finish_reason 'content_filter\\x1b'"),
    "no end": ({"finish_reason": "null"}, "a stream that ended before the completion did"),
    "usage that is an array": ({"usage": "[1]"}, "usage is an array"),
    "usage that is a text": ({"usage": '"much"'}, "usage is a string"),
    "details that are an array": ({"usage": '{"prompt_tokens_details": [1]}'}, "prompt_tokens_details is an array"),
    "cached tokens that are a text": ({"usage": '{"prompt_tokens_details": {"cached_tokens": "1"}}'}, "cached_tokens is a string"),
    "cached tokens below 0": ({"usage": '{"prompt_tokens_details": {"cached_tokens": -1}}'}, "cached_tokens is a number"),
    "more cached than there are": ({"usage": '{"prompt_tokens_details": {"cached_tokens": 99}}'}, "more cached tokens than"),
    "other counts": ({"usage": '{"completion_tokens": 99}'}, "completion_tokens 99 where there were"),
    "a prompt that was cut": ({"usage": '{"prompt_tokens": 1}'}, "prompt_tokens 1 where there were 3"),
    "another request's": ({"index": "1"}, "an answer to another request"),
    "choices that are an object": ({"choices": "{}"}, "choices is an object"),
    "a choice that is null": ({"choices": "[null]"}, "a choice is null"),
    "two choices": ({"choices": "[{}, {}]"}, "choices has 2 items"),
    "no choice": ({"choices": "[]"}, "a stream that ended before the completion did"),
    "deep nesting": ({"usage": _NESTED}, "nested too deeply"),
    "an error": ({"error": '{"message": "out of\\n\\u001b[31mmemory"}'}, "out of"),
    "an error that is nothing": ({"error": '""'}, "http"),
}


def _changed(changes: dict[str, str]) -> Does:
    return lambda asked: [stream(event(message(asked, **changes)), DONE)]


def _values() -> dict[str, Mode]:
    return {f"a completion with {name}": Mode(COMPLETE, _changed(c), "lost", says) for name, (c, says) in VALUES.items()}


# -------------------- streams

_ONE = b'{"choices": [{"index": 0, "text": "7 ", "token_ids": [7], "logprobs": {"token_logprobs": [-1]}, "finish_reason": null}]}'
_EMPTY = b'{"choices": [{"index": 0, "text": "", "token_ids": [], "finish_reason": null}]}'

STREAMS: dict[str, tuple[Does, str, str]] = {
    "of comments without end": (_of([STREAM, Forever(chunk(b": still here\n\n"), 0.01)]), "lost", "no progress for"),
    "of empty lines without end": (_of([STREAM, Forever(chunk(b"\n" * 999), 0.01)]), "lost", "no progress for"),
    "of empty messages without end": (_of([STREAM, Forever(chunk(event(_EMPTY)), 0.01)]), "lost", "no progress for"),
    "of events without data, for ever": (_of([STREAM, Forever(chunk(b"event: ping\n\n"), 0.01)]), "lost", "no progress for"),
    "of tokens without end": (_of([STREAM, Forever(chunk(event(_ONE)))]), "lost", "more than 12 tokens"),
    "of a token now and then": (_of([STREAM, Forever(chunk(event(_ONE)), 0.6)]), "lost", "no progress for"),
    "of eleven tokens": (_of([STREAM, chunk(event(_ONE)) * 11, Hold()]), "lost", "no progress for"),
    "that hangs after its end": (lambda a: [STREAM, chunk(event(message(a))), Hold()], "lost", "no progress for"),
    "that hangs after DONE": (lambda a: [STREAM, chunk(event(message(a)) + DONE), Hold()], "lost", "no progress for"),
    "that goes on after DONE": (lambda a: [stream(event(message(a)), DONE, event(_ONE))], "lost", "goes on after its end"),
    "that goes on after its end": (lambda a: [stream(event(message(a)), event(_ONE), DONE)], "lost", "goes on after its end"),
    "that repeats DONE": (lambda a: [stream(event(message(a)), DONE, DONE)], "lost", "goes on after its end"),
    "that is HTML": (_of([whole(b"<html>\n<body>\n", "200 OK", "Content-Type: text/html")]), "lost", "no line of an event stream: <html>"),
    "that is JSON": (lambda a: [whole(message(a) + b"\n")], "lost", "no line of an event stream"),
    "that is nothing": (_of([stream()]), "lost", "a stream that ended before the completion did"),
    "that is only DONE": (_of([stream(DONE)]), "lost", "a stream that ended before the completion did"),
    "with a broken message": (lambda a: [stream(event(message(a)[:-9]), DONE)], "lost", "not JSON"),
    "with a message over two lines": (lambda a: [stream(event(message(a).replace(b", ", b",\ndata: ", 1)), DONE)], "lost", "not JSON"),
    "with NUL bytes": (lambda a: [stream(b"\0" + event(message(a)), DONE)], "lost", "no line of an event stream"),
    "with NUL bytes in a message": (lambda a: [stream(event(message(a).replace(b" ", b"\0")), DONE)], "lost", "not JSON"),
    "with a byte order mark": (lambda a: [stream(b"\xef\xbb\xbf" + event(message(a)), DONE)], "lost", "no line of an event stream"),
    "in UTF-16": (lambda a: [stream(event(message(a)).decode().encode("utf-16"), DONE)], "lost", "no line of an event stream"),
    "in Latin-1": (lambda a: [stream(event(message(a, text='"\xe9"').decode().encode("latin-1")), DONE)], "lost", "not UTF-8"),
    "that ends in the middle": (lambda a: [STREAM + chunk(event(message(a)))[:-40], Reset()], "lost", "Error"),
    "without its last chunk": (lambda a: [STREAM + chunk(event(message(a))), Reset()], "lost", "Error"),
    "that is shorter than it says": (lambda a: [whole(event(message(a)))[:-20], Reset()], "lost", "Error"),
    "that the server aborts": (_changed({"finish_reason": '"abort"'}), "lost", "dropped 20 times"),
    # right, in other words than vLLM's
    "without spaces": (lambda a: [stream(b"data:" + message(a) + b"\n\n", b"data:[DONE]\n\n")], "ever", ""),
    "with CRLF": (lambda a: [stream((event(message(a)) + DONE).replace(b"\n", b"\r\n"))], "ever", ""),
    "with comments, events and ids": (lambda a: [stream(b": hi\n\nevent: m\nid: 7\n", event(message(a)), b"retry: 9\n", DONE)], "ever", ""),
    "without DONE": (lambda a: [stream(event(message(a)))], "ever", ""),
    "byte by byte": (lambda a: [stream(*(bytes([b]) for b in event(message(a)) + DONE))], "ever", ""),
    "of unknown type": (lambda a: [whole(event(message(a)) + DONE, "200 OK", "Content-Type: application/x-what")], "ever", ""),
    "after a 100 Continue": (lambda a: [head("100 Continue") + stream(event(message(a)), DONE)], "ever", ""),
    "with cookies": (lambda a: [whole(event(message(a)), "200 OK", "Set-Cookie: a=" + "b" * 9000)], "ever", ""),
    "with fields nobody knows": (_changed({"stop_reason": "null", "usage": '{"total_tokens": 3, "x": [1]}', "error": "null"}), "ever", ""),
    "and closes": (lambda a: [whole(event(message(a)), "200 OK", "Connection: close")], "ever", ""),
}


def _streams() -> dict[str, Mode]:
    return {f"a stream {name}": Mode(COMPLETE, does, outcome, says) for name, (does, outcome, says) in STREAMS.items()}


MODES: dict[str, Mode] = {**_http(), **CONNECTION, **_bodies(), **_values(), **_streams()}
MODES["answers before it is asked"] = Mode("/health", _of([RIGHT["/health"] * 2]), "refused", "not JSON")
