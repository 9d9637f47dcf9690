"""Conversion of events and pools to rows of the store, and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.outside import is_utf8
from reinforce_ada.packing import pack, unpack
from reinforce_ada.rollouts.schema import UNDAMAGED
from reinforce_ada.types import Aborted, Completion, CompletionId, Event, Failed, Lost, Pool, Scored

COLUMNS = "step, prompt_id, idx, kind, policy_version, reward, finish_reason, num_tokens, reason, text"
INSERT = f"INSERT INTO events ({COLUMNS}, tokens, token_mask) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
TOKENS = ("tokens", "token_ids", "rollout_logprobs", "token_mask")
_POOL_COLUMNS = "step, position, prompt_id, num_correct, num_wrong, num_void, num_issued, exit, key, text, data"
INSERT_POOL = f"INSERT INTO pools ({_POOL_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


def row_of(event: Event) -> tuple[Any, ...]:
    """Return the event as the values of the `INSERT` statement.

    Raises: InputError for a reward that is not finite, or logprobs that do not match the token ids.
    """
    head = (event.id.step, sql_text(event.id.prompt_id), event.id.index)
    if isinstance(event, Scored):
        if not math.isfinite(event.reward):
            raise InputError("RolloutStore.append", f"reward {event.reward} for {tuple(event.id)}", "a finite reward is needed")
        c = event.completion
        if c.token_ids.shape != c.rollout_logprobs.shape:
            given = f"{c.token_ids.size} token ids and {c.rollout_logprobs.size} logprobs for {tuple(event.id)}"
            raise InputError("RolloutStore.append", given, "as many logprobs as token ids")
        short = (c.policy_version, float(event.reward), c.finish_reason, len(c.token_ids))
        return (*head, "scored", *short, None, sql_text(c.text), pack(c.token_ids, c.rollout_logprobs), _bits_of(c.token_mask))
    if isinstance(event, Aborted):
        return (*head, "aborted", event.policy_version, None, None, event.num_tokens, None, None, None, None)
    kind = "failed" if isinstance(event, Failed) else "lost"
    return (*head, kind, event.policy_version, None, None, None, sql_text(event.reason), None, None, None)


def event_of(path: Path, seq: int, *row: Any) -> Event:
    """Return the event of a row: its place in the store, then `TOKENS`, then `COLUMNS`."""
    tokens, row = row[: len(TOKENS)], row[len(TOKENS) :]
    step, prompt_id, index, kind, policy_version, reward, finish_reason, num_tokens, reason, text = row
    id_ = CompletionId(step, str_of(prompt_id), index)
    if kind == "scored":
        ids, logprobs, mask = arrays_of(path, seq, num_tokens, *tokens)
        return Scored(Completion(id_, ids, logprobs, str_of(text), finish_reason, policy_version, token_mask=mask), reward)
    if kind == "aborted":
        return Aborted(id_, policy_version, num_tokens)
    return (Failed if kind == "failed" else Lost)(id_, policy_version, str_of(reason))


def arrays_of(
    path: Path, seq: int, count: int, tokens: bytes | None, token_ids: bytes | None, logprobs: bytes | None, token_mask: bytes | None
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.bool_] | None]:
    """Return token ids, logprobs and mask of an event, [count] each. Raises: InputError if the bytes do not hold that many."""
    try:
        mask = None if token_mask is None else _mask_of(token_mask, count)
        if tokens is not None:
            return *unpack(tokens, count), mask
        plain = ((token_ids, "<i4"), (logprobs, "<f4"))
        ids, floats = (np.frombuffer(data or b"", dtype, count) for data, dtype in plain)
        return ids.astype(np.int32), floats.astype(np.float32), mask
    except (ValueError, TypeError) as e:
        raise InputError("RolloutStore", f"{path}: event {seq} is damaged: {e}", UNDAMAGED, "use a new folder") from e


def _bits_of(mask: NDArray[np.bool_] | None) -> bytes | None:
    return None if mask is None else np.packbits(mask).tobytes()


def _mask_of(bits: bytes, count: int) -> NDArray[np.bool_]:
    if len(bits) != -(-count // 8):
        raise ValueError(f"a mask of {len(bits)} bytes for {count} tokens")
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(np.bool_)


def pool_row(step: int, position: int, pool: Pool) -> tuple[Any, ...]:
    """Return the pool as the values of the `INSERT_POOL` statement."""
    counts = (pool.num_correct, pool.num_wrong, pool.num_void, pool.num_issued, pool.exit)
    data = json.dumps(dict(pool.prompt.data), default=repr)
    key = pool.prompt.key or pool.prompt.prompt_id
    return (step, position, sql_text(pool.prompt.prompt_id), *counts, sql_text(key), sql_text(pool.prompt.text), data)


def sql_text(text: str) -> str | bytes:
    """Return a text as SQLite keeps it: as bytes if it has a lone surrogate, which is no reason to stop a run."""
    return text if is_utf8(text) else text.encode("utf-8", "surrogatepass")


def str_of(stored: str | bytes) -> str:
    """Return the text that `sql_text` was given."""
    return stored.decode("utf-8", "surrogatepass") if isinstance(stored, bytes) else stored


def utf8(stored: str | bytes | None) -> str | None:
    """Return a stored text as valid UTF-8: a lone surrogate becomes U+FFFD."""
    return stored.decode(errors="replace") if isinstance(stored, bytes) else stored
