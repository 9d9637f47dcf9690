"""Rewards for the tests of the pool: light to import, since every worker does. The text says what happens; data["marker"] is a file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np

from reinforce_ada.types import Prompt

NOT_CALLABLE = 3.5


def _hang() -> float:
    while True:
        pass


def _raise(error: BaseException) -> float:
    raise error


def _signal(number: int) -> float:
    os.kill(os.getpid(), number)
    return 0.0


def start_child(how: str = "child with a session") -> int:
    """The pid of a process that waits for ever: a child, or one that has no parent any more."""
    code = "import signal; signal.pause()"
    if how == "orphan with a session":
        start = f"subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True, stdout=subprocess.DEVNULL)"
        code = f"import subprocess, sys; print({start}.pid)"
        return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout)
    return subprocess.Popen([sys.executable, "-c", code], start_new_session="session" in how).pid


def _start_child_and_hang() -> float:
    print(f"grandchild {start_child()}", flush=True)
    return float(9 ** (9**9))


def _fork() -> float:
    os.fork()  # both go on
    return 1.0


def _leave_a_thread() -> float:
    threading.Thread(target=lambda: 9 ** (9**9), daemon=True).start()  # holds the interpreter lock for ever
    return 1.0


def _print() -> float:
    print("an output that belongs to nobody", flush=True)
    return 1.0


def _recurse() -> float:
    return _recurse()


def _write_everywhere() -> float:
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(fd, b"not a message" * 8)
    return 1.0


async def asynchronous(prompt: Prompt, text: str) -> float:
    return 1.0


class Asynchronous:
    async def __call__(self, prompt: Prompt, text: str) -> float:
        return 1.0


class AsynchronousBatch:
    def __call__(self, prompt: Prompt, text: str) -> float:
        return 1.0

    async def batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [1.0] * len(texts)


def generating(prompt: Prompt, text: str) -> Iterator[float]:
    yield 1.0


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("do not look")


class SilentError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("do not ask")


class NoReal(float):
    """A float that will not say which."""

    def __float__(self) -> float:
        raise OSError("not today")


# Every way in which a reward can misbehave: what it does, and what becomes of the completion: a reward, or a part of the reason of a void.
RETURNS: dict[str, tuple[Callable[[], object], float | str]] = {
    "nan": (lambda: float("nan"), "the reward returned nan, not a finite float"),
    "inf": (lambda: float("inf"), "the reward returned inf, not a finite float"),
    "none": (lambda: None, "the reward returned NoneType None, not a float"),
    "text": (lambda: "1.0", "the reward returned str '1.0', not a float"),
    "bytes": (lambda: b"1.0", "the reward returned bytes b'1.0', not a float"),
    "list": (lambda: [1.0], "the reward returned list [1.0], not a float"),
    "dict": (lambda: {"score": 1.0}, "the reward returned dict {'score': 1.0}, not a float"),
    "tuple": (lambda: (1.0, "why"), "the reward returned tuple (1.0, 'why'), not a float"),
    "complex": (lambda: 1j, "the reward returned complex 1j, not a float"),
    "coroutine": (lambda: asynchronous(Prompt("p"), ""), "the reward returned coroutine <coroutine object asynchronous"),
    "generator": (lambda: generating(Prompt("p"), ""), "the reward returned generator <generator object generating"),
    "function": (lambda: _hang, "the reward returned function <function _hang"),
    "longer array": (lambda: np.ones(1), "the reward returned ndarray array([1.]), not a float"),
    "text array": (lambda: np.array("1"), "the reward returned ndarray array('1'"),
    "numpy nan": (lambda: np.float32("nan"), "the reward returned nan, not a finite float"),
    "too large": (lambda: 10**400, "too large to convert to float"),
    "past float32": (lambda: 1e39, "the reward returned 1e+39, more than 1e+15 in magnitude"),
    "far below": (lambda: np.float64(-1e16), "the reward returned -1e+16, more than 1e+15 in magnitude"),
    "large": (lambda: -1e15, -1e15),
    "unspeakable": (Unspeakable, "do not look"),
    "no real": (lambda: NoReal(1.0), "not today"),
    "numpy": (lambda: np.float32(0.25), 0.25),
    "array": (lambda: np.array(0.75), 0.75),
    "decimal": (lambda: Decimal("0.5"), 0.5),
    "fraction": (lambda: Fraction(1, 4), 0.25),
    "bool": (lambda: True, 1.0),
    "numpy bool": (lambda: np.bool_(False), 0.0),
    "int": (lambda: 2, 2.0),
    "negative zero": (lambda: -0.0, -0.0),
}
RAISES: dict[str, tuple[Callable[[], object], float | str]] = {
    "raise": (lambda: _raise(ValueError("no\nsuch answer")), "ValueError: no such answer"),
    "raise silently": (lambda: _raise(SilentError()), "SilentError: <exception str() failed>"),
    "raise at length": (lambda: _raise(ValueError("x" * 1_000_000)), "ValueError: xxxxxxxx"),
    "exit": (lambda: sys.exit(7), "SystemExit: 7"),
    "generator exit": (lambda: _raise(GeneratorExit()), "GeneratorExit"),
    "recurse": (_recurse, "RecursionError: maximum recursion depth exceeded"),
    "memory": (lambda: _raise(MemoryError()), "MemoryError"),
    "import": (lambda: __import__("no_such_module_here"), "ModuleNotFoundError: No module named 'no_such_module_here'"),
}
PROCESS: dict[str, tuple[Callable[[], object], float | str]] = {
    "interrupt": (lambda: _raise(KeyboardInterrupt()), "KeyboardInterrupt"),
    "hang": (_hang, "timed out after"),
    "hang in C": (lambda: 9 ** (9**9), "timed out after"),
    "hang in a wait": (threading.Event().wait, "timed out after"),
    "hang while described": (lambda: _raise(type("E", (Exception,), {"__str__": lambda _: _hang()})()), "timed out after"),
    "lock": (_leave_a_thread, "timed out after"),
    "stop": (lambda: _signal(signal.SIGSTOP), "timed out after"),
    "os._exit": (lambda: os._exit(3), "the worker died of exit code 3"),
    "sigkill": (lambda: _signal(signal.SIGKILL), "the worker died of SIGKILL"),
    "sigsegv": (lambda: _signal(signal.SIGSEGV), "the worker died of SIGSEGV"),
    "sigint": (lambda: _signal(signal.SIGINT), 0.0),
    "kill the keeper": (lambda: os.kill(os.getppid(), signal.SIGKILL) or _hang(), "the worker died of SIGKILL"),
    "close": (lambda: os.closerange(3, 64), "the worker died of"),
    "write": (_write_everywhere, "the worker died of"),
    "fork": (_fork, 1.0),
    "print": (_print, 1.0),
}
MISBEHAVIOUR = {**RETURNS, **RAISES, **PROCESS}

TRICKS: dict[str, Callable[[], object]] = {
    **{name: trick for name, (trick, _) in MISBEHAVIOUR.items()},
    "pid": os.getpid,
    "torch": lambda: "torch" in sys.modules,
    "grandchild then hang in C": _start_child_and_hang,
}


def tricky(prompt: Prompt, text: str) -> object:
    """What TRICKS says, or the number the text spells."""
    return TRICKS[text]() if text in TRICKS else float(text)


def length(prompt: Prompt, text: str) -> float:
    """Of the text, or the worker's process."""
    return float(os.getpid() if text == "pid" else len(text))


