"""Records of one's own: JSON lines and arrays, CSV, Parquet, and what `datasets` reads. Every error names its place."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from reinforce_ada.config import kind_of, suffix_of
from reinforce_ada.errors import InputError, needs
from reinforce_ada.outside import GarbageError, one_line, parse_json
from reinforce_ada.training.task_datasets import no_parts, read_folder, read_hub

Record = Mapping[str, Any]

_LINES, _COLUMNS, _PARQUET = (".jsonl", ".ndjson", ".json"), (".csv",), (".parquet",)
SUPPORTED = ".jsonl, .ndjson, .json, .csv (each also with .gz), .parquet, a folder that `datasets` saved, or org/name of the hub"
_ROLES = ("system", "user", "assistant")
_DEEPEST = 64  # levels of nesting: a deeper record cannot be pickled for a reward, or written to the store, on every stack


@dataclass(frozen=True, slots=True)
class Form:
    """Which part of a dataset is read, and the columns of its prompts and answers; "" for those that a record names itself."""

    split: str = ""
    prompt_column: str = ""
    answer_column: str = ""


_AS_IT_IS = Form()


def _key_of(record: Record) -> str:
    """Return the key of a record under which its prompt stands; "" if it has none."""
    return next((key for key in ("prompt", "messages", "question") if record.get(key) is not None), "")


def question_of(record: Record) -> str:
    """Return the text that identifies a record's question: its "prompt", otherwise its "messages", otherwise its "question"."""
    asked = record[_key_of(record)]
    return asked if isinstance(asked, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in asked)


def turns_of(record: Record) -> list[dict[str, str]]:
    """Return the conversation of a record, up to where the model continues it."""
    asked = record[_key_of(record)]
    if isinstance(asked, str):
        return [{"role": "user", "content": asked}]
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in asked]


def answer_of(record: Record) -> str | None:
    """Return the answer to show, the first if several are right; None if there is none."""
    answer = record.get("answer")
    if isinstance(answer, (list, tuple)):
        answer = answer[0] if answer else None
    return None if answer is None else str(answer)


def digest_of(task: str | Path, records: Sequence[Record] = ()) -> str:
    """Return the digest of a file's bytes, of all files of a folder with their names, or, of a dataset of the hub, of its `records`."""
    path, found = Path(task), hashlib.blake2b(digest_size=16)
    if kind_of(str(task)) == "hub":
        for record in records:
            found.update(json.dumps(record, sort_keys=True, default=repr).encode() + b"\n")
        return found.hexdigest()
    if not os.path.isdir(path):
        found.update(path.read_bytes())
        return found.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(repr(str(file.relative_to(path))).encode() + file.read_bytes())
    return found.hexdigest()


def read_records(task: str | Path, form: Form = _AS_IT_IS, *, needs_answer: bool) -> list[Record]:
    """Return the records of a file, a folder or a dataset, in its order.

    What stands in the columns of `form` becomes the record's "prompt" and "answer", and a record without a field "question" gets it: the
    text of its prompt.

    Raises: InputError naming file and place for anything that is not a record with a prompt (and an answer if one is needed), and for a
        file that cannot be read or is of another kind.
    """
    is_table = kind_of(str(task)) == "hub" or os.path.isdir(task) or suffix_of(task) in (*_COLUMNS, *_PARQUET)
    records = []
    for where, raw in _raw(task, form.split):
        record = _in_columns(where, raw, form)
        if is_table:  # every row has every column: an empty cell is no field
            record = {key: value for key, value in record.items() if value is not None}
        records.append(_checked(where, record, needs_answer))
    if not records:
        raise InputError("task", f"{task} holds no prompts", "at least one record")
    return records


def checked(rows: Iterable[tuple[str, Any]], form: Form, *, needs_answer: bool) -> list[Record]:
    """Return the records of (place, value) pairs. Raises: InputError naming the place of a value that is no record."""
    return [_checked(where, _in_columns(where, raw, form), needs_answer) for where, raw in rows]


