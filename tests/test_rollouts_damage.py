"""RolloutStore when something goes wrong: a full disk, a damaged or foreign file, a killed writer."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.types import Event, Scored
from toy_rollouts import assert_same, scored


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    with RolloutStore(path) as store:
        (page_count,) = store._open_connection().execute("PRAGMA page_count").fetchone()
        store._open_connection().execute(f"PRAGMA max_page_count = {page_count + 8}")
        written: list[Event] = []
        with pytest.raises(InputError, match=r"^RolloutStore: .*is full; space for the rollouts is needed; free some and resume"):
            written.extend(e for index in range(1000) for e in store.append([scored("a", index, 1.0, tokens=range(300))]))
        assert 0 < len(written) < 400
        assert_same(store.events(1), written)
        store._open_connection().execute("PRAGMA max_page_count = 100000")  # space again
        written += store.append([scored("b", 0, 1.0)])
    with RolloutStore(path) as store:
        assert_same(store.events(1), written)


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE meta (key, value)")
    connection.close()


def overwrite_the_middle(path: Path) -> None:
    with RolloutStore(path) as store:
        store.append([scored("a", i, 1.0, tokens=range(2000)) for i in range(20)])
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"not a database" * 1000), "file is not a database; an undamaged rollout store is needed"),
        (other_database, "has schema version None; a rollout store of version 4 is needed"),
        (overwrite_the_middle, "malformed; an undamaged rollout store is needed"),
        (Path.mkdir, "unable to open database file; a store that can be read and written is needed"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "rollouts.sqlite"
    damage(path)
    with pytest.raises(InputError) as caught, RolloutStore(path) as store:
        store.events(1)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent/rollouts.sqlite", "file/rollouts.sqlite"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^RolloutStore: .*; a file in a writable folder is needed$"):
        RolloutStore(tmp_path / name)


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^RolloutStore: .* does not exist; a store to read is needed$"):
        RolloutStore(tmp_path / "rollouts.sqlite", read_only=True)


WRITER = """
import sys
import numpy as np
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.types import Completion, CompletionId, Scored

store = RolloutStore(sys.argv[1])
for poll in range(10**9):
    store.append([
        Scored(Completion(CompletionId(1, "a", 16 * poll + i), np.full(500, poll), np.zeros(500), "t", "stop", 0), float(i))
        for i in range(16)
    ])
    print(poll, flush=True)
"""


def test_a_writer_killed_in_the_middle_leaves_whole_transactions_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        for _ in range(30):
            acknowledged = int(writer.stdout.readline())
        with pytest.raises(InputError, match="is open for writing elsewhere"):
            RolloutStore(path)
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split())])
    with RolloutStore(path) as store:
        got = store.events(1)
        assert [e.id.index for e in got] == list(range(len(got)))
        assert len(got) % 16 == 0
        assert len(got) // 16 in (acknowledged + 1, acknowledged + 2)  # committed, and perhaps one not yet reported
        for number, event in enumerate(got):
            assert isinstance(event, Scored)
            np.testing.assert_array_equal(event.completion.token_ids, np.full(500, number // 16))
        store.append([scored("b", 0, 1.0)])
