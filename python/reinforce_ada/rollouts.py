"""The rollout store: every event of the driver loop in an SQLite file, one transaction per poll. Imports no torch.

It is the journal a killed run resumes from, and the source of the report. WAL with synchronous=NORMAL: a killed process loses no
committed transaction; a power loss may lose the last ones, never the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import json
import math
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError, differences
from reinforce_ada.files import replace_file
from reinforce_ada.outside import GarbageError, parse_json
from reinforce_ada.packing import pack, unpack
from reinforce_ada.types import Aborted, Completion, CompletionId, Event, Failed, Lost, Pool, SamplingResult, Scored

_SCHEMA_VERSION = "3"
_READABLE = ("1", "2", _SCHEMA_VERSION)
_REMEMBERED = "CREATE TABLE remembered (step INTEGER NOT NULL, key, num_correct INTEGER NOT NULL, num_wrong INTEGER NOT NULL)"
# The long columns come last, so that a query on the short ones does not read through them.
# `reward` and the texts have no affinity: a REAL column would turn -0.0 into 0.0, and a text with a lone surrogate is kept as bytes.
_SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, step INTEGER NOT NULL, prompt_id NOT NULL, idx INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('scored', 'failed', 'lost', 'aborted')),
    policy_version INTEGER NOT NULL, reward, finish_reason TEXT, num_tokens INTEGER, reason, text, tokens BLOB);
CREATE INDEX events_by_step ON events (step);
CREATE TABLE committed (seq INTEGER PRIMARY KEY REFERENCES events (seq), kept INTEGER NOT NULL);
CREATE TABLE pools (
    step INTEGER NOT NULL, position INTEGER NOT NULL, prompt_id NOT NULL, num_correct INTEGER NOT NULL, num_wrong INTEGER NOT NULL,
    num_void INTEGER NOT NULL, num_issued INTEGER NOT NULL, exit TEXT NOT NULL, key, text, data TEXT NOT NULL,
    PRIMARY KEY (step, prompt_id)) WITHOUT ROWID;
CREATE TABLE finished_steps (step INTEGER PRIMARY KEY);
{_REMEMBERED};
"""
# Version 1 has no keys: its prompts go by their ids. Up to version 2 token ids and logprobs are two columns; those rows stay as they are.
_FROM_1 = ("ALTER TABLE pools ADD COLUMN key", "UPDATE pools SET key = prompt_id", _REMEMBERED)
_FROM_2 = ("ALTER TABLE events ADD COLUMN tokens BLOB",)
# A row of 500 tokens takes 2.5 KB: of the usual pages of 4 KB it would fill one. The write-ahead log holds 4 MB, as it usually does.
_PAGES = ("PRAGMA page_size = 32768", "PRAGMA journal_mode = WAL")
_PAGES_IN_LOG = 128
_COLUMNS = "step, prompt_id, idx, kind, policy_version, reward, finish_reason, num_tokens, reason, text"
_INSERT = f"INSERT INTO events ({_COLUMNS}, tokens) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_TOKENS = ("tokens", "token_ids", "rollout_logprobs")
_POOL_COLUMNS = "step, position, prompt_id, num_correct, num_wrong, num_void, num_issued, exit, key, text, data"
_INSERT_POOL = f"INSERT INTO pools ({_POOL_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_LAST_STEP = 2**63 - 1  # of SQLite's integers
_UNDAMAGED = "an undamaged rollout store is needed"
_DIFFERENT_CONFIG = "a store belongs to one configuration"


class PoolCounts(NamedTuple):
    """One pool of a finished step, as counts."""

    step: int
    prompt_id: str
    num_correct: int
    num_wrong: int
    num_void: int
    num_issued: int
    key: str  # what the prompt is remembered by


class Seen(NamedTuple):
    """One pool as a memory takes it in."""

    step: int
    key: str
    num_correct: int
    num_wrong: int