def _raw(task: str | Path, split: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every record."""
    if kind_of(str(task)) == "hub":
        yield from _rows(task, read_hub(str(task), split))
        return
    path = Path(task)
    if os.path.isdir(path):
        yield from _rows(path, read_folder(path, split, SUPPORTED))
        return
    no_parts(path, split)
    suffix = suffix_of(path)
    if suffix in _PARQUET and path.name.lower().endswith(".parquet"):
        yield from _rows(path, _parquet(path))
    elif suffix in _LINES:
        yield from _json(path, _text(path))
    elif suffix in _COLUMNS:
        yield from _csv(path, _text(path))
    else:
        raise InputError("task", f"{path} is of no kind that is read", SUPPORTED)


def _text(path: Path) -> str:
    needed = "a file of {prompt, answer} records, such as a JSONL file"
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise InputError("task", f"{path}:{line} is not UTF-8 (byte {data[e.start]:#04x})", needed, "save it as UTF-8") from e
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise InputError("task", f"cannot read {path}: no whole gzip file ({e})", needed) from e
    except (OSError, ValueError) as e:  # a name with a zero byte
        raise InputError("task", f"cannot read {path}: {getattr(e, 'strerror', None) or e}", needed) from e


def _json(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    if text.lstrip()[:1] == "[" and suffix_of(path) == ".json":
        array = _parsed(str(path), text, "an array of {prompt, answer} records")
        yield from ((f"{path}, record {number}", value) for number, value in enumerate(array, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        if line.strip():
            where = f"{path}:{number}"
            yield where, _parsed(where, line, 'one {"prompt": ..., "answer": ...} per line')


def _parsed(where: str, text: str, needed: str) -> Any:
    try:
        return parse_json(text, unique_keys=True)
    except GarbageError as e:
        problem = str(e).removeprefix("not JSON: ")
        raise InputError("task", f"{where} is not JSON ({one_line(problem, 200)})", needed) from None


def _csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise InputError("task", f"{path}:1 has a column twice", "columns with different names")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise InputError("task", f"{where} has not the {len(header)} columns of the first line", "as many on each line")
            yield where, {key: value or None for key, value in row.items()}
    except csv.Error as e:
        given = f"{path}:{reader.reader.line_num} is not CSV ({one_line(str(e), 100)})"
        raise InputError("task", given, "columns prompt and answer, named in the first line") from e


def _rows(source: str | Path, rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def _parquet(path: Path) -> list[dict[str, Any]]:
    needs("task", "pyarrow", f"it reads {path}")
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
        return rows
    except OSError as e:
        raise InputError("task", f"cannot read {path}: {one_line(e.strerror or str(e))}", "a Parquet file") from e
    except Exception as e:  # pyarrow has its own errors, depending on the damage
        raise InputError("task", f"{path} is not Parquet ({one_line(str(e), 100)})", "a Parquet file") from e


# -------------------- columns


def _in_columns(where: str, raw: Any, form: Form) -> Any:
    """Return the record with what stands in the named columns as its "prompt" and "answer"."""
    if not isinstance(raw, dict):
        return raw
    named = {"prompt": form.prompt_column, "answer": form.answer_column}
    return {**raw, **{field: _column(where, raw, column, f"--{field}-column") for field, column in named.items() if column}}


def _column(where: str, raw: dict[str, Any], column: str, flag: str) -> Any:
    """Return the value of a column; "a.b" is b in the object a, unless there is a column of that whole name."""
    found: Any = raw
    for name in [column] if column in raw else column.split("."):
        if not isinstance(found, dict) or name not in found:
            known = one_line(", ".join(_columns(raw)), 200) or "none"
            raise InputError("task", f"{where} has no column {column!r}", f"one of its columns: {known}", flag)
        found = found[name]
    return found


def _columns(raw: dict[str, Any]) -> Iterator[str]:
    for name, value in raw.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, dict) else (name,)


# -------------------- checks of a record


def _checked(where: str, raw: Any, needs_answer: bool) -> Record:
    if not isinstance(raw, dict):
        raise InputError("task", f"{where} is no object", 'one {"prompt": ..., "answer": ...} each')
    if _depth(raw) > _DEEPEST:
        raise InputError("task", f"{where} is nested more than {_DEEPEST} levels deep", "a flatter record")
    _check_prompt(where, raw)
    if raw.get("answer") is not None:
        _check_answer(where, raw["answer"])
    elif needs_answer:
        needed = 'an "answer", or --reward module:function that needs none'
        raise InputError("task", f"{where} has no answer", needed, "--answer-column names another column")
    return {"question": question_of(raw), **raw}


def _check_prompt(where: str, raw: dict[str, Any]) -> None:
    key = _key_of(raw)
    if not key:
        known = one_line(", ".join(map(repr, raw)), 80) or "nothing"
        needed = 'a text or a list of messages under "prompt" or "messages"'
        raise InputError("task", f"{where} has no prompt (it has {known})", needed, "--prompt-column names another column")
    asked = raw[key]
    if isinstance(asked, str):
        if not asked.strip():
            raise InputError("task", f"{where} has no prompt: it is empty", f'a text under "{key}"')
        return
    form = f'{{"role": "user", "content": "..."}} each under "{key}"'
    if not isinstance(asked, list) or not asked:
        raise InputError("task", f"{where} has no prompt: {one_line(repr(asked), 60)} under {key!r}", f"a text, or messages: {form}")
    for turn in asked:
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES or not isinstance(turn.get("content"), str):
            raise InputError("task", f"{where}: {one_line(repr(turn), 60)} is no message", f"{form}; roles are {', '.join(_ROLES)}")
    if asked[-1]["role"] != "user":
        raise InputError("task", f"{where}: the last message is the {asked[-1]['role']}'s", "the user's, which the model is to answer")


def _check_answer(where: str, answer: Any) -> None:
    accepted = answer if isinstance(answer, list) else [answer]
    needed = "a text or a number, or a list of those of which any is right"
    if not accepted:
        raise InputError("task", f"{where} has an empty list of answers", needed)
    for one in accepted:
        is_number = isinstance(one, (int, float, Decimal)) and not isinstance(one, bool) and math.isfinite(one)
        if not is_number and not (isinstance(one, str) and one.strip()):
            raise InputError("task", f"{where} has the answer {one_line(repr(one), 60)}", needed)


def _depth(value: Any) -> int:
    """Return the depth of nesting, without recursion; counting stops one level past the limit."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        depth += 1
        inner = [v for v in level if isinstance(v, (dict, list))]
        level = [child for v in inner for child in (v.values() if isinstance(v, dict) else v)]
    return depth
