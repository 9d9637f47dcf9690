"""Files of records: what is read, and what is said of those that are not; the table is in hostile_files.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile_files import BAD, GOOD, ONE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reinforce_ada.config import kind_of
from reinforce_ada.errors import InputError
from reinforce_ada.training.task_files import Form, answer_of, digest_of, question_of, read_records, turns_of


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("name", "content", "expected"), GOOD, ids=[name for name, *_ in GOOD])
def test_what_is_read(tmp_path: Path, name: str, content: str | bytes, expected: list[tuple[str, object]]) -> None:
    assert kind_of(name) == "file"
    records = read_records(write(tmp_path / name, content), needs_answer=True)
    assert [(question_of(r), r["answer"]) for r in records] == expected


@pytest.mark.parametrize(("name", "content", "said"), BAD, ids=[name for name, *_ in BAD])
def test_what_is_said(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=r"^task: ") as caught:
        read_records(path, needs_answer=True)
    message = str(caught.value)
    assert said.replace("{}", str(path), 1) in message
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))


PIECES = [content if isinstance(content, bytes) else content.encode() for _, content, _ in [*GOOD, *BAD] if len(content) < 1000]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=20)), max_size=4),
    joint=st.sampled_from([b"", b"\n", b"\r\n", b",\n"]),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet"]),
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, parts: list[bytes], joint: bytes, suffix: str) -> None:
    path = write(tmp_path / f"any{suffix}", joint.join(parts))
    records, said = [], ""
    try:
        records = read_records(path, needs_answer=True)
    except InputError as error:
        said = str(error)
    assert bool(records) != bool(said)
    assert "\n" not in said
    assert all(question_of(r).strip() and answer_of(r) and turns_of(r)[-1]["role"] == "user" for r in records)


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = [[{"role": "user", "content": "q"}], [{"role": "user", "content": "r"}]]
    pq.write_table(pa.table({"prompt": chat, "answer": [["1"], ["2", "3"]], "extra": [1.5, None]}), tmp_path / "a.parquet")
    first, second = read_records(tmp_path / "a.parquet", needs_answer=True)
    assert (question_of(first), first["answer"], first["extra"]) == ("user: q", ["1"], 1.5)
    assert (second["answer"], "extra" in second) == (["2", "3"], False)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"b\.parquet, row 1 has no prompt \(it has 'text'\)"):
        read_records(tmp_path / "b.parquet", needs_answer=True)


def test_a_folder_of_datasets_is_read_where_that_is_installed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder that `datasets` has not saved"):
        read_records(tmp_path, needs_answer=True)
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match=r'^task: (datasets is not installed; pip install "reinforce-ada\[datasets\]"|cannot read )'):
        read_records(tmp_path, needs_answer=True)


@pytest.mark.parametrize("name", ["none.jsonl", "x\0.jsonl", "n" * 300 + ".jsonl", "folder/none.csv", "none.parquet"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^task: cannot read "):
        read_records(tmp_path / name, needs_answer=True)


def test_what_a_record_has_of_its_own_stays(tmp_path: Path) -> None:
    own = {"prompt": "a\u2028b", "question": "other", "answer": 1, "text": "t", "key": "k"}
    (record,) = read_records(write(tmp_path / "a.jsonl", json.dumps(own, ensure_ascii=False)), needs_answer=True)
    assert (dict(record), question_of(record)) == (own, "a\u2028b")
    (record,) = read_records(write(tmp_path / "b.jsonl", ONE), needs_answer=True)
    assert record["question"] == "a"


def test_answers_are_not_needed_with_a_reward_of_ones_own(tmp_path: Path) -> None:
    assert question_of(read_records(write(tmp_path / "free.jsonl", '{"prompt": "a"}'), needs_answer=False)[0]) == "a"


def test_a_digest_is_of_every_byte_and_name(tmp_path: Path) -> None:
    first = digest_of(write(tmp_path / "a.jsonl", ONE))
    assert digest_of(write(tmp_path / "b.jsonl", ONE)) == first != digest_of(write(tmp_path / "a.jsonl", ONE + "\n"))
    folder = digest_of(tmp_path)
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    assert digest_of(tmp_path) != folder


# -------------------- columns


NESTED = {"problem": "a", "extra_info": {"index": 3, "level": None}, "reward_model": {"ground_truth": "7"}, "question": "other"}
COLUMNS = [
    ("problem", "reward_model.ground_truth", "a", "7"),
    ("question", "extra_info.index", "other", 3),
    ("a.b", "c", "dotted", 1),  # a column of that whole name comes first
]


@pytest.mark.parametrize(("prompt", "answer", "asked", "right"), COLUMNS)
def test_columns_are_named(tmp_path: Path, prompt: str, answer: str, asked: str, right: object) -> None:
    record = {**NESTED, "a.b": "dotted", "a": {"b": "nested"}, "c": 1}
    (found,) = read_records(write(tmp_path / "a.jsonl", json.dumps(record)), Form("", prompt, answer), needs_answer=True)
    assert (question_of(found), found["answer"]) == (asked, right)
    assert {key: found[key] for key in record} == record  # the reward sees all that there was


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (Form(prompt_column="task"), "no column 'task'; one of its columns: problem, extra_info.index, extra_info.level, "),
        (Form(prompt_column="problem", answer_column="reward_model.answer"), "no column 'reward_model.answer'; one of its columns: "),
        (Form(prompt_column="problem", answer_column="problem.x"), "no column 'problem.x'"),
        (Form(prompt_column="problem", answer_column="extra_info.level"), " has no answer; "),
        (Form(prompt_column="problem"), " has no answer; "),
        (Form(split="test"), "part 'test' of {}, which has no parts"),
    ],
)
def test_a_column_or_part_that_is_not_there_is_one_line(tmp_path: Path, form: Form, said: str) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(NESTED))
    with pytest.raises(InputError, match=r"^task: ") as caught:
        read_records(path, form, needs_answer=True)
    assert said.replace("{}", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_cell_is_no_missing_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "problem,solution,note\na,1,\nb,,x\n")
    with pytest.raises(InputError, match=r"a\.csv:3 has no answer"):
        read_records(path, Form("", "problem", "solution"), needs_answer=True)
    first, second = read_records(path, Form("", "problem", "solution"), needs_answer=False)
    assert "note" not in first
    assert "answer" not in second
    with pytest.raises(InputError, match=r"a\.csv:2 has no column 'text'; one of its columns: problem, solution, note; --prompt-column"):
        read_records(path, Form("", "text"), needs_answer=False)