class RolloutStore:
    """The events of one run, in the order they came; the driver's journal.

    Only one process may have a store open for writing; the lock goes with the process. Reading beside it is fine.

    Args:
        path: the SQLite file; made when absent.
        run: the run's configuration, as JSON. Kept in a new store, and compared when one is opened again; None is not compared.
        compared: what of a configuration is compared, given the kept one and then `run`; all of it without.
        read_only: open an existing store without the writer's lock.

    Raises: InputError when the file is another configuration's, is not a store, is damaged, cannot be opened, or has a writer; from
        every method when the disk is full or the file is damaged. What was committed before stays readable.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, run: Mapping[str, Any] | None = None, read_only: bool = False,
        compared: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:  # fmt: skip
        self._path, self._compared = Path(path), compared
        self._has_keys = True
        self._tokens = ""  # the columns of `_TOKENS`, NULL for those that it does not have
        self._lock: int | None = None
        self._connection: sqlite3.Connection | None = None
        if read_only and not self._path.is_file():
            raise InputError("RolloutStore", f"{self._path} does not exist", "a store to read is needed")
        try:
            if not read_only:
                self._lock = _take_lock(self._path)
            with self._guarded():
                self._connection = _connect(self._path, read_only)
                self._open(run, read_only)
        except BaseException:
            self.close()
            raise

    # -------------------- writing

    def append(self, events: Sequence[Event], /) -> Sequence[Event]:
        """Write these events in one transaction and return them."""
        rows = [_row(event) for event in events]
        with self._transaction() as connection:
            connection.executemany(_INSERT, rows)
        return events

    def finish_step(self, step: int, result: SamplingResult) -> None:
        """Write which events make up the step's pools and groups, and that the step is finished; again for the same step, instead."""
        kept = {scored.id for group in result.groups for scored in group.kept}
        with self._transaction() as connection:
            seq_of = _first_outcomes(connection, step)
            connection.execute("DELETE FROM committed WHERE seq IN (SELECT seq FROM events WHERE step = ?)", (step,))
            connection.execute("DELETE FROM pools WHERE step = ?", (step,))
            outcomes = [o for pool in result.pools for o in pool.outcomes]
            members = [(seq_of[(o.id, o.policy_version)], o.id in kept) for o in outcomes if (o.id, o.policy_version) in seq_of]
            connection.executemany("INSERT INTO committed (seq, kept) VALUES (?, ?)", members)
            rows = [_pool_row(step, position, pool) for position, pool in enumerate(result.pools)]
            connection.executemany(_INSERT_POOL, rows)
            connection.execute("INSERT OR REPLACE INTO finished_steps (step) VALUES (?)", (step,))

    def take_back(self, ids: Iterable[CompletionId]) -> None:
        """Make aborted requests of these scored completions, as if they had never been answered; to a sampler they are open again."""
        tokens = [c.removeprefix("e.") for c in self._tokens.split(", ") if c != "NULL"]
        cleared = ", ".join(f"{c} = NULL" for c in ("reward", "finish_reason", "text", *tokens))
        where = "step = ? AND prompt_id = ? AND idx = ? AND kind = 'scored'"
        with self._transaction() as connection:
            for step, prompt_id, index in ids:
                whose = (step, _sql_text(prompt_id), index)
                connection.execute(f"DELETE FROM committed WHERE seq IN (SELECT seq FROM events WHERE {where})", whose)
                connection.execute(f"UPDATE events SET kind = 'aborted', {cleared} WHERE {where}", whose)

    def flush(self) -> None:
        """Move what the write-ahead log holds into the file itself, and to the disk: from now on the file alone has it all."""
        with self._guarded():
            self._open_connection().execute("PRAGMA wal_checkpoint(PASSIVE)")

    def forget(self, step: int) -> None:
        """Remove the events of a step that is not finished, all of them: it will be sampled anew."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM events WHERE step = ? AND step NOT IN (SELECT step FROM finished_steps)", (step,))

    def remember(self, earlier: RolloutStore) -> None:
        """Copy what an earlier run's pools say of their prompts, its last step as step 0; a store remembers one run, once."""
        rows = list(earlier.seen())
        last = max((row.step for row in rows), default=0)
        with self._transaction() as connection:
            if not self._remembers(connection):
                shifted = ((row.step - last, _sql_text(row.key), row.num_correct, row.num_wrong) for row in rows)
                connection.executemany("INSERT INTO remembered VALUES (?, ?, ?, ?)", shifted)
                connection.execute("INSERT INTO meta VALUES ('remembers', ?)", (str(earlier._path),))

    # -------------------- reading

    @property
    def id(self) -> str:
        """Which run's store this is, by a random name it got when it was made; "" for one of an earlier version that is only read."""
        with self._guarded():
            row = self._open_connection().execute("SELECT value FROM meta WHERE key = 'id'").fetchone()
            return str(row[0]) if row else ""

    @property
    def remembers(self) -> bool:
        """Whether `remember` has been called."""
        with self._guarded():
            return self._remembers(self._open_connection())

    @staticmethod
    def _remembers(connection: sqlite3.Connection) -> bool:
        return connection.execute("SELECT 1 FROM meta WHERE key = 'remembers'").fetchone() is not None

    def seen(self, last_step: int | None = None) -> Iterator[Seen]:
        """Every pool of the finished steps up to `last_step` in the order a memory takes them in, those of an earlier run first."""
        key = "key" if self._has_keys else "prompt_id"
        own = f"SELECT step, {key}, num_correct, num_wrong FROM pools WHERE step <= ? ORDER BY step, position"
        with self._guarded():
            connection = self._open_connection()
            remembered = (
                connection.execute("SELECT step, key, num_correct, num_wrong FROM remembered ORDER BY rowid") if self._has_keys else ()
            )
            rows = connection.execute(own, (_LAST_STEP if last_step is None else last_step,))
            for step, key, num_correct, num_wrong in itertools.chain(remembered, rows):
                yield Seen(step, _str(key), num_correct, num_wrong)

    def records(self) -> Iterator[dict[str, Any]]:
        """The data of the prompts of all finished steps, each once, as JSON keeps it."""
        with self._guarded():
            for (data,) in self._open_connection().execute("SELECT DISTINCT data FROM pools"):
                yield parse_json(data)

    @property
    def run(self) -> dict[str, Any]:
        """The configuration that the store was made with."""
        with self._guarded():
            row = self._open_connection().execute("SELECT value FROM meta WHERE key = 'run'").fetchone()
        return dict(parse_json(row[0])) if row else {}

    def events(self, step: int) -> list[Event]:
        """The step's events in journal order, equal to what was appended to the bit."""
        with self._guarded():
            query = f"SELECT seq, {self._tokens}, {_COLUMNS} FROM events e WHERE step = ? ORDER BY seq"
            return [self._event(*row) for row in self._open_connection().execute(query, (step,))]

    def last_step(self) -> int | None:
        """The latest step with an event, or None."""
        with self._guarded():
            row: tuple[int | None] = self._open_connection().execute("SELECT MAX(step) FROM events").fetchone()
            return row[0]

    def finished_steps(self) -> list[int]:
        """The steps `finish_step` was called for, ascending."""
        with self._guarded():
            return [step for (step,) in self._open_connection().execute("SELECT step FROM finished_steps ORDER BY step")]

    def pool_counts(self) -> list[PoolCounts]:
        """The pools of all finished steps, by step and in the order the prompts entered."""
        columns = "step, prompt_id, num_correct, num_wrong, num_void, num_issued, " + ("key" if self._has_keys else "prompt_id")
        with self._guarded():
            rows = self._open_connection().execute(f"SELECT {columns} FROM pools ORDER BY step, position")
            return [
                PoolCounts(step, _str(prompt_id), right, wrong, void, issued, _str(key))
                for step, prompt_id, right, wrong, void, issued, key in rows
            ]

    def _event(self, seq: int, tokens: bytes | None, token_ids: bytes | None, logprobs: bytes | None, *row: Any) -> Event:
        step, prompt_id, index, kind, policy_version, reward, finish_reason, num_tokens, reason, text = row
        id_ = CompletionId(step, _str(prompt_id), index)
        if kind == "scored":
            arrays = self._arrays(seq, num_tokens, tokens, token_ids, logprobs)
            return Scored(Completion(id_, *arrays, _str(text), finish_reason, policy_version), reward)
        if kind == "aborted":
            return Aborted(id_, policy_version, num_tokens)
        return (Failed if kind == "failed" else Lost)(id_, policy_version, _str(reason))

    def _arrays(self, seq: int, count: int, tokens: bytes | None, *plain: bytes | None) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Token ids and logprobs of an event, [count] each. Raises: InputError for bytes that are not those of as many."""
        try:
            if tokens is not None:
                return unpack(tokens, count)
            ids, logprobs = (np.frombuffer(data or b"", dtype, count) for data, dtype in zip(plain, ("<i4", "<f4"), strict=True))
            return ids.astype(np.int32), logprobs.astype(np.float32)
        except (ValueError, TypeError) as e:
            raise InputError("RolloutStore", f"{self._path}: event {seq} is damaged: {e}", _UNDAMAGED, "use a new folder") from e

    def export_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write one row per scored or void completion, by step, in journal order.

        Columns: step, prompt_id, index, prompt_text, text, reward, kept, committed, policy_version, finish_reason,
        token_ids list<int32>, rollout_logprobs list<float>, data (the prompt's record as JSON). A void has no reward, text or tokens;
        an unfinished step has no prompt_text or data, and nothing committed.

        Returns: the path. Raises: InputError when pyarrow is missing.
        """
        if importlib.util.find_spec("pyarrow") is None:
            hint = "pip install 'reinforce-ada[report]'"
            raise InputError("export_parquet", "pyarrow is not installed", "it is needed to write Parquet", hint)
        target = Path(path)
        with self._guarded():
            connection = self._open_connection()
            replace_file(target, lambda aside: self._write_parquet(connection, aside), where="export_parquet")
        return target

    def _write_parquet(self, connection: sqlite3.Connection, path: Path) -> None:
        """A row group per step, so that memory holds one step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _parquet_schema()
        steps = [step for (step,) in connection.execute("SELECT DISTINCT step FROM events ORDER BY step")]
        with pq.ParquetWriter(path, schema) as writer:
            for step in steps:
                rows = [self._export_row(*row) for row in connection.execute(_EXPORT.format(tokens=self._tokens), (step,))]
                writer.write_table(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema))

    def _export_row(self, seq: int, num_tokens: int | None, *row: Any) -> tuple[Any, ...]:
        tokens, row = row[:3], row[3:]
        step, prompt_id, index, prompt_text, text, reward, kept, committed, version, finish_reason, data = row
        arrays = (None, None) if num_tokens is None else self._arrays(seq, num_tokens, *tokens)
        texts = (_utf8(prompt_text), _utf8(text))
        return (step, _utf8(prompt_id), index, *texts, reward, bool(kept), bool(committed), version, finish_reason, *arrays, data)

    # -------------------- life cycle

    def close(self) -> None:
        """Give the file and its lock back. May be called twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise InputError("RolloutStore", f"{self._path} is closed", "an open store is needed")
        return self._connection

    def _open(self, run: Mapping[str, Any] | None, read_only: bool) -> None:
        """Make the tables of a new file; check those of an old one."""
        connection = self._open_connection()
        is_empty = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
        if is_empty and not read_only:
            self._create(run)
            self._look_at_columns()
            return
        try:
            meta = dict(connection.execute("SELECT key, value FROM meta"))
        except sqlite3.OperationalError:  # no such table
            meta = {}
        if meta.get("schema_version") not in _READABLE:
            given = f"{self._path} has schema version {meta.get('schema_version')}"
            raise InputError("RolloutStore", given, f"a rollout store of version {_SCHEMA_VERSION} is needed")
        if run is not None and (difference := self._difference(meta, run)):
            raise InputError("RolloutStore", f"{self._path} {difference}", _DIFFERENT_CONFIG, "use a new folder")
        version = meta["schema_version"]
        if version != _SCHEMA_VERSION and not read_only:
            self._upgrade(version)
            version = _SCHEMA_VERSION
        self._has_keys = version != "1"
        self._look_at_columns()

    def _look_at_columns(self) -> None:
        there = {row[1] for row in self._open_connection().execute("PRAGMA table_info(events)")}
        self._tokens = ", ".join(f"e.{c}" if c in there else "NULL" for c in _TOKENS)

    def _difference(self, meta: Mapping[str, str], run: Mapping[str, Any]) -> str:
        try:
            then = parse_json(meta.get("run", ""))
        except GarbageError as e:
            return f"does not say what it was made with ({e})"
        found = differences(self._compared(then), self._compared(json.loads(_canonical(run)))) if isinstance(then, dict) else "nothing"
        return f"was made with {found}" if found else ""

    def _upgrade(self, version: str) -> None:
        """From an earlier version, all of it or nothing."""
        with self._transaction() as connection:
            for statement in (*(_FROM_1 if version == "1" else ()), *_FROM_2):
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES ('id', ?)", (uuid.uuid4().hex,))
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (_SCHEMA_VERSION,))

    def _create(self, run: Mapping[str, Any] | None) -> None:
        meta = {"schema_version": _SCHEMA_VERSION, "id": uuid.uuid4().hex, "run": _canonical(run or {})}
        for statement in _PAGES:
            self._open_connection().execute(statement)
        with self._transaction() as connection:
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it or nothing, whatever ends it."""
        with self._guarded():
            connection = self._open_connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have rolled it back already
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """SQLite's errors as one line that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise _input_error(self._path, error) from error


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    uri = path.absolute().as_uri() + ("?mode=ro" if read_only else "")
    connection = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None)  # explicit transactions only
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_IN_LOG}")
    return connection


