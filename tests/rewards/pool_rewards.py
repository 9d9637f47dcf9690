"""Rewards for test_reward_pool.py: light to import, since every worker does. The text says what happens; data["marker"] is a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from reinforce_ada.types import Prompt

NOT_CALLABLE = 3.5


def _hang() -> float:
    while True:
        pass


def _raise() -> float:
    raise ValueError("no\nsuch answer")


def _die_by_signal() -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def _start_child_and_hang() -> float:
    child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    print(f"grandchild {child.pid}", flush=True)
    return _hang()


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("do not look")


TRICKS: dict[str, Callable[[], object]] = {
    "raise": _raise,
    "exit": lambda: sys.exit(7),
    "too large": lambda: 10**400,
    "unspeakable": lambda: Unspeakable(),
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "none": lambda: None,
    "text": lambda: "1.0",
    "list": lambda: [1.0],
    "hang": _hang,
    "hang in C": lambda: 9 ** (9**9),
    "os._exit": lambda: os._exit(3),
    "sigkill": _die_by_signal,
    "numpy": lambda: np.float32(0.25),
    "array": lambda: np.array(0.75),
    "bool": lambda: True,
    "int": lambda: 2,
    "pid": os.getpid,
    "torch": lambda: "torch" in sys.modules,
    "grandchild": _start_child_and_hang,
}


def tricky(prompt: Prompt, text: str) -> object:
    """What TRICKS says, or the number the text spells."""
    return TRICKS[text]() if text in TRICKS else float(text)


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

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _raise, ()


class DiesLoading:
    def __call__(self, prompt: Prompt, text: str) -> float:
        return 1.0

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return os._exit, (4,)


def wrong_arity(prompt: Prompt) -> float:
    return 1.0
