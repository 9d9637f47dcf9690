"""A stand-in for an OpenAI-compatible chat server, in a thread. What it answers follows from the question and the seed alone.

Questions are sums, "7+8"; one in two answers is right, by the seed. It can refuse, fail once, and hold its answers back.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Asked = tuple[str, int]  # (question, seed)


class ChatServer(ThreadingHTTPServer):
    """Answers /v1/chat/completions.

    Args:
        hold_after: so many requests are answered; every later one is held until `release` is set.
        fail, refuse: seeds divisible by `fail` get an error 500 at first, those divisible by `refuse` always an error 400.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *, hold_after: int | None = None, fail: int = 5, refuse: int = 7) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fail, self.refuse = fail, refuse
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.lock = threading.Lock()
        self.asked: list[Asked] = []  # in order of arrival, each as often as it was asked
        self.bodies: list[dict[str, Any]] = []
        self.left = float("inf") if hold_after is None else hold_after
        self.is_holding, self.release = threading.Event(), threading.Event()

    def admit(self, body: dict[str, Any]) -> bool:
        """Note a request. Return whether it has been asked before; wait if it is to be held."""
        asked = (body["messages"][0]["content"], body["seed"])
        with self.lock:
            before = asked in self.asked
            self.asked.append(asked)
            self.bodies.append(body)
            self.left -= 1
            is_held = self.left < 0
        if is_held:
            self.is_holding.set()
            self.release.wait()
        return before

    def handle_error(self, *_: Any) -> None:
        """Say nothing of a client that was killed."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked_before = self.server.admit(body)
        if body["seed"] % self.server.refuse == 0:
            self._reply(400, {"error": {"message": "this seed is refused"}})
        elif body["seed"] % self.server.fail == 0 and not asked_before:
            self._reply(500, {"error": {"message": "try again"}})
        else:
            self._reply(200, answer(body))

    def _reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """Return what a server answers: words as tokens, and their ids if they are asked for, as vLLM does."""
    right = sum(int(n) for n in body["messages"][0]["content"].split("+"))
    text = f"The sum is {right + (random.Random(body['seed']).random() < 0.5)}."
    words = text.split()
    logprobs: list[dict[str, Any]] = [{"token": word, "logprob": -0.5, "bytes": None, "top_logprobs": []} for word in words]
    choice = {
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
        "logprobs": {"content": logprobs} if body.get("logprobs") else None,
        **({"token_ids": [len(word) for word in words]} if body.get("return_token_ids") else {}),
    }  # fmt: skip
    usage = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3 + len(words)}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice], "usage": usage}


@contextmanager
def chat_server(**settings: Any) -> Iterator[ChatServer]:
    """A server that answers until the end of the block."""
    server = ChatServer(**settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