def _take_lock(path: Path) -> int:
    """The writer's lock, beside the file: SQLite's own would keep readers out. It ends with the process, however that ends."""
    try:
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError("RolloutStore", f"{path}: {error.strerror}", "a file in a writable folder is needed") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise InputError("RolloutStore", f"{path} is open for writing elsewhere", "one writer at a time") from error
    return lock


def _input_error(path: Path, error: sqlite3.Error) -> InputError:
    text = str(error)
    if "is full" in text:
        hint = "free some and resume: what was committed before is safe"
        return InputError("RolloutStore", f"{path}: {text}", "space for the rollouts is needed", hint)
    if "malformed" in text or "not a database" in text:
        return InputError("RolloutStore", f"{path}: {text}", _UNDAMAGED, "use a new folder")
    return InputError("RolloutStore", f"{path}: {text}", "a store that can be read and written is needed")


# -------------------- rows


def _row(event: Event) -> tuple[Any, ...]:
    head = (event.id.step, _sql_text(event.id.prompt_id), event.id.index)
    if isinstance(event, Scored):
        if not math.isfinite(event.reward):
            raise InputError("RolloutStore.append", f"reward {event.reward} for {tuple(event.id)}", "a finite reward is needed")
        c = event.completion
        if c.token_ids.shape != c.rollout_logprobs.shape:
            given = f"{c.token_ids.size} token ids and {c.rollout_logprobs.size} logprobs for {tuple(event.id)}"
            raise InputError("RolloutStore.append", given, "as many logprobs as token ids")
        short = (c.policy_version, float(event.reward), c.finish_reason, len(c.token_ids))
        return (*head, "scored", *short, None, _sql_text(c.text), pack(c.token_ids, c.rollout_logprobs))
    if isinstance(event, Aborted):
        return (*head, "aborted", event.policy_version, None, None, event.num_tokens, None, None, None)
    kind = "failed" if isinstance(event, Failed) else "lost"
    return (*head, kind, event.policy_version, None, None, None, _sql_text(event.reason), None, None)


