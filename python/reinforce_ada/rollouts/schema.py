"""The tables of a rollout store, its versions, and how its file is opened."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from reinforce_ada.errors import InputError

VERSION = "4"
READABLE = ("1", "2", "3", VERSION)
_REMEMBERED = "CREATE TABLE remembered (step INTEGER NOT NULL, key, num_correct INTEGER NOT NULL, num_wrong INTEGER NOT NULL)"
# The long columns come last, so that a query on the short ones does not read through them.
# `reward` and the texts have no affinity: a REAL column would turn -0.0 into 0.0, and a text with a lone surrogate is kept as bytes.
SCHEMA = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY, step INTEGER NOT NULL, prompt_id NOT NULL, idx INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('scored', 'failed', 'lost', 'aborted')),
    policy_version INTEGER NOT NULL, reward, finish_reason TEXT, num_tokens INTEGER, reason, text, tokens BLOB, token_mask BLOB);
CREATE INDEX events_by_step ON events (step);
CREATE TABLE committed (seq INTEGER PRIMARY KEY REFERENCES events (seq), kept INTEGER NOT NULL);
CREATE TABLE pools (
    step INTEGER NOT NULL, position INTEGER NOT NULL, prompt_id NOT NULL, num_correct INTEGER NOT NULL, num_wrong INTEGER NOT NULL,
    num_void INTEGER NOT NULL, num_issued INTEGER NOT NULL, exit TEXT NOT NULL, key, text, data TEXT NOT NULL,
    PRIMARY KEY (step, prompt_id)) WITHOUT ROWID;
CREATE TABLE finished_steps (step INTEGER PRIMARY KEY);
{_REMEMBERED};
"""
# Version 1 has no keys: its prompts are identified by their ids. Up to version 2 token ids and logprobs are two columns, which are kept.
# Up to version 3 there are no masks: the policy wrote every token.
UPGRADES = {
    "1": ("ALTER TABLE pools ADD COLUMN key", "UPDATE pools SET key = prompt_id", _REMEMBERED),
    "2": ("ALTER TABLE events ADD COLUMN tokens BLOB",),
    "3": ("ALTER TABLE events ADD COLUMN token_mask BLOB",),
}
# A row of 500 tokens takes 2.5 KB, of which only one fits on the default page of 4 KB. The write-ahead log holds 4 MB, as by default.
PAGES = ("PRAGMA page_size = 32768", "PRAGMA journal_mode = WAL")
_PAGES_IN_LOG = 128
UNDAMAGED = "an undamaged rollout store is needed"


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """Open the file with explicit transactions; a reader does not create it."""
    uri = path.absolute().as_uri() + ("?mode=ro" if read_only else "")
    connection = sqlite3.connect(uri, uri=True, timeout=30.0, isolation_level=None)  # explicit transactions only
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_IN_LOG}")
    return connection


def take_lock(path: Path) -> int:
    """Take the writer's lock, a file beside the store: SQLite's own would keep readers out. It ends with the process, however that ends."""
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


def input_error(path: Path, error: sqlite3.Error) -> InputError:
    """Return SQLite's error as one line that says what to do."""
    text = str(error)
    if "is full" in text:
        hint = "free some and resume: what was committed before is safe"
        return InputError("RolloutStore", f"{path}: {text}", "space for the rollouts is needed", hint)
    if "malformed" in text or "not a database" in text:
        return InputError("RolloutStore", f"{path}: {text}", UNDAMAGED, "use a new folder")
    return InputError("RolloutStore", f"{path}: {text}", "a store that can be read and written is needed")
