"""Writes TensorBoard's event files: scalars in TFRecord frames, flushed one by one, so that a killed run leaves a readable file.

A frame is the length (uint64), its checksum, the data, its checksum; little-endian. The data is the protocol buffer `Event`:
wall_time = 1 (double), step = 2 (int64), file_version = 3 (string), summary = 5 (of values: tag = 1, simple_value = 2),
session_log = 7 (status = 1).

Source: tensorflow/core/util/event.proto, tensorflow/core/framework/summary.proto, tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from reinforce_ada.outside import printable

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types
_LARGEST = 3.4028234663852886e38  # of float32
_START = 1  # of a session: whatever has its step or a later one is not shown any more


class EventFile:
    """A new event file in `folder`.

    Args:
        now: seconds since 1970.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._now = now
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(now()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab")
        self._write(_field(3, _BYTES, b"brain.Event:2"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One event with all of these; a number past float32 is written as the largest one."""
        tags = {printable(tag).encode(): value for tag, value in values.items()}
        summary = b"".join(_field(1, _BYTES, _field(1, _BYTES, tag) + _field(2, _FLOAT, _float32(value))) for tag, value in tags.items())
        self._write(_field(2, _VARINT, step) + _field(5, _BYTES, summary))

    def restart(self, step: int) -> None:
        """What earlier files of the folder have at `step` and later is to come again."""
        self._write(_field(2, _VARINT, step) + _field(7, _BYTES, _field(1, _VARINT, _START)))

    def close(self) -> None:
        self._file.close()

    def _write(self, rest: bytes) -> None:
        event = _field(1, _DOUBLE, self._now()) + rest
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))
        self._file.flush()


def _field(number: int, kind: int, value: float | bytes) -> bytes:
    """A field of a protocol buffer."""
    key = _varint(number << 3 | kind)
    if isinstance(value, bytes):
        return key + _varint(len(value)) + value
    if kind == _VARINT:
        return key + _varint(int(value))
    return key + struct.pack("<d" if kind == _DOUBLE else "<f", value)


def _float32(value: float) -> float:
    """The nearest number that float32 has, but for nan and the infinities, which it has."""
    try:
        return min(max(value, -_LARGEST), _LARGEST) if math.isfinite(value) else value
    except OverflowError:  # an integer past float64
        return math.copysign(_LARGEST, value > 0 or -1)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow. Negative numbers are those of 64 bits."""
    out, value = bytearray(), value & 0xFFFFFFFFFFFFFFFF
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _table() -> list[int]:
    """Of CRC-32C: the remainder of every byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_REMAINDERS = _table()


def crc32c(data: bytes) -> int:
    """The checksum with Castagnoli's polynomial."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _REMAINDERS[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and offset, so that a checksum of data that holds checksums stays one."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