def _first_outcomes(connection: sqlite3.Connection, step: int) -> dict[tuple[CompletionId, int], int]:
    """(id, policy version) -> the row the sampler took: the first answer; later ones are duplicates to it."""
    query = "SELECT seq, prompt_id, idx, policy_version FROM events WHERE step = ? AND kind IN ('scored', 'failed') ORDER BY seq DESC"
    rows = connection.execute(query, (step,))
    return {(CompletionId(step, _str(prompt_id), index), version): seq for seq, prompt_id, index, version in rows}


def _pool_row(step: int, position: int, pool: Pool) -> tuple[Any, ...]:
    counts = (pool.num_correct, pool.num_wrong, pool.num_void, pool.num_issued, pool.exit)
    data = json.dumps(dict(pool.prompt.data), default=repr)
    key = pool.prompt.key or pool.prompt.prompt_id
    return (step, position, _sql_text(pool.prompt.prompt_id), *counts, _sql_text(key), _sql_text(pool.prompt.text), data)


def _sql_text(text: str) -> str | bytes:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: not UTF-8, but not a reason to stop a run
        return text.encode("utf-8", "surrogatepass")
    return text


def _str(stored: str | bytes) -> str:
    return stored.decode("utf-8", "surrogatepass") if isinstance(stored, bytes) else stored


