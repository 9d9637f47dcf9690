"""A server with vLLM's interface that does one thing as a table says, in bytes: `HostileServer` in a thread of this process.

What it does is a list of steps: bytes are sent; `Hold` waits for the other side to go; `Forever` repeats bytes until then; `Reset` ends the
connection without a word. Everything else is answered as the scripted server does.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file
from scripted_server import completion


@dataclass(frozen=True)
class Forever:
    """These bytes, again and again, with a pause between."""

    data: bytes
    pause_s: float = 0.0


class Hold:
    """Nothing more, and the connection stays open."""


class Reset:
    """The connection is gone at once."""


Step = bytes | Forever | Hold | Reset
Does = Callable[["Asked"], Sequence[Step]]


@dataclass(frozen=True)
class Asked:
    """A request, and what the right answer to it would be."""

    path: str
    body: Any
    weights: int

    def fields(self) -> dict[str, str]:
        """Of the right completion, each as JSON."""
        tokens, logprobs, text, finish = completion(self.body["seed"], self.weights, self.body["max_tokens"])
        known = {"index": 0, "text": text, "token_ids": tokens, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish}
        return {name: json.dumps(value) for name, value in known.items()}


def message(asked: Asked, **changed: str) -> bytes:
    """One message with the whole completion; `choices`, `usage` and `error` belong to the message, other fields to its choice."""
    of_message = {name: changed.pop(name) for name in ("choices", "usage", "error") if name in changed}
    choice = ", ".join(f'"{name}": {value}' for name, value in {**asked.fields(), **changed}.items())
    return ", ".join(f'"{name}": {value}' for name, value in {"choices": f"[{{{choice}}}]", **of_message}.items()).join("{}").encode()


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


DONE = event(b"[DONE]")


def head(status: str = "200 OK", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


def whole(data: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """An answer of known length."""
    return head(status, f"Content-Length: {len(data)}", *headers) + data


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


STREAM = head("200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked")


def stream(*data: bytes) -> bytes:
    """A whole stream, a chunk for each."""
    return STREAM + b"".join(map(chunk, data)) + chunk(b"")


class HostileServer:
    """One server; `at` is the path at which it does what it does, "" any, as soon as a connection comes."""

    def __init__(self, at: str = "nowhere", does: Does = lambda asked: []) -> None:
        self._at, self._does, self._weights = at, does, -1
        self.asked: list[Asked] = []
        self._has_ended = False
        self._connections: list[tuple[asyncio.Task[None], asyncio.StreamWriter]] = []

    async def begin(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def end(self) -> None:
        self._has_ended = True
        # In Python 3.11 a connection that is being taken when the server closes is never closed itself: take no more, and let those pass.
        for listening in self._server.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())
        for _ in range(5):
            await asyncio.sleep(0)
        self._server.close()
        for task, writer in self._connections:
            task.cancel()
            writer.transport.abort()
        await asyncio.gather(*(task for task, _ in self._connections), return_exceptions=True)
        await asyncio.sleep(0)  # in which they let go of their sockets

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.append((task, writer))
        if self._has_ended:  # a connection that was on its way
            writer.transport.abort()
            return
        with suppress(asyncio.CancelledError):  # which asyncio would log
            await self._talk(reader, writer)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            if self._at == "":
                await self._play(self._does(Asked("", None, -1)), writer)
            while self._at != "":
                asked = await self._read(reader)
                self.asked.append(asked)
                hostile = asked.path == self._at
                await self._play(self._does(asked) if hostile else [self._right(asked)], writer)
                if hostile and writer.is_closing():
                    break

    async def _read(self, reader: asyncio.StreamReader) -> Asked:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        size = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
        body = await reader.readexactly(size)
        return Asked(lines[0].split()[1], json.loads(body) if body else None, self._weights)

    def _right(self, asked: Asked) -> bytes:
        if asked.path == "/v1/completions":
            return stream(event(message(asked)), DONE)
        if asked.path == "/collective_rpc":
            self._weights = int(load_file(Path(asked.body["kwargs"]["weights_path"]) / "model.safetensors")["number"][0])
        return RIGHT[asked.path]

    async def _play(self, steps: Sequence[Step], writer: asyncio.StreamWriter) -> None:
        for step in steps:
            if isinstance(step, Reset):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            elif isinstance(step, bytes):
                writer.write(step)
            while isinstance(step, (Forever, Hold)) and not writer.is_closing():
                writer.write(step.data if isinstance(step, Forever) else b"")
                await writer.drain()
                await asyncio.sleep(step.pause_s if isinstance(step, Forever) else 0.05)
            await writer.drain()
        if not steps:  # ends without a word
            writer.close()


RIGHT = {
    "/health": whole(b""),
    "/version": whole(b'{"version": "0.32.0"}'),
    "/v1/models": whole(b'{"data": [{"id": "scripted", "max_model_len": 4096}]}'),
    "/reset_prefix_cache": whole(b'{"success": true}'),
    "/collective_rpc": whole(b'{"results": [null]}'),
}


@contextmanager
def loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """Where hostile servers live; they are gone with it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


@contextmanager
def hostile(loop: asyncio.AbstractEventLoop, *servers: HostileServer) -> Iterator[list[str]]:
    """Their URLs."""
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.begin(), loop).result(20)
    try:
        yield [f"http://127.0.0.1:{server.port}" for server in servers]
    finally:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.end(), loop).result(20)
