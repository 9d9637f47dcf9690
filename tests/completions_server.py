"""A stand-in for an OpenAI-compatible completions endpoint that is not vLLM's, in a thread: /v1/models and streamed /v1/completions.

What it answers follows from the prompt and the seed alone. It refuses every field that the interface does not have, as OpenAI does.
"""

from __future__ import annotations

import json
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FIELDS = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "n", "stream", "stream_options", "logprobs", "echo", "stop",
    "presence_penalty", "frequency_penalty", "best_of", "logit_bias", "user", "suffix", "seed",
}  # fmt: skip
Answered = tuple[Sequence[tuple[str, float]], str]  # [(text of a token, its logprob)], finish_reason


def one_sum(prompt: Any, seed: int) -> Answered:
    """Answer "7+8", as text or as the code points of its characters, with the sum, or one more, half of the time each."""
    text = prompt if isinstance(prompt, str) else "".join(map(chr, prompt))
    right = sum(int(n) for n in text.split("+"))
    draw = random.Random(seed).random()
    return [(character, -draw) for character in str(right + (draw < 0.5))], "stop"


class CompletionsServer(ThreadingHTTPServer):
    """Answers as `answer(prompt, seed)` says.

    Args:
        logprobs: the form of the logprobs: "legacy", "chat" or "none".
        models: the names that /v1/models has.
        key: what a client must send; "" for anything.
        vllm: the server is vLLM's: it says so, and gives token ids, which are 100 + the length of each text.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self, answer: Callable[[Any, int], Answered] = one_sum, *, logprobs: str = "legacy", models: Sequence[str] = ("m",), key: str = "",
        vllm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.logprobs, self.models, self.key, self.vllm = answer, logprobs, models, key, vllm
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has closed its stream; anything else is a fault of the test."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError | ConnectionResetError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CompletionsServer

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        if self.path != "/v1/models":
            self._reply(404, {"error": {"message": f"no {self.path}"}})
        elif self._may():
            owner = "vllm" if self.server.vllm else "somebody"
            self._reply(
                200, {"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in self.server.models]}
            )

    def do_POST(self) -> None:
        self.server.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self._reply(404, {"error": {"message": f"no {self.path}"}})
        elif self._may():
            self.server.bodies.append(body)
            unknown = sorted(body.keys() - FIELDS)
            if unknown and not self.server.vllm:
                self._reply(400, {"error": {"message": f"unknown field {unknown[0]}"}})
            else:
                self._stream(body)

    def _stream(self, body: dict[str, Any]) -> None:
        tokens, finish = self.server.answer(body["prompt"], body["seed"])
        lines = [{"choices": [self._choice(text, logprob, body)]} for text, logprob in tokens]
        lines.append({"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": finish}]})
        data = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
        self._send(200, data.encode(), "text/event-stream")

    def _choice(self, text: str, logprob: float, body: dict[str, Any]) -> dict[str, Any]:
        shown = text if not text.startswith("<") else ""  # a special token has no text
        choice: dict[str, Any] = {"index": 0, "text": shown, "logprobs": None, "finish_reason": None}
        if body.get("logprobs") is not None and self.server.logprobs == "legacy":
            choice["logprobs"] = {"tokens": [text], "token_logprobs": [logprob], "top_logprobs": None, "text_offset": [0]}
        if body.get("logprobs") is not None and self.server.logprobs == "chat":
            choice["logprobs"] = {"content": [{"token": text, "logprob": logprob, "bytes": None}]}
        return {**choice, **({"token_ids": [100 + len(text)]} if body.get("return_token_ids") else {})}

    def _may(self) -> bool:
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._reply(401, {"error": {"message": "no such key"}})
            return False
        return True

    def _reply(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def completions_server(*arguments: Any, **settings: Any) -> Iterator[CompletionsServer]:
    """A server that answers until the end of the block."""
    server = CompletionsServer(*arguments, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
