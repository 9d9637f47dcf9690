"""The rollout store: every event of the driver loop in an SQLite file, one transaction per poll. Imports no torch.

It is the journal from which a killed run resumes, and the source of the report. WAL with synchronous=NORMAL: a killed process loses no
committed transaction; a power loss may lose the last ones, never the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from reinforce_ada.errors import InputError, differences
from reinforce_ada.files import replace_file
from reinforce_ada.outside import GarbageError, parse_json
from reinforce_ada.rollouts.parquet import write_parquet
from reinforce_ada.rollouts.rows import COLUMNS, INSERT, INSERT_POOL, TOKENS, event_of, pool_row, row_of, sql_text, str_of
from reinforce_ada.rollouts.sample import SampledPool, sample
from reinforce_ada.rollouts.schema import PAGES, READABLE, SCHEMA, UPGRADES, VERSION, connect, input_error, take_lock
from reinforce_ada.types import CompletionId, Event, SamplingResult

_LAST_STEP = 2**63 - 1  # the largest of SQLite's integers
_DIFFERENT_CONFIG = "a store belongs to one configuration"


class PoolCounts(NamedTuple):
    """One pool of a finished step, as counts."""

    step: int
    prompt_id: str
    num_correct: int
    num_wrong: int
    num_void: int
    num_issued: int
    key: str  # identifies the prompt across steps and runs


class Seen(NamedTuple):
    """One pool in the form that a memory takes."""

    step: int
    key: str
    num_correct: int
    num_wrong: int


class RolloutStore:
    """The events of one run in order of arrival; the driver's journal.

    Only one process may have a store open for writing; the lock ends with the process. Others may read at the same time.

    Args:
        path: the SQLite file; created if absent.
        run: the run's configuration, as JSON. Saved in a new store, and compared when one is opened again; None is not compared.
        compared: returns the part of a configuration that is compared, called with the saved one and then with `run`; by default all of it.
        read_only: open an existing store without the writer's lock.

    Raises: InputError when the file is another configuration's, is not a store, is damaged, cannot be opened, or has a writer; from every
        method when the disk is full or the file is damaged. What was committed before stays readable.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, run: Mapping[str, Any] | None = None, read_only: bool = False,
        compared: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:  # fmt: skip
        self._path, self._compared = Path(path), compared
        self._has_keys = True
        self._tokens = ""  # the columns of `TOKENS`, NULL for those that the store does not have
        self._lock: int | None = None
        self._connection: sqlite3.Connection | None = None
        if read_only and not self._path.is_file():
            raise InputError("RolloutStore", f"{self._path} does not exist", "a store to read is needed")
        try:
            if not read_only:
                self._lock = take_lock(self._path)
            with self._guarded():
                self._connection = connect(self._path, read_only)
                self._open(run, read_only)
        except BaseException:
            self.close()
            raise

    # -------------------- writing

    def append(self, events: Sequence[Event], /) -> Sequence[Event]:
        rows = [row_of(event) for event in events]
        with self._transaction() as connection:
            connection.executemany(INSERT, rows)
        return events

    def finish_step(self, step: int, result: SamplingResult) -> None:
        """Write which events make up the step's pools and groups, and that the step is finished. A second call replaces the first."""
        kept = {scored.id for group in result.groups for scored in group.kept}
        with self._transaction() as connection:
            seq_of = _first_outcomes(connection, step)
            connection.execute("DELETE FROM committed WHERE seq IN (SELECT seq FROM events WHERE step = ?)", (step,))
            connection.execute("DELETE FROM pools WHERE step = ?", (step,))
            outcomes = [o for pool in result.pools for o in pool.outcomes]
            members = [(seq_of[(o.id, o.policy_version)], o.id in kept) for o in outcomes if (o.id, o.policy_version) in seq_of]
            connection.executemany("INSERT INTO committed (seq, kept) VALUES (?, ?)", members)
            rows = [pool_row(step, position, pool) for position, pool in enumerate(result.pools)]
            connection.executemany(INSERT_POOL, rows)
            connection.execute("INSERT OR REPLACE INTO finished_steps (step) VALUES (?)", (step,))

    def take_back(self, ids: Iterable[CompletionId]) -> None:
        """Turn these scored completions into aborted requests, as if they had never been answered; a sampler issues them again."""
        tokens = [c.removeprefix("e.") for c in self._tokens.split(", ") if c != "NULL"]
        cleared = ", ".join(f"{c} = NULL" for c in ("reward", "finish_reason", "text", *tokens))
        where = "step = ? AND prompt_id = ? AND idx = ? AND kind = 'scored'"
        with self._transaction() as connection:
            for step, prompt_id, index in ids:
                whose = (step, sql_text(prompt_id), index)
                connection.execute(f"DELETE FROM committed WHERE seq IN (SELECT seq FROM events WHERE {where})", whose)
                connection.execute(f"UPDATE events SET kind = 'aborted', {cleared} WHERE {where}", whose)

    def flush(self) -> None:
        """Move the content of the write-ahead log into the file itself, and to the disk, so that the file alone has everything."""
        with self._guarded():
            self._open_connection().execute("PRAGMA wal_checkpoint(PASSIVE)")

    def forget(self, step: int) -> None:
        """Remove all events of a step that is not finished, so that it is sampled again."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM events WHERE step = ? AND step NOT IN (SELECT step FROM finished_steps)", (step,))

    def remember(self, earlier: RolloutStore) -> None:
        """Copy the counts of an earlier run's pools, its last step as step 0; a store remembers one run, once."""
        rows = list(earlier.seen())
        last = max((row.step for row in rows), default=0)
        with self._transaction() as connection:
            if not self.remembers:
                shifted = ((row.step - last, sql_text(row.key), row.num_correct, row.num_wrong) for row in rows)
                connection.executemany("INSERT INTO remembered VALUES (?, ?, ?, ?)", shifted)
                connection.execute("INSERT INTO meta VALUES ('remembers', ?)", (str(earlier._path),))

    # -------------------- reading

    @property
    def id(self) -> str:
        """Return the random name that the run's store got when it was made; "" for one of an earlier version that is only read."""
        return self._meta("id") or ""

    @property
    def remembers(self) -> bool:
        return self._meta("remembers") is not None

    def _meta(self, key: str) -> str | None:
        return next((value for (value,) in self._rows("SELECT value FROM meta WHERE key = ?", key)), None)

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with self._guarded():
            return self._open_connection().execute(query, values).fetchall()

    def seen(self, last_step: int | None = None) -> Iterator[Seen]:
        """Yield every pool of the finished steps up to `last_step` in the order that a memory takes, those of an earlier run first."""
        key = "key" if self._has_keys else "prompt_id"
        own = f"SELECT step, {key}, num_correct, num_wrong FROM pools WHERE step <= ? ORDER BY step, position"
        with self._guarded():
            connection = self._open_connection()
            remembered = (
                connection.execute("SELECT step, key, num_correct, num_wrong FROM remembered ORDER BY rowid") if self._has_keys else ()
            )
            rows = connection.execute(own, (_LAST_STEP if last_step is None else last_step,))
            for step, key, num_correct, num_wrong in itertools.chain(remembered, rows):
                yield Seen(step, str_of(key), num_correct, num_wrong)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the data of the prompts of all finished steps, each once, as JSON keeps it."""
        with self._guarded():
            for (data,) in self._open_connection().execute("SELECT DISTINCT data FROM pools"):
                yield parse_json(data)

    @property
    def run(self) -> dict[str, Any]:
        """Return the configuration with which the store was made."""
        return dict(parse_json(self._meta("run") or "{}"))

    def events(self, step: int) -> list[Event]:
        """Return the step's events in journal order, equal to the bit to what was appended."""
        with self._guarded():
            query = f"SELECT seq, {self._tokens}, {COLUMNS} FROM events e WHERE step = ? ORDER BY seq"
            return [event_of(self._path, *row) for row in self._open_connection().execute(query, (step,))]

    def last_step(self) -> int | None:
        """Return the latest step with an event, or None."""
        ((step,),) = self._rows("SELECT MAX(step) FROM events")
        return cast("int | None", step)

    def finished_steps(self) -> list[int]:
        """Return the steps for which `finish_step` was called, ascending."""
        return [step for (step,) in self._rows("SELECT step FROM finished_steps ORDER BY step")]

    def pool_counts(self) -> list[PoolCounts]:
        """Return the pools of all finished steps, by step and in the order in which the prompts entered."""
        columns = "step, prompt_id, num_correct, num_wrong, num_void, num_issued, " + ("key" if self._has_keys else "prompt_id")
        rows = self._rows(f"SELECT {columns} FROM pools ORDER BY step, position")
        return [
            PoolCounts(step, str_of(prompt_id), right, wrong, void, issued, str_of(key))
            for step, prompt_id, right, wrong, void, issued, key in rows
        ]

    def pass_counts(self, first_step: int, last_step: int) -> list[tuple[int, int, int]]:
        """Return (correct, wrong, number of pools that have as many) over the finished steps from `first_step` to `last_step`."""
        query = "SELECT num_correct, num_wrong, COUNT(*) FROM pools WHERE step BETWEEN ? AND ? GROUP BY 1, 2 ORDER BY 1, 2"
        return [tuple(row) for row in self._rows(query, first_step, last_step)]

    def sample(self, step: int, *, num_prompts: int, num_completions: int, num_characters: int) -> list[SampledPool]:
        """Return the first pools of a finished step, in the order in which the prompts entered; none for any other step.

        Args:
            num_prompts, num_completions: the most pools, and the most completions of each: those that were kept come first.
            num_characters: where a text is cut.
        """
        with self._guarded():
            limits = {"num_prompts": num_prompts, "num_completions": num_completions, "num_characters": num_characters}
            return list(sample(self._open_connection(), step, **limits))

    def export_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write one row per scored or void completion, by step, in journal order.

        Columns: step, prompt_id, index, prompt_text, text, reward, kept, committed, policy_version, finish_reason,
        token_ids list<int32>, rollout_logprobs list<float>, token_mask list<bool> (null: the policy wrote every token), data (the
        prompt's record as JSON). A void has no reward, text or tokens; an unfinished step has no prompt_text or data,
        and nothing committed.

        Returns: the path. Raises: InputError when pyarrow is missing.
        """
        if importlib.util.find_spec("pyarrow") is None:
            hint = "pip install 'reinforce-ada[report]'"
            raise InputError("export_parquet", "pyarrow is not installed", "it is needed to write Parquet", hint)
        target = Path(path)
        with self._guarded():
            connection = self._open_connection()
            replace_file(target, lambda aside: write_parquet(connection, self._tokens, self._path, aside), where="export_parquet")
        return target

    # -------------------- life cycle

    def close(self) -> None:
        """Close the file and release its lock. May be called twice."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise InputError("RolloutStore", f"{self._path} is closed", "an open store is needed")
        return self._connection

    def _open(self, run: Mapping[str, Any] | None, read_only: bool) -> None:
        """Create the tables of a new file, or check those of an existing one."""
        connection = self._open_connection()
        if not read_only and connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0:
            self._create(run)
        try:
            meta = dict(connection.execute("SELECT key, value FROM meta"))
        except sqlite3.OperationalError:  # no such table
            meta = {}
        if meta.get("schema_version") not in READABLE:
            given = f"{self._path} has schema version {meta.get('schema_version')}"
            raise InputError("RolloutStore", given, f"a rollout store of version {VERSION} is needed")
        if run is not None and (difference := self._difference(meta, run)):
            raise InputError("RolloutStore", f"{self._path} {difference}", _DIFFERENT_CONFIG, "use a new folder")
        version = meta["schema_version"]
        if version != VERSION and not read_only:
            self._upgrade(version)
            version = VERSION
        self._has_keys = version != "1"
        there = {row[1] for row in connection.execute("PRAGMA table_info(events)")}
        self._tokens = ", ".join(f"e.{c}" if c in there else "NULL" for c in TOKENS)

    def _difference(self, meta: Mapping[str, str], run: Mapping[str, Any]) -> str:
        try:
            then = parse_json(meta.get("run", ""))
        except GarbageError as e:
            return f"does not say what it was made with ({e})"
        found = differences(self._compared(then), self._compared(json.loads(_canonical(run)))) if isinstance(then, dict) else "nothing"
        return f"was made with {found}" if found else ""

    def _upgrade(self, version: str) -> None:
        """Upgrade from an earlier version, completely or not at all."""
        with self._transaction() as connection:
            for statement in (s for earlier, statements in UPGRADES.items() if earlier >= version for s in statements):
                connection.execute(statement)
            connection.execute("INSERT OR IGNORE INTO meta VALUES ('id', ?)", (uuid.uuid4().hex,))  # there are ids from version 3 on
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (VERSION,))

    def _create(self, run: Mapping[str, Any] | None) -> None:
        meta = {"schema_version": VERSION, "id": uuid.uuid4().hex, "run": _canonical(run or {})}
        for statement in PAGES:
            self._open_connection().execute(statement)
        with self._transaction() as connection:
            for statement in SCHEMA.split(";\n"):
                connection.execute(statement)
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit everything or nothing, however the body ends."""
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
        """Raise SQLite's errors as one line that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise input_error(self._path, error) from error


def _first_outcomes(connection: sqlite3.Connection, step: int) -> dict[tuple[CompletionId, int], int]:
    """Return (id, policy version) -> the row that the sampler took: the first answer, to which later ones are duplicates."""
    query = "SELECT seq, prompt_id, idx, policy_version FROM events WHERE step = ? AND kind IN ('scored', 'failed') ORDER BY seq DESC"
    rows = connection.execute(query, (step,))
    return {(CompletionId(step, str_of(prompt_id), index), version): seq for seq, prompt_id, index, version in rows}


def _canonical(run: Mapping[str, Any]) -> str:
    return json.dumps(dict(run), sort_keys=True, default=str)
