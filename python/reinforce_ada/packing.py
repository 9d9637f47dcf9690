"""Token ids and log-probabilities as few bytes, exactly. numpy and the standard library.

Both are split into planes: the lowest bytes of all values, then the next ones, and so on. Planes that look random (the lowest of ids, the
mantissas of logprobs) stay as they are; the others hold few different bytes and go through deflate.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

_RAW_LOGPROB_PLANES = 3  # of 4: the mantissa, and the lowest bit of the exponent
_WINDOW, _MEMORY = 9, 3  # the smallest states of deflate that lose nothing on some hundred bytes: setting it up costs most


def pack_ids(ids: NDArray[np.int32]) -> bytes:
    """Token ids, [L] int32, any values."""
    highest = int(ids.max(initial=0)) if ids.min(initial=0) >= 0 else -1
    width = max(1, -(-highest.bit_length() // 8)) if highest >= 0 else 4
    planes = _planes(ids.astype("<i4", copy=False))
    head: bytes = planes[0].tobytes()
    return bytes([width]) + head + _deflate(planes[1:width].tobytes())


def unpack_ids(data: bytes, count: int) -> NDArray[np.int32]:
    """What `pack_ids` was given, of that length. Raises: ValueError for other bytes."""
    return _values(data, count, 1).view("<i4").astype(np.int32)


def pack_logprobs(logprobs: NDArray[np.float32]) -> bytes:
    """Log-probabilities, [L] float32, to the bit, whatever they are."""
    planes = _planes(logprobs.astype("<f4", copy=False))
    raw: bytes = planes[:_RAW_LOGPROB_PLANES].tobytes()
    return b"\x04" + raw + _deflate(planes[_RAW_LOGPROB_PLANES:].tobytes())


def unpack_logprobs(data: bytes, count: int) -> NDArray[np.float32]:
    """What `pack_logprobs` was given, of that length. Raises: ValueError for other bytes."""
    return _values(data, count, _RAW_LOGPROB_PLANES).view("<f4").astype(np.float32)


def _planes(values: NDArray[np.int32] | NDArray[np.float32]) -> NDArray[np.uint8]:
    """[4, L]: the bytes of L values, the lowest of all first."""
    return np.ascontiguousarray(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 4).T)


def _values(data: bytes, count: int, num_raw: int) -> NDArray[np.uint8]:
    """[4 L]: the bytes as they were, absent planes being zero."""
    width, split = data[0] if data else 0, 1 + num_raw * count
    if not num_raw <= width <= 4 or len(data) < split:
        raise ValueError(f"{len(data)} bytes are not {count} packed values")
    try:
        rest = zlib.decompress(data[split:], -_WINDOW)
    except zlib.error as e:
        raise ValueError(str(e)) from e
    if len(rest) != (width - num_raw) * count:
        raise ValueError(f"{len(rest)} bytes where {(width - num_raw) * count} are needed")
    planes = np.zeros((4, count), np.uint8)
    planes[:width] = np.frombuffer(data[1:split] + rest, np.uint8).reshape(width, count)
    return np.ascontiguousarray(planes.T).reshape(-1)


def _deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, -_WINDOW, _MEMORY, zlib.Z_RLE)
    return packer.compress(data) + packer.flush()
