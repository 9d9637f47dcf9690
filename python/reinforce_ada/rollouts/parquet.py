"""Export of a store's rollouts as a Parquet file."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from reinforce_ada.rollouts.rows import TOKENS, arrays_of, utf8

_EXPORT = """
SELECT e.seq, e.num_tokens, {tokens}, e.step, e.prompt_id, e.idx, p.text, e.text, e.reward,
       COALESCE(c.kept, 0), c.seq IS NOT NULL, e.policy_version, e.finish_reason, p.data
FROM events e
LEFT JOIN committed c ON c.seq = e.seq
LEFT JOIN pools p ON p.step = e.step AND p.prompt_id = e.prompt_id
WHERE e.step = ? AND e.kind IN ('scored', 'failed') ORDER BY e.seq
"""


def write_parquet(connection: sqlite3.Connection, tokens: str, store: Path, path: Path) -> None:
    """Write the rollouts of the open `store` to `path`, a row group for each step, so that memory holds one step.

    `tokens` are the columns of the tokens in the SQL of this store's version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "step": pa.int64(), "prompt_id": pa.string(), "index": pa.int64(), "prompt_text": pa.string(), "text": pa.string(),
        "reward": pa.float64(), "kept": pa.bool_(), "committed": pa.bool_(), "policy_version": pa.int64(), "finish_reason": pa.string(),
        "token_ids": pa.list_(pa.int32()), "rollout_logprobs": pa.list_(pa.float32()), "token_mask": pa.list_(pa.bool_()),
        "data": pa.string(),
    }  # fmt: skip
    schema = pa.schema(list(columns.items()))
    steps = [step for (step,) in connection.execute("SELECT DISTINCT step FROM events ORDER BY step")]
    with pq.ParquetWriter(path, schema) as writer:
        for step in steps:
            rows = [_export_row(store, *row) for row in connection.execute(_EXPORT.format(tokens=tokens), (step,))]
            writer.write_table(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema))


def _export_row(store: Path, seq: int, num_tokens: int | None, *row: Any) -> tuple[Any, ...]:
    tokens, row = row[: len(TOKENS)], row[len(TOKENS) :]
    step, prompt_id, index, prompt_text, text, reward, kept, committed, version, finish_reason, data = row
    arrays = (None, None, None) if num_tokens is None else arrays_of(store, seq, num_tokens, *tokens)
    texts = (utf8(prompt_text), utf8(text))
    return (step, utf8(prompt_id), index, *texts, reward, bool(kept), bool(committed), version, finish_reason, *arrays, data)
