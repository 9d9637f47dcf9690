"""docs/environment.md against the sources: every exit code and every environment variable; and how logs and signs of life are shown."""

from __future__ import annotations

import ast
import importlib
import io
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from reinforce_ada import cli, heartbeat
from reinforce_ada.commands import explain, serve
from reinforce_ada.outside import log_on_stderr, show

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python/reinforce_ada"
PAGE = (ROOT / "docs/environment.md").read_text()
TREES = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
NAME = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b")

# Words of this form that are no variables: an argument of the supervisor, an error of OpenSSL, settings of peft, Ray, Linux and sysconf,
# and a letter of a formula.
OTHERS = {"PARENT_PID", "CERTIFICATE_VERIFY_FAILED", "CAUSAL_LM", "STRICT_PACK", "PR_SET_PDEATHSIG", "SC_PAGE_SIZE", "SC_PHYS_PAGES", "S_0"}


def documented() -> set[str]:
    rows = PAGE.partition("## Environment variables")[2].splitlines()
    return {name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split(" | ")[0])}


def strings() -> Iterator[str]:
    for tree in TREES.values():
        yield from (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def named_in_python() -> set[str]:
    """Every word of this form in a text of the package that is not the name of something in it."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    ours = {node.id for node in nodes if isinstance(node, ast.Name)} | {node.arg for node in nodes if isinstance(node, ast.arg)}
    return {name for text in strings() for name in NAME.findall(text)} - ours - OTHERS


def named_in_the_build() -> set[str]:
    cmake = "".join(path.read_text() for path in (ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake")))
    native = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
    settings = re.findall(r'env = "(\w+)"', (ROOT / "pyproject.toml").read_text())
    return {*re.findall(r"ENV\{(\w+)\}", cmake), *re.findall(r'getenv\("(\w+)"\)', native), *settings}


def test_every_environment_variable_is_documented_and_every_one_that_is_documented_is_used() -> None:
    assert {*named_in_python(), *named_in_the_build(), "RANK"} == documented()
    assert "RANK" in set(strings())


def exits(tree: ast.AST) -> Iterator[int]:
    """The whole numbers that functions return, and with which the process ends."""
    for node in ast.walk(tree):
        ends = isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "SystemExit")
        value = node.value if isinstance(node, ast.Return) else node.args[0] if ends and node.args else None
        parts = (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
        yield from (part.value for part in parts if isinstance(part, ast.Constant) and type(part.value) is int)


def test_every_exit_code_is_documented() -> None:
    names = ("cli.py", "__main__.py", "command.py", "doctor.py", "launch.py")
    entries = [path for path in TREES if path.parent.name == "commands" or path.name in names]
    found = {code for path in entries for code in exits(TREES[path])}
    rows = re.findall(r"^\| (\d+) \|", PAGE.partition("## Exit codes")[2].partition("\n## ")[0], re.MULTILINE)
    assert {*map(int, rows)} == found == {0, 1, 2, 3, 130}


# -------------------- logging


def test_modules_log_by_their_names_and_print_nothing() -> None:
    """Only the command line prints: `cli`, `commands`, what they call (`command.py`, `doctor`, `study`), and `outside.show` itself."""
    loggers, printing = set(), set()
    for path, tree in TREES.items():
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name == "logging.getLogger" and call.args:
                loggers.add(ast.unparse(call.args[0]))
            if name in ("print", "show", "sys.stdout.write", "sys.stderr.write", "warnings.warn"):
                printing.add(module)
    assert loggers - {"'vllm'", "'math_verify'"} == {"__name__", "'reinforce_ada'"}  # the latter by log_on_stderr alone
    commands = {m for m in printing if m in ("cli", "doctor", "outside") or m.startswith("commands.") or m.endswith(".command")}
    assert printing == commands


def test_a_program_that_has_configured_nothing_sees_warnings_alone() -> None:
    """As Python's logging does: a reward with a fault must not pass unseen."""
    failing = """
import sys
from reinforce_ada import AdaptiveSampler, FunctionEngine, Prompt, preset, run
if sys.argv[1:]:
    import logging
    logging.basicConfig(format="%(name)s: %(message)s")
run(AdaptiveSampler([Prompt("a")], preset("grpo", group_size=2)), FunctionEngine(lambda p, s: ["x"] * len(p)), lambda p, t: 1 / 0)
"""
    said = [subprocess.run([sys.executable, "-c", failing, *more], capture_output=True, text=True, check=True) for more in ([], ["log"])]
    assert said[0].stdout == ""
    assert said[0].stderr.startswith("a reward failed (shown once): ZeroDivisionError")
    assert said[1].stderr.startswith("reinforce_ada.rewards.inline: a reward failed (shown once): ZeroDivisionError")
    assert said[1].stdout == ""


def unconfigured(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The package's logger in a program that has configured nothing; pytest has, anew for each phase of a test."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    return logging.getLogger("reinforce_ada")


def test_the_command_line_shows_the_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger = unconfigured(monkeypatch)
    before = (list(logger.handlers), logger.level, logger.propagate)
    with log_on_stderr():
        logging.getLogger("reinforce_ada.engines.fleet").info("engine: a\x1b[2J is up")
        logging.getLogger("reinforce_ada.engines.fleet").debug("not this")
    assert capsys.readouterr().err == "engine: a\\x1b[2J is up\n"
    assert (logger.handlers, logger.level, logger.propagate) == before


def test_a_program_that_logs_keeps_its_own_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logger, own = unconfigured(monkeypatch), io.StringIO()
    logging.getLogger().handlers.append(logging.StreamHandler(own))
    with log_on_stderr():
        logger.warning("once")
    assert (own.getvalue(), capsys.readouterr().err) == ("once\n", "")


# -------------------- signs of life


class Told:
    """Collects what is said, and lets a test wait for it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.came = threading.Semaphore(0)

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self.came.release()

    def wait(self, count: int) -> list[str]:
        assert all(self.came.acquire(timeout=20) for _ in range(count))
        return self.lines


def test_silence_is_broken_and_names_the_work() -> None:
    told = Told()
    with heartbeat.beating(told, every_s=0.01):
        told.wait(2)
        heartbeat.begins("step 3 training")
        told.wait(2)  # one may have been on its way
    num_lines = len(told.lines)
    assert re.fullmatch(r"\d+ s: still running", told.lines[0])
    assert re.fullmatch(r"\d+ s: step 3 training", told.lines[-1])
    assert "reinforce-ada-heartbeat" not in {thread.name for thread in threading.enumerate()}
    assert len(told.lines) == num_lines


def test_what_is_shown_counts_as_a_sign_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    told, until = Told(), time.monotonic() + 0.3
    with heartbeat.beating(told, every_s=0.2):
        while time.monotonic() < until:
            show("a line")
        assert told.lines == []
        told.wait(1)


@pytest.mark.parametrize(("is_terminal", "beats"), [(False, True), (True, False)])
def test_commands_give_signs_of_life_where_there_is_no_terminal(
    is_terminal: bool, beats: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(given: object) -> int:
        if beats:
            deadline = time.monotonic() + 20
            while "still running" not in (said := capsys.readouterr().err):
                assert time.monotonic() < deadline
            assert re.match(r"reinforce-ada explain: \d+ s: still running\n", said)
        assert ("reinforce-ada-heartbeat" in {thread.name for thread in threading.enumerate()}) == beats
        return 0

    monkeypatch.setattr(heartbeat, "EVERY_S", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(explain, "run", run)
    assert cli.main(["explain"]) == 0


@pytest.mark.parametrize("command", ["train", "study s.toml", "eval m", "simulate", "bench", "explain", "export r --merge", "report r"])
def test_the_sign_of_life_is_where_the_other_lines_are(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of most commands is a result, which nothing else may be written into."""
    streams = {name: io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def run(given: object) -> int:
        deadline = time.monotonic() + 20
        while not any(stream.getvalue() for stream in streams.values()):
            assert time.monotonic() < deadline
        return 0

    name, *more = command.split()
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.02)
    monkeypatch.setattr(importlib.import_module(f"reinforce_ada.commands.{'evaluate' if name == 'eval' else name}"), "run", run)
    assert cli.main([name, *more]) == 0
    said = {stream: text.getvalue() for stream, text in streams.items()}
    place, other = ("stdout", "stderr") if name in ("train", "study") else ("stderr", "stdout")
    assert said[place].startswith(f"reinforce-ada {name}: 0 s: still running\n")
    assert said[other] == ""


def test_a_server_needs_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "run", lambda given: sum(thread.name == "reinforce-ada-heartbeat" for thread in threading.enumerate()))
    assert cli.main(["serve", "m"]) == 0