# -------------------- configuration


def _canonical(run: Mapping[str, Any]) -> str:
    return json.dumps(dict(run), sort_keys=True, default=str)


# -------------------- Parquet

_EXPORT = """
SELECT e.seq, e.num_tokens, {tokens}, e.step, e.prompt_id, e.idx, p.text, e.text, e.reward,
       COALESCE(c.kept, 0), c.seq IS NOT NULL, e.policy_version, e.finish_reason, p.data
FROM events e
LEFT JOIN committed c ON c.seq = e.seq
LEFT JOIN pools p ON p.step = e.step AND p.prompt_id = e.prompt_id
WHERE e.step = ? AND e.kind IN ('scored', 'failed') ORDER BY e.seq
"""


def _parquet_schema() -> Any:
    import pyarrow as pa

    columns = {
        "step": pa.int64(), "prompt_id": pa.string(), "index": pa.int64(), "prompt_text": pa.string(), "text": pa.string(),
        "reward": pa.float64(), "kept": pa.bool_(), "committed": pa.bool_(), "policy_version": pa.int64(), "finish_reason": pa.string(),
        "token_ids": pa.list_(pa.int32()), "rollout_logprobs": pa.list_(pa.float32()), "data": pa.string(),
    }  # fmt: skip
    return pa.schema(list(columns.items()))


def _utf8(stored: str | bytes | None) -> str | None:
    """A lone surrogate becomes U+FFFD."""
    return stored.decode(errors="replace") if isinstance(stored, bytes) else stored
