"""Messages between the pool and a worker, over a socket. The pool's end never waits for the worker's."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_HEADER = struct.Struct("!Q")
_READ_BYTES = 1 << 16
_LARGEST = 1 << 40  # a longer message is invalid: something else has written to the socket


class Channel:
    """Pickled messages, each after its length in 8 bytes, over a connected socket.

    With `is_waiting` (the worker's end) `send` returns when all is written and `receive` waits for a message. Without it (the pool's end)
    neither ever waits, and `flush` writes what did not fit.

    Raises: EOFError from `receive` when the other end is closed or sends no messages; OSError when it is gone.
    """

    def __init__(self, connection: socket.socket, *, is_waiting: bool) -> None:
        self._socket = connection
        self._socket.setblocking(is_waiting)
        self._outgoing = bytearray()
        self._incoming = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Return whether `flush` has something left to write."""
        return bool(self._outgoing)

    def send(self, message: Any) -> None:
        """Write a message, or as much of it as fits now."""
        data = pickle.dumps(message, protocol=5)
        self._outgoing += _HEADER.pack(len(data))
        self._outgoing += data
        self.flush()

    def flush(self) -> int:
        """Continue writing, and return the number of bytes sent."""
        before = len(self._outgoing)
        try:
            while self._outgoing:
                with memoryview(self._outgoing) as view:
                    num_sent = self._socket.send(view[: 1 << 20])
                del self._outgoing[:num_sent]
        except BlockingIOError:
            pass
        return before - len(self._outgoing)

    def receive(self) -> list[Any]:
        """Return the messages that have arrived completely."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise EOFError("the other end is closed")
        self._incoming += data
        return self._whole()

    def _whole(self) -> list[Any]:
        messages, start = [], 0
        while len(self._incoming) - start >= _HEADER.size:
            (size,) = _HEADER.unpack_from(self._incoming, start)
            if size > _LARGEST:
                raise EOFError("the other end sends no messages")
            end = start + _HEADER.size + size
            if len(self._incoming) < end:
                break
            try:
                messages.append(pickle.loads(self._incoming[start + _HEADER.size : end]))
            except Exception as error:  # bytes that are not a pickle may raise anything
                raise EOFError("the other end sends no messages") from error
            start = end
        del self._incoming[:start]
        return messages

    def close(self) -> None:
        self._socket.close()
