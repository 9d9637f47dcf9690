"""RolloutStore: what goes in comes out, to the bit, whatever ends the process; and one clear line when it cannot."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import PoolCounts, RolloutStore
from reinforce_ada.types import Aborted, Completion, CompletionId, Event, Failed, Group, Lost, Pool, Prompt, SamplingResult, Scored
from toy_rollouts import assert_same, scored


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RolloutStore]:
    with RolloutStore(tmp_path / "rollouts.sqlite", run={"lr": 1e-6}) as store:
        yield store


# -------------------- the journal

ids = st.builds(CompletionId, st.integers(1, 2), st.text(st.characters(), max_size=5), st.integers(0, 2**31))
versions = st.integers(0, 2**40)
reasons = st.text(st.characters(), max_size=20)


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    length = draw(st.integers(0, 6))
    tokens = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=length, max_size=length))
    logprobs = draw(st.lists(st.floats(width=32), min_size=length, max_size=length))  # NaN and infinities too
    mask = draw(st.none() | st.lists(st.booleans(), min_size=length, max_size=length))
    text, finish = draw(reasons), draw(st.sampled_from(["stop", "length"]))
    arrays = np.array(tokens, np.int32), np.array(logprobs, np.float32)
    return Completion(draw(ids), *arrays, text, finish, draw(versions), token_mask=mask)


events = st.one_of(
    st.builds(Scored, completions(), st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(Failed, ids, versions, reasons),
    st.builds(Lost, ids, versions, reasons),
    st.builds(Aborted, ids, versions, st.integers(0, 2**31)),
)


@settings(max_examples=40, deadline=None)
@given(polls=st.lists(st.lists(events, max_size=6), max_size=4))
def test_events_come_back_in_order_and_to_the_bit(tmp_path_factory: pytest.TempPathFactory, polls: list[list[Event]]) -> None:
    path = tmp_path_factory.mktemp("store") / "rollouts.sqlite"
    with RolloutStore(path) as store:
        for poll in polls:
            assert store.append(poll) is poll
    written = [event for poll in polls for event in poll]
    with RolloutStore(path) as store:
        for step in (1, 2):
            assert_same(store.events(step), [e for e in written if e.id.step == step])
        assert store.events(3) == []
        assert store.last_step() == max((e.id.step for e in written), default=None)


def test_what_comes_back_can_be_written_to(store: RolloutStore) -> None:
    store.append([scored("a", 0, 1.0)])
    (event,) = store.events(1)
    assert isinstance(event, Scored)
    event.completion.token_ids[0] = 7
    event.completion.rollout_logprobs[0] = 0.0


def test_an_append_is_all_or_nothing(store: RolloutStore) -> None:
    store.append([scored("a", 0, 1.0)])
    with pytest.raises(InputError, match=r"^RolloutStore.append: reward nan for \(1, 'b', 1\); a finite reward is needed$"):
        store.append([scored("b", 0, 1.0), scored("b", 1, float("nan"))])
    assert_same(store.events(1), [scored("a", 0, 1.0)])
    store.append([scored("c", 0, 1.0)])
    assert len(store.events(1)) == 2


# -------------------- finished steps


def finished_step(step: int = 1) -> tuple[list[Event], SamplingResult]:
    """Two prompts: `a` with 4 committed (one void, two kept), `b` with 2 committed; and what the sampler did not take."""
    a = [
        scored("a", 0, 1.0, step=step),
        Failed(CompletionId(step, "a", 1), 1, "no"),
        scored("a", 2, 0.0, step=step),
        scored("a", 3, 0.0, step=step),
    ]
    b = [scored("b", 0, 0.0, step=step), scored("b", 1, 0.0, step=step)]
    extra: list[Event] = [
        scored("a", 0, 0.5, step=step, version=0),  # another policy's: rejected
        Lost(CompletionId(step, "a", 2), 1, "late"),
        Aborted(CompletionId(step, "b", 2), 1, 9),
        scored("b", 3, 1.0, step=step),  # after b's exit: waste
        scored("a", 0, 1.0, step=step),  # a duplicate
    ]
    pool_a = Pool(
        Prompt(
            "a",
            text="1+1?",
            data={
                "answer": "2",
                "odd": {
                    1,
                },
            },
            key="sum-1",
        ),
        tuple(a),
        1,
        2,
        1,
        1 / 3,
        2 / 3,
        0.0,
        1.0,
        4,
        "satisfied",
        8,
    )
    pool_b = Pool(Prompt("b", text="2+2?", data={"answer": "4"}), tuple(b), 0, 2, 0, 0.0, 0.0, 0.0, 0.0, 4, "exhausted", 4)
    groups = (Group(pool_a, (a[0], a[2])), Group(pool_b, (b[0],)))  # type: ignore[arg-type]
    return [extra[0], *a, *b, *extra[1:]], SamplingResult((pool_a, pool_b), groups, {})


def test_finish_step_marks_what_was_committed_and_kept(store: RolloutStore) -> None:
    journal, result = finished_step()
    store.append(journal)
    assert store.finished_steps() == []
    for _ in range(2):  # a step that is trained again is finished again
        store.finish_step(1, result)
        assert store.finished_steps() == [1]
        assert store.pool_counts() == [PoolCounts(1, "a", 1, 2, 1, 4, "sum-1"), PoolCounts(1, "b", 0, 2, 0, 4, "b")]
    assert_same(store.events(1), journal)


# -------------------- what a memory is made of


def test_what_was_seen_comes_by_step_and_in_the_order_of_entry(store: RolloutStore) -> None:
    for step in (2, 1):
        journal, result = finished_step(step)
        store.append(journal)
        store.finish_step(step, result)
    of_a_step = [("sum-1", 1, 2), ("b", 0, 2)]
    assert list(store.seen()) == [(step, *row) for step in (1, 2) for row in of_a_step]
    assert list(store.seen(1)) == [(1, *row) for row in of_a_step]
    assert list(store.seen(0)) == []


def test_an_earlier_run_is_remembered_once_and_for_good(store: RolloutStore, tmp_path: Path) -> None:
    for step in (1, 3):
        store.finish_step(step, finished_step(step)[1])
    earlier = list(store.seen())
    later = tmp_path / "later.sqlite"
    with RolloutStore(later) as other:
        assert not other.remembers
        other.remember(store)
        store.finish_step(4, finished_step(4)[1])
        other.remember(store)  # a run that was killed and goes on: what the earlier store has become in between does not matter
        assert other.remembers
        other.finish_step(1, finished_step()[1])
        assert list(other.seen(0)) == [(step - 3, *row) for step, *row in earlier]
        assert [seen.step for seen in other.seen()] == [-2, -2, 0, 0, 1, 1]
    with RolloutStore(tmp_path / "last.sqlite") as last, RolloutStore(later, read_only=True) as other:
        last.remember(other)
        assert [seen.step for seen in last.seen()] == [-3, -3, -1, -1, 0, 0]
        assert last.pool_counts() == []  # they are no pools of this run


VERSION_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, step INTEGER NOT NULL, prompt_id NOT NULL, idx INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('scored', 'failed', 'lost', 'aborted')),
    policy_version INTEGER NOT NULL, reward, finish_reason TEXT, num_tokens INTEGER, reason, text,
    token_ids BLOB, rollout_logprobs BLOB);
CREATE INDEX events_by_step ON events (step);
CREATE TABLE committed (seq INTEGER PRIMARY KEY REFERENCES events (seq), kept INTEGER NOT NULL);
CREATE TABLE pools (
    step INTEGER NOT NULL, position INTEGER NOT NULL, prompt_id NOT NULL, num_correct INTEGER NOT NULL, num_wrong INTEGER NOT NULL,
    num_void INTEGER NOT NULL, num_issued INTEGER NOT NULL, exit TEXT NOT NULL, text, data TEXT NOT NULL,
    PRIMARY KEY (step, prompt_id)) WITHOUT ROWID;
CREATE TABLE finished_steps (step INTEGER PRIMARY KEY);
INSERT INTO meta VALUES ('schema_version', '1'), ('fingerprint', ''), ('run', '{}');
INSERT INTO pools VALUES (1, 0, 'a', 1, 2, 1, 4, 'satisfied', '1+1?', '{}'), (1, 1, x'eda080', 0, 2, 0, 4, 'exhausted', '2+2?', '{}');
INSERT INTO finished_steps VALUES (1);
"""


