"""Hostile command lines, as data: every flag and argument of every command with every value of the corpus, and who runs them.

Every input ends early: it names a model, a task, an address or a case that is not there, or asks for next to nothing. Run as a script
this is a worker: it reads one command line a line from standard input, as a JSON list, and answers each with what came of it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from reinforce_ada import cli

LIMIT_S = 120  # for one input; the slowest good one, `explain` at a cap of 1000, takes 5 on a quiet core; a busy one is ten times as slow
MEMORY_BYTES = 12 << 30  # of address space, of which torch alone maps several

NUMBERS = [
    "0", "-0", "-0.0", "-1", "1", "2", "7", "0.5", "1.5", "1e-300", "1e10", "1e39", "1e308", "1e400", "-1e400", "inf", "-inf", "nan",
    "1000", "2048", "2049", "65535", "65536", "1000000", "2147483648", str(2**63), str(2**64), str(10**12), str(10**30), "9" * 400,
    "9" * 5000, "1_000", "0x10", "١٢", "1,000", "1e", "--1",
]  # fmt: skip
TEXTS = [
    "", " ", "\t", "\n", "a\nb", "a\r\nb", "true", "null", "None", "-", "--", "%s%n%(x)s", "{0}", "{", "\\", "'\"", "~", "x y",
    "[/b]", "x[/b]", "[bold red]x", ":smile:", "$x_{", "$x_{$", r"$\frac{$", "\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "a\u202eb",
    "é漢字😀", "\udcff", "\ud800", "a\0b", "a" * 256, "é" * 200, "a/" * 3000, "b" * 200_000,
]  # fmt: skip
STRUCTURES = [
    "[]", "{}", "[1]", '["a"]', '[""]', '["\\ud800"]', '{"a": 1}', '{"a": null}', '{"a": NaN}', '{"a": 1e999}', '{"a": "\\u0000"}',
    '{"max_terms": {"a": [[]]}}', "{'a': 1}", "[" * 100_000, '{"a":' * 5000, '{"a": ' + "[" * 500 + "]" * 500 + "}",
    '{"a": ' + "9" * 30 + "}", '{"a": 1, "a": 2}', '{"task_options": {}}', '{"": {}}',
]  # fmt: skip
PATHS = [
    "/", ".", "..", "/dev/null", "/dev/full", "/dev/zero", "/proc/self/mem", "/proc/self/status", "file", "file/below", "folder",
    "loop", "loop/below", "gone/below", "binary", "latin-1.toml", "x[/b]", "x[/b]/config.toml", "$x_{", "$x_{/model", "ray",
    "good.toml", "rates.csv", "text.sqlite", "folder.png", "good.jsonl", "a.png", "a.toml", "empty.sqlite",
]  # fmt: skip
WORDS = [
    "http://", "http://x:99999", "http://[::1", "http://user:secret@127.0.0.1:1", "file:///etc/passwd", ",", ":", "::", "a:b:c", "=",
    "a=b", "os:getcwd", "json:loads", "os.path:join", "no_such_module:f", "./file:f", ".:f", "beta:1", "beta:1,2", "beta:nan,1",
    "beta:1e308,1e308", "beta:1e-320,1", "beta:-1,1", "1,2", "1,nan", "1e308,1e308", "1e-320,1e-320", "0,0", "posterior",
    "posterior:0", "posterior:nan", "posterior:1e-9", "adaptive", "grpo", "dapo", "pods", "knapsack", "reinforce-ada-est",
    "reinforce-ada-exact", "GRPO", "grpo:", "grpo:group_size", "grpo:group_size=", "grpo:group_size=1.5",
    "grpo:group_size=9999999999999", "grpo:group_size=true", "grpo:group_size=[8]",
    "reinforce-ada-balance:decide_every=99999999999999999999", "reinforce-ada-balance:objective=mean",
    "reinforce-ada-balance:objective=[]", "reinforce-ada-balance:baseline=3", "reinforce-ada-pos:num_correct=-1",
    "grpo:positive_threshold=nan", "grpo:positive_threshold=" + "9" * 400, "grpo:positive_threshold=\"a\"",
    "dapo:max_prompts_factor=1e308", "dapo:max_prompts_factor=inf", "dapo:max_prompts_factor=0", "knapsack:max_budget=100000000000",
    "reinforce-ada-balance:a=" + "[" * 5000, "mean", "power", "log", "stream", "rounds", "cpu", "cuda", "float32", "policy_loss",
    "token_logprobs", "forward", "tiny", "smollm", "chain_sum", "nearest-rate", "skip-streaks", "wandb", "wandb,wandb", "auto",
    "openai", "ray",
]  # fmt: skip
VALUES = [*NUMBERS, *TEXTS, *STRUCTURES, *PATHS, *WORDS]

# A TOML file may hold this as the value of any key.
TOML_VALUES = [
    "0", "-1", "1.5", "-0.0", "inf", "-inf", "nan", "1e39", "1e400", str(2**63), str(10**30), "9" * 400, "9" * 5000, "true", '""',
    '" "', '"\\u0000"', '"\\u001b[2J"', "'''a\nb'''", '"$x_{"', f'"{"a" * 300}"', "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z",
    "[]", '["a"]', '[""]', "[1, 'a']", "[[[]]]", "{}", "{a = 1}", "{a = {b = {c = []}}}", "{a = nan}", "{a = 1979-05-27}",
    "[" * 30 + "]" * 30, "{a = " + "[" * 30 + "]" * 30 + "}", "[" * 5000, "'''" + "x" * 200_000 + "'''",
]  # fmt: skip
TOML_FILES = [
    b"", b"\xef\xbb\xbf[training]\nsteps = 3\n", b"\xff\xfe[\x00t\x00", b"[training]\nsteps = 3 # caf\xe9\n", b"\x00",
    b"[training]\n[training]\n", b"[training]\nsteps = 1\nsteps = 2\n", b"training = 3\n", b"steps = 3\n",
    b"[[training]]\nsteps = 3\n", b"[training.steps]\na = 1\n", b'"training" = {steps = "3"}\n',
    b"[training]\nsteps = " + b"9" * 5000 + b"\n", b"a = " + b"[" * 20_000, b"a = " + b"{a = " * 5000, b"[" + b"a." * 5000 + b"b]\n",
    b"[x\x1b[2J]\n", b'["\\u001b[2J"]\n', b"[training]\n" + b"x" * 100_000 + b" = 1\n", b"#" * (2 << 20),
    b"[sampling]\nstop = ['a', 1]\n", b"[task]\ntask_options = {a = 1979-05-27}\n", b"[model]\nmodel = 1\n[model.x]\n", b"{}",
    b"steps: 3\n",
]  # fmt: skip
RATE_FILES = [
    b"", b"0.5\n", b"nan\n", b"2\n", b"-0.0\n", b"rate\n", b"a,b\n1,x\n", b"\xff\n", b"0.5\n" * 10 + b"1e400\n", b"9" * 5000 + b"\n",
    b"\x00", b"0,5\n", b"\xef\xbb\xbf0.5\n",
]  # fmt: skip
RATE_JSONS = [
    b"", b"[]", b"{}", b"[0.5, null]", b"[[0.5]]", b"[true]", b"[NaN]", b"[1e999]", b"[" * 100_000, b"[" + b"9" * 5000 + b"]", b"0.5",
    b'["0.5"]', b"\xff", b'{"0.5": 1}',
]  # fmt: skip

# Command lines that end early, and the flags whose values are looked at only where more is right.
EARLY = {
    "train": ["--task", "gone.jsonl"],
    "eval": ["./gone", "--task", "gone.jsonl"],
    "explain": ["grpo", "--group-size", "4"],
    "simulate": ["grpo:group_size=4", "--seeds", "1", "--prompts", "2", "--slots", "4"],
    "report": ["gone"],
    "serve": ["./gone", "--host", "203.0.113.1"],  # an address that no machine has: it cannot listen there
    "bench": ["--case", "no such case"],
    "doctor": ["--json"],
    "study": ["gone.toml"],
    "export": ["gone", "--merge"],
    "push": ["gone", "--to", "a/b/c"],  # which names no repository: the hub is not asked
    "completion": ["csh"],
}
LATER = {"task", "task-options", "reward", "out", "model", "memory-from", "num-examples", "eval-prompts", "preset", "engine", "track"}
POSITIONAL: dict[str, list[str]] = {
    "train": [],
    "explain": [],
    "report": [],
    "eval": ["--task", "gone.jsonl"],
    "simulate": ["--seeds", "1", "--prompts", "2", "--slots", "4"],
    "serve": ["--host", "203.0.113.1"],
    "bench": ["--list"],
    "doctor": ["--json"],
    "study": ["--report"],
    "export": ["--merge"],
    "push": ["--to", "a/b/c"],
    "completion": [],
}


# What a flag is meant to take, bent: half of its values are of these.
_PAIRS = ["1,2", "0,0", "-1,1", "1,nan", "nan,nan", "inf,1", "1e308,1e308", "1e-320,1e-320", "1e6,1e-6", "1,2,3", "1", ",", "1,", "a,b"]
_FILES = ["folder", "text.sqlite", "empty.sqlite", "rates.csv", "/dev/zero", "binary", "x[/b]", "loop", "a" * 256, "rollouts.sqlite"]
_WINDOWS = ["0", "1", str(10**30), "posterior:1e-300", "posterior:1", "posterior:nan", "posterior:-1", "posterior:", "adaptive:"]
MEANT = {
    ("explain", "--population"): _PAIRS,
    ("explain", "--class-weights"): _PAIRS,
    ("simulate", "--population"): [*(f"beta:{pair}" for pair in _PAIRS), *_FILES],
    ("simulate", "--window"): _WINDOWS,
    ("simulate", "--fit"): _FILES,
    ("train", "--task"): _FILES,
    ("eval", "--task"): _FILES,
    ("train", "--reward"): ["os:getcwd", "json:loads", ".:f", "./file:f", "file:f", "os", "os:", ":f", "os:environ", "os.path:join:x"],
    ("train", "--task-options"): STRUCTURES,
    ("train", "--stop"): STRUCTURES,
    ("serve", "--vllm-args"): ["'", "--quantization", "\\", "--port 1", "a\nb"],
}


def flags_of(command: str) -> list[str]:
    """The flags of a command that take a value, as its own parser has them, and those that do not."""
    parser = cli._parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return [flag for flag in commands.choices[command]._option_string_actions if flag.startswith("--") and flag != "--help"]


def lines(seed: int, count: int) -> list[list[str]]:
    """So many command lines of all commands: one hostile value, or two."""
    rng = random.Random(seed)
    flags = {command: flags_of(command) for command in EARLY}
    return [_line(rng, flags) for _ in range(count)]


def _line(rng: random.Random, flags: dict[str, list[str]]) -> list[str]:
    command = rng.choices(list(EARLY), weights=[6, 2, 4, 6, 2, 2, 1, 0.3, 2, 1, 0.5, 0.5])[0]
    value = rng.choice(VALUES)
    if rng.random() < 0.2:
        return [command, *POSITIONAL[command], "--", value] if rng.random() < 0.5 else [command, value, *POSITIONAL[command]]
    flag = rng.choice(flags[command] or ["--help"])
    base = list(EARLY[command])
    if command == "train" and flag.removeprefix("--") in LATER:
        base = ["--task", "good.jsonl", "--eval-prompts", "2", "--model", "./gone", "--engine", "transformers"]
    if command == "serve" and flag == "--host":
        base = ["./gone", "--port", "-1"]
    if rng.random() < 0.5:
        value = rng.choice(MEANT.get((command, flag), VALUES))
    more = [rng.choice(flags[command]), rng.choice(VALUES)] if flags[command] and rng.random() < 0.3 else []
    if command == "bench" and flag == "--case":
        base = ["--list"]  # many a value is a part of a name
    if more and (command, more[0]) in {("serve", "--host"), ("doctor", "--check"), ("bench", "--case")}:
        more = []
    return [command, *base, *more, f"{flag}={value}"] if rng.random() < 0.5 else [command, *base, *more, flag, value]


def make_world(folder: Path) -> None:
    """The files that PATHS names."""
    good = [json.dumps({"prompt": f"q{i}", "answer": str(i)}) for i in range(12)]
    (folder / "good.jsonl").write_text("\n".join(good) + "\n")
    (folder / "good.toml").write_text("[sampling]\ngroup_size = 4\n")
    (folder / "rates.csv").write_text("rate\n0.2\n0.7\n")
    (folder / "file").write_text("")
    (folder / "text.sqlite").write_text("no database\n" * 100)
    (folder / "empty.sqlite").write_text("")
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "latin-1.toml").write_bytes(b"[model]\nmodel = 'caf\xe9'\n")
    for name in ("folder", "folder.png", "x[/b]", "$x_{/model", "ray"):
        (folder / name).mkdir(parents=True)
    (folder / "x[/b]/config.toml").write_text("[sampling]\ngroup_size = 'many'\n")
    (folder / "loop").symlink_to("loop")


@dataclass(frozen=True)
class Ended:
    """What came of one command line."""

    line: list[str]
    code: int | None
    out: str
    error: str
    seconds: float

    @property
    def fault(self) -> str:
        """What breaks the promise of the command line, "" where nothing does."""
        if self.code not in (0, 1, 2, 3):
            return f"ended with {self.code}"
        if "Traceback" in self.error:
            return "a traceback"
        if found := _CONTROL.search(self.out + self.error):
            return f"the control character {found[0]!r} reached the terminal"
        said = [line for line in self.error.splitlines() if not line.startswith("task and engine as in ")]
        if self.code == 2 and not (len(said) == 1 and said[0].startswith("reinforce-ada")):
            return f"{len(said)} lines of error"
        return ""

    def __str__(self) -> str:
        line = " ".join(part if len(part) < 90 else f"{part[:40]}…({len(part)})" for part in map(repr, self.line))
        return f"{self.fault}: {line}\n    {self.error[-1500:]}"


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e]")


def run_line(line: list[str]) -> Ended:
    """One command line in this process, under its limit of time; only in the main thread."""
    out, error = io.StringIO(), io.StringIO()
    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(LIMIT_S)
    code: int | None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = cli.main(line)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else None
    except BaseException:
        code = None
        error.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Ended(line, code, out.getvalue(), error.getvalue(), time.monotonic() - started)


def _late(*_: object) -> None:
    raise TimeoutError(f"over its limit of {LIMIT_S} s")


def answers(stream: Iterator[str]) -> Iterator[str]:
    """What came of each line of a worker's input."""
    for text in stream:
        faulthandler.dump_traceback_later(LIMIT_S + 30, exit=True)  # where the alarm does not come through: in a loop in C
        yield json.dumps(asdict(run_line(json.loads(text))))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        make_world(Path(scratch))
        results = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a child process prints is no answer
        for answer in answers(iter(sys.stdin)):
            print(answer, file=results, flush=True)
