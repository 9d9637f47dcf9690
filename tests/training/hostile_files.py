"""Files of records as people write them, well and badly: one table, each with what is read or with what is said."""

from __future__ import annotations

import gzip
import json
from typing import Any

ONE = '{"prompt": "a", "answer": 1}'
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


def line(**record: Any) -> str:
    return json.dumps(record)


# name, bytes or text, and the questions and answers that are read.
GOOD: list[tuple[str, str | bytes, list[tuple[str, Any]]]] = [
    ("a.jsonl", ONE, [("a", 1)]),
    ("a.jsonl", f"{ONE}\n\n  \n{ONE}\n", [("a", 1), ("a", 1)]),
    ("crlf.jsonl", f"{ONE}\r\n{ONE}\r\n", [("a", 1), ("a", 1)]),
    ("bom.jsonl", b"\xef\xbb\xbf" + ONE.encode(), [("a", 1)]),
    ("A.JSONL", ONE, [("a", 1)]),
    ("a.ndjson", ONE, [("a", 1)]),
    ("a.json", f"{ONE}\n{ONE}", [("a", 1), ("a", 1)]),
    ("array.json", f"\n [{ONE},\n {ONE}]", [("a", 1), ("a", 1)]),
    ("array.JSON", f"[{ONE}]", [("a", 1)]),
    ("a.jsonl.gz", gzip.compress(ONE.encode()), [("a", 1)]),
    ("A.JSON.GZ", gzip.compress(f"[{ONE}]".encode()), [("a", 1)]),
    ("a.csv", 'prompt,answer\n"a, b",1\n"c\nd","x"\n', [("a, b", "1"), ("c\nd", "x")]),
    ("bom.csv", b"\xef\xbb\xbfprompt,answer\r\na,1\r\n", [("a", "1")]),
    ("a.csv.gz", gzip.compress(b"question,answer\na,1\n"), [("a", "1")]),
    ("wide.csv", f"prompt,answer\n{'x' * 300_000},1\n", [("x" * 300_000, "1")]),
    ("separators.jsonl", '{"prompt": "a\u2028b\u0085c", "answer": 1}', [("a\u2028b\u0085c", 1)]),
    ("escapes.jsonl", r'{"prompt": "\ud83d\ude00 \u0000", "answer": 1}', [("\U0001f600 \0", 1)]),
    ("long.jsonl", line(prompt="x" * 5_000_000, answer=1), [("x" * 5_000_000, 1)]),
    ("chat.jsonl", line(prompt=MESSAGES, answer=1), [("system: s\nuser: q", 1)]),
    ("messages.jsonl", line(messages=MESSAGES, answer=1), [("system: s\nuser: q", 1)]),
    ("question.jsonl", line(question="q", answer=1), [("q", 1)]),
    ("any.jsonl", line(prompt="a", answer=["Paris", "paris", 3]), [("a", ["Paris", "paris", 3])]),
    ("float.jsonl", line(prompt="a", answer=1.5), [("a", 1.5)]),
    ("null.jsonl", line(prompt=None, question="q", answer=1), [("q", 1)]),
]
# name, bytes or text, and a part of the one line; {} is the file's path.
BAD: list[tuple[str, str | bytes, str]] = [
    ("empty.jsonl", "", "{} holds no prompts"),
    ("blank.jsonl", "\n \r\n", "{} holds no prompts"),
    ("none.json", "[]", "{} holds no prompts"),
    ("header.csv", "prompt,answer\n", "{} holds no prompts"),
    ("cut.jsonl", ONE + '\n{"prompt": ', "{}:2 is not JSON"),
    ("cut.json", f"[{ONE},", "{} is not JSON"),
    ("pretty.json", '{\n  "data": []\n}', "{}:1 is not JSON"),
    ("object.json", '{"data": []}', "{}:1 has no prompt (it has 'data')"),
    ("quotes.jsonl", "{'prompt': 'a'}", "{}:1 is not JSON"),
    ("two.jsonl", ONE + ONE, "{}:1 is not JSON (Extra data"),
    ("array.jsonl", '["a"]', "{}:1 is no object"),
    ("text.jsonl", '"a"', "{}:1 is no object"),
    ("number.json", "[3]", "{}, record 1 is no object"),
    ("null.jsonl", f"{ONE}\nnull", "{}:2 is no object"),
    ("twice.jsonl", '{"prompt": "a", "prompt": "b", "answer": 1}', "{}:1 is not JSON (the key 'prompt' is there twice)"),
    ("twice.csv", "prompt,prompt\na,b\n", "{}:1 has a column twice"),
    ("surrogate.jsonl", r'{"prompt": "\ud800", "answer": 1}', "{}:1 is not JSON (half of a surrogate pair)"),
    ("deep.jsonl", '{"prompt": "a", "answer": ' + "[" * 100_000, "{}:1 is not JSON"),
    ("deep.jsonl", line(prompt="a", answer=1)[:-1] + ', "x": ' + "[" * 500 + "]" * 500 + "}", "{}:1 is nested more than 64 levels deep"),
    ("digits.jsonl", '{"prompt": "a", "answer": ' + "9" * 5000 + "}", "{}:1 is not JSON"),
    ("latin.jsonl", ONE.encode() + b'\n{"prompt": "\xe9", "answer": 1}', "{}:2 is not UTF-8 (byte 0xe9)"),
    ("utf16.jsonl", ONE.encode("utf-16"), "{}:1 is not UTF-8"),
    ("zero.jsonl", b"\0" * 100, "{}:1 is not JSON"),
    ("no.jsonl.gz", ONE.encode(), "cannot read {}: no whole gzip file"),
    ("cut.jsonl.gz", gzip.compress(ONE.encode())[:-9], "cannot read {}: no whole gzip file"),
    ("no.parquet", b"PAR1 nonsense", "{} is not Parquet"),
    ("empty.parquet", b"", "{} is not Parquet"),
    ("ragged.csv", "prompt,answer\na,1,2\n", "{}:2 has not the 2 columns of the first line"),
    ("short.csv", "prompt,answer\na\n", "{}:2 has not the 2 columns of the first line"),
    ("open.csv", 'prompt,answer\n"a,1\n', "{}:2 is not CSV"),
    ("a.txt", ONE, "{} is of no kind that is read; .jsonl, .ndjson"),
    ("a.yaml", ONE, "{} is of no kind that is read; .jsonl, .ndjson"),
    ("a.parquet.gz", b"", "{} is of no kind that is read"),
    ("prompt.jsonl", line(answer=1), "{}:1 has no prompt (it has 'answer')"),
    ("nothing.jsonl", "{}", "{}:1 has no prompt (it has nothing)"),
    ("blank.jsonl", line(prompt=" \n", answer=1), "{}:1 has no prompt: it is empty"),
    ("number.jsonl", line(prompt=3, answer=1), "{}:1 has no prompt: 3 under 'prompt'"),
    ("messages.jsonl", line(prompt=[], answer=1), "{}:1 has no prompt: [] under 'prompt'"),
    ("role.jsonl", line(prompt=[{"role": "human", "content": "q"}], answer=1), "is no message"),
    ("content.jsonl", line(messages=[{"role": "user"}], answer=1), "is no message"),
    ("parts.jsonl", line(messages=[{"role": "user", "content": [{"type": "text"}]}], answer=1), "is no message"),
    ("last.jsonl", line(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]), "the last message is the"),
    ("answer.jsonl", line(prompt="a"), "{}:1 has no answer"),
    ("answer.csv", "prompt,answer\na,\n", "{}:2 has no answer"),
    ("null.jsonl", line(prompt="a", answer=None), "{}:1 has no answer"),
    ("space.jsonl", line(prompt="a", answer=" "), "{}:1 has the answer ' '"),
    ("true.jsonl", line(prompt="a", answer=True), "{}:1 has the answer True; a text or a number, or a list of those"),
    ("dict.jsonl", line(prompt="a", answer={"value": 3}), "{}:1 has the answer {'value': 3}"),
    ("nan.jsonl", '{"prompt": "a", "answer": NaN}', "{}:1 has the answer nan"),
    ("inf.jsonl", '{"prompt": "a", "answer": -1e999}', "{}:1 has the answer -inf"),
    ("list.jsonl", line(prompt="a", answer=[]), "{}:1 has an empty list of answers"),
    ("nested.jsonl", line(prompt="a", answer=["x", ["y"]]), "{}:1 has the answer ['y']"),
    ("list.jsonl", line(prompt="a", answer=[None]), "{}:1 has the answer None"),
]