VERSION_2 = (
    VERSION_1.replace("exit TEXT NOT NULL, text,", "exit TEXT NOT NULL, key, text,").partition("INSERT")[0]
    + """
CREATE TABLE remembered (step INTEGER NOT NULL, key, num_correct INTEGER NOT NULL, num_wrong INTEGER NOT NULL);
INSERT INTO meta VALUES ('schema_version', '2'), ('fingerprint', 'x'), ('run', '{"lr": 1e-06}');
INSERT INTO events VALUES (7, 1, 'a', 0, 'scored', 1, 1.0, 'stop', 2, NULL, 'text a0', x'0500000006000000', x'abaaaabeabaa2abf');
"""
)


def test_a_store_of_version_2_keeps_its_rows_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_2)
    connection.close()
    old = scored("a", 0, 1.0)
    with RolloutStore(path, read_only=True) as store:
        assert_same(store.events(1), [old])
        assert store.id == ""
    with pytest.raises(InputError, match=r"was made with lr=1e-06 \(now 1\)"):
        RolloutStore(path, run={"lr": 1})
    with RolloutStore(path, run={"lr": 1e-6}) as store:
        store.append([scored("b", 0, 0.5, tokens=range(300))])
        name = store.id
    with RolloutStore(path) as store:
        assert_same(store.events(1), [old, scored("b", 0, 0.5, tokens=range(300))])
        assert store.id == name
        assert re.fullmatch("[0-9a-f]{32}", name)


