"""A server with vLLM's interface whose completions follow from the seed and the weights: `python scripted_server.py PORT [JSON]`.

The first token of a completion is the number its weights hold (the tensor "number" of the file it last loaded, -1 as a new server), the
rest come from the seed. JSON changes what it says: model, max_model_len, version, key, dev (false: no development mode), token_s (seconds
between tokens), takes_weights, garbage (every so manieth completion is none), tells_cached (all of a prompt but one token),
certificate (a PEM file with its key: https),
busy (so many times /version answers busy_status).
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

SETTINGS: dict[str, Any] = {
    "model": "scripted", "max_model_len": 4096, "version": "0.32.0", "key": "", "dev": True, "token_s": 0.002, "takes_weights": True,
    "garbage": 0, "tells_cached": True, "certificate": "", "busy": 0, "busy_status": 503,
}  # fmt: skip
COUNTER, GREETINGS = count(1), count()
STATE: dict[str, Any] = {"weights": -1, "active": 0}
LOCK = threading.Lock()


def completion(seed: int, weights: int, max_tokens: int) -> tuple[list[int], list[float], str, str]:
    """(tokens, logprobs, text, finish_reason)."""
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, max_tokens + 1))
    tokens = [weights, *rng.integers(100, 1000, length - 1).tolist()]
    finish = "stop" if length < max_tokens else "length"
    return tokens, (-rng.random(length)).tolist(), " ".join(map(str, tokens)), finish


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, None)
        elif self.path == "/version" and next(GREETINGS) < SETTINGS["busy"]:
            self._reply(SETTINGS["busy_status"], None)
        elif self.path == "/version":
            self._reply(200, {"version": SETTINGS["version"]})
        elif self.path == "/active":
            self._reply(200, STATE)
        elif self.path == "/v1/models" and self._has_key():
            self._reply(200, {"data": [{"id": SETTINGS["model"], "max_model_len": SETTINGS["max_model_len"]}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path in ("/collective_rpc", "/reset_prefix_cache") and not SETTINGS["dev"]:
            self._reply(404, {"detail": "Not Found"})
        elif self.path == "/reset_prefix_cache":
            self._reply(200, {"success": True})
        elif self.path == "/collective_rpc":
            self._load(json.loads(body))
        elif self.path == "/v1/completions" and self._has_key():
            with LOCK:
                STATE["active"] += 1
            try:
                self._complete(json.loads(body))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with LOCK:
                    STATE["active"] -= 1

    def _load(self, call: dict[str, Any]) -> None:
        assert call["method"] == "reload_weights"
        if not SETTINGS["takes_weights"]:
            self._reply(500, {"error": {"message": "size mismatch for embed_tokens"}})
            return
        STATE["weights"] = int(load_file(Path(call["kwargs"]["weights_path"]) / "model.safetensors")["number"][0])
        self._reply(200, {"results": [None]})

    def _complete(self, asked: dict[str, Any]) -> None:
        assert asked["stream"]
        assert asked["return_token_ids"]
        assert asked["model"] == SETTINGS["model"]
        STATE["asked"] = asked
        tokens, logprobs, text, finish = completion(asked["seed"], STATE["weights"], asked["max_tokens"])
        garbage = SETTINGS["garbage"] and next(COUNTER) % SETTINGS["garbage"] == 0
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i, (token, logprob, word) in enumerate(zip(tokens, logprobs, text.split(), strict=True)):
            last = i == len(tokens) - 1
            choice = {
                "index": 0, "text": word if last else word + " ", "token_ids": [token], "logprobs": {"token_logprobs": [logprob]},
                "finish_reason": finish if last else None,
            }  # fmt: skip
            self._event("garbage" if garbage and last else json.dumps({"choices": [choice]}))
            time.sleep(SETTINGS["token_s"])
        if asked["stream_options"]["include_usage"]:
            details = {"cached_tokens": len(asked["prompt"]) - 1}
            self._event(json.dumps({"choices": [], "usage": {"prompt_tokens_details": details if SETTINGS["tells_cached"] else None}}))
        self._event("[DONE]")
        self._chunk(b"")

    def _event(self, text: str) -> None:
        self._chunk(f"data: {text}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _has_key(self) -> bool:
        if SETTINGS["key"] and self.headers.get("Authorization") != f"Bearer {SETTINGS['key']}":
            self._reply(401, {"error": "Unauthorized"})
            return False
        return True

    def _reply(self, status: int, body: Any) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    allow_reuse_address = True


if __name__ == "__main__":
    SETTINGS.update(json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    server = Server(("127.0.0.1", int(sys.argv[1])), Handler)
    if SETTINGS["certificate"]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SETTINGS["certificate"])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