def cold(prompt: Prompt, text: str) -> float:
    """Takes as many seconds as the text says."""
    threading.Event().wait(float(text))
    return 1.0


def starter(prompt: Prompt, text: str) -> float:
    """Starts a process as data["how"] says and writes its own pid and that one's to data["pid"]."""
    if prompt.data["how"] != "nothing":
        Path(prompt.data["pid"]).write_text(f"{os.getpid()} {start_child(prompt.data['how'])}")
    return _hang() if prompt.data["then"] == "hang" else 1.0


def first_time_only(prompt: Prompt, text: str) -> object:
    """The trick at the first attempt, 1.0 afterwards."""
    marker = Path(prompt.data["marker"])
    if marker.exists():
        return 1.0
    marker.touch()
    return TRICKS[text]()


class Batch:
    """A batch form; the sizes of its calls go to a file."""

    def __init__(self, log: str) -> None:
        self.log = log

    def __call__(self, prompt: Prompt, text: str) -> float:
        raise AssertionError("the batch form is there")

    def batch(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[object]:
        with open(self.log, "a") as log:
            log.write(f"{len(texts)}\n")
        values = [tricky(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        return values[:-1] if "short" in [p.data.get("trick") for p in prompts] else values


class FailsToLoad:
    def __call__(self, prompt: Prompt, text: str) -> float:
        return 1.0

    def __reduce__(self) -> tuple[Callable[[BaseException], object], tuple[BaseException]]:
        return _raise, (ValueError("no\nsuch answer"),)


class DiesLoading:
    def __call__(self, prompt: Prompt, text: str) -> float:
        return 1.0

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return os._exit, (4,)


def wrong_arity(prompt: Prompt) -> float:
    return 1.0


def consuming(prompt: Prompt, text: str) -> float:
    """Takes the answer out of the record."""
    return float(prompt.data.pop("answer") == text)  # type: ignore[attr-defined]