def test_a_store_of_version_3_takes_masks(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    old, tool = scored("a", 0, 1.0), scored("b", 0, 0.5, tokens=range(9))
    tool = Scored(replace(tool.completion, token_mask=[1, 0, 0, 1, 1, 1, 1, 1, 0]), 0.5)
    with RolloutStore(path) as store:
        store.append([old])
        name = store.id
    change(path, "ALTER TABLE events DROP COLUMN token_mask")
    change(path, "UPDATE meta SET value = '3' WHERE key = 'schema_version'")
    with RolloutStore(path, read_only=True) as store:
        assert_same(store.events(1), [old])
    with RolloutStore(path) as store:
        store.append([tool])
        assert_same(store.events(1), [old, tool])
        assert store.id == name


def test_what_is_taken_back_is_open_again(store: RolloutStore) -> None:
    journal, result = finished_step()
    store.append(journal)
    store.finish_step(1, result)
    store.take_back([CompletionId(1, "a", 2), CompletionId(1, "b", 0)])
    changed = [e if (*e.id[1:], type(e)) not in {("a", 2, Scored), ("b", 0, Scored)} else Aborted(e.id, 1, 2) for e in journal]
    assert_same(store.events(1), changed)


def test_after_a_flush_the_file_alone_has_everything(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    with RolloutStore(path) as store:
        store.append([scored("a", 0, 1.0)])
        store.flush()
        shutil.copy(path, tmp_path / "alone.sqlite")
    with RolloutStore(tmp_path / "alone.sqlite") as alone:
        assert_same(alone.events(1), [scored("a", 0, 1.0)])


def test_what_is_compared_of_a_configuration_is_the_callers_to_say(tmp_path: Path) -> None:
    def first(run: Any) -> dict[str, Any]:
        return {"a": run.get("a", 1)}

    path = tmp_path / "rollouts.sqlite"
    RolloutStore(path, run={"b": 2}).close()
    RolloutStore(path, run={"a": 1, "b": 3}, compared=first).close()
    with pytest.raises(InputError, match=r"was made with a=1 \(now 4\)"):
        RolloutStore(path, run={"a": 4}, compared=first)


def change(path: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "values", "message"),
    [
        ("UPDATE events SET tokens = x''", (), "event 1 is damaged: 0 bytes are not 2 packed values"),
        ("UPDATE events SET tokens = x'02050000'", (), "event 1 is damaged"),
        ("UPDATE events SET tokens = NULL", (), "event 1 is damaged"),
        ("UPDATE events SET tokens = 'text'", (), "event 1 is damaged"),
        ("UPDATE events SET tokens = ?", (b"\x04" + bytes(8) + b"\x07",), "event 1 is damaged"),
        ("UPDATE events SET num_tokens = 3", (), "event 1 is damaged"),
        ("UPDATE meta SET value = '[' WHERE key = 'run'", (), "does not say what it was made with"),
        ("UPDATE meta SET value = '[]' WHERE key = 'run'", (), "was made with nothing"),
        ("UPDATE events SET token_mask = x''", (), "event 1 is damaged: a mask of 0 bytes for 2 tokens"),
        ("UPDATE events SET token_mask = 'x'", (), "event 1 is damaged"),
        ("UPDATE meta SET value = '5' WHERE key = 'schema_version'", (), "has schema version 5; a rollout store of version 4 is needed"),
        ("DROP TABLE events", (), "no such table: events"),
    ],
)
def test_a_damaged_row_is_one_line(tmp_path: Path, statement: str, values: tuple[Any, ...], message: str) -> None:
    path = tmp_path / "rollouts.sqlite"
    with RolloutStore(path, run={}) as store:
        store.append([scored("a", 0, 1.0)])
    change(path, statement, *values)
    with pytest.raises(InputError) as caught, RolloutStore(path, run={}) as store:
        store.events(1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_of_version_1_is_read_as_it_is_and_upgraded_when_written(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript(VERSION_1)
    connection.close()
    before = path.read_bytes()
    pools = [PoolCounts(1, "a", 1, 2, 1, 4, "a"), PoolCounts(1, "\ud800", 0, 2, 0, 4, "\ud800")]  # no keys then: the ids
    with RolloutStore(path, read_only=True) as store:
        assert store.pool_counts() == pools
        assert list(store.seen()) == [(1, "a", 1, 2), (1, "\ud800", 0, 2)]
        with RolloutStore(tmp_path / "new.sqlite") as new:
            new.remember(store)
            assert list(new.seen()) == [(0, "a", 1, 2), (0, "\ud800", 0, 2)]
    assert path.read_bytes() == before
    for _ in range(2):
        with RolloutStore(path) as store:
            assert store.pool_counts() == pools
    journal, result = finished_step(2)
    with RolloutStore(path) as store:
        store.append(journal)
        store.finish_step(2, result)
        assert store.pool_counts() == [*pools, PoolCounts(2, "a", 1, 2, 1, 4, "sum-1"), PoolCounts(2, "b", 0, 2, 0, 4, "b")]


def test_export_has_a_row_per_answer(store: RolloutStore, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    journal, result = finished_step()
    store.append(journal)
    store.finish_step(1, result)
    store.append([scored("\ud800", 0, 1.0, step=2, tokens=())])
    tool = scored("tool", 0, 1.0, step=3, tokens=range(3))
    store.append([Scored(replace(tool.completion, token_mask=[1, 0, 1]), 1.0)])
    path = store.export_parquet(tmp_path / "rollouts.parquet")
    rows = pq.read_table(path).to_pylist()
    assert [(r["step"], r["prompt_id"], r["index"], r["reward"], r["committed"], r["kept"]) for r in rows] == [
        (1, "a", 0, 0.5, False, False),
        (1, "a", 0, 1.0, True, True),
        (1, "a", 1, None, True, False),
        (1, "a", 2, 0.0, True, True),
        (1, "a", 3, 0.0, True, False),
        (1, "b", 0, 0.0, True, True),
        (1, "b", 1, 0.0, True, False),
        (1, "b", 3, 1.0, False, False),
        (1, "a", 0, 1.0, False, False),
        (2, "\ufffd" * 3, 0, 1.0, False, False),
        (3, "tool", 0, 1.0, False, False),
    ]
    first, void, last, masked = rows[1], rows[2], rows[-2], rows[-1]
    assert (first["token_mask"], masked["token_mask"]) == (None, [True, False, True])
    assert first["token_ids"] == [5, 6]
    assert first["rollout_logprobs"] == [float(np.float32(-1 / 3)), float(np.float32(-2 / 3))]
    assert (first["prompt_text"], first["text"], first["finish_reason"], first["policy_version"]) == ("1+1?", "text a0", "stop", 1)
    assert json.loads(first["data"]) == {"answer": "2", "odd": "{1}"}
    assert (void["text"], void["token_ids"], void["rollout_logprobs"], void["finish_reason"]) == (None, None, None, None)
    assert (last["prompt_text"], last["data"], last["token_ids"]) == (None, None, [])
    assert sorted(p.name for p in tmp_path.iterdir() if "parquet" in p.name) == ["rollouts.parquet"]


def test_export_without_pyarrow_says_what_to_install(store: RolloutStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^export_parquet: pyarrow is not installed; .*pip install 'reinforce-ada\[report\]'$"):
        store.export_parquet(tmp_path / "x.parquet")


def test_export_to_a_folder_that_is_not_there_is_one_line(store: RolloutStore, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    with pytest.raises(InputError, match=r"^export_parquet: .*; a writable folder with space$"):
        store.export_parquet(tmp_path / "absent" / "x.parquet")


# -------------------- one configuration, one writer


def test_a_store_belongs_to_one_configuration(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    RolloutStore(path, run={"lr": 1e-6, "sampling": {"preset": "grpo", "cap": 8}}).close()
    for same in ({"sampling": {"cap": 8, "preset": "grpo"}, "lr": 1e-6}, None):
        RolloutStore(path, run=same).close()
    with pytest.raises(InputError, match=r"was made with lr=1e-06 \(now absent\), sampling.cap=8 \(now 32\); a store belongs to one"):
        RolloutStore(path, run={"sampling": {"preset": "grpo", "cap": 32}})
    RolloutStore(path).close()  # the refusal gave the lock back


def test_a_second_writer_is_refused_and_a_reader_is_not(store: RolloutStore, tmp_path: Path) -> None:
    path = tmp_path / "rollouts.sqlite"
    store.append([scored("a", 0, 1.0)])
    with pytest.raises(InputError, match=r"is open for writing elsewhere; one writer at a time$"):
        RolloutStore(path)
    with RolloutStore(path, read_only=True) as reader:
        assert len(reader.events(1)) == 1
        store.append([scored("a", 1, 1.0)])
        assert len(reader.events(1)) == 2
        with pytest.raises(InputError, match="readonly"):
            reader.append([scored("a", 2, 1.0)])
    store.close()
    store.close()
    RolloutStore(path).close()
    with pytest.raises(InputError, match="is closed; an open store is needed"):
        store.events(1)


def test_importing_the_store_imports_no_torch() -> None:
    code = "import sys, reinforce_ada.rollouts; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
