"""The reward worker: a spawned process that loads one reward and scores what it is sent. Imports no torch.

It takes a chunk (a list of pickled (prompt, text) pairs), answers one `Score` per completion, and times every call itself, so
that a time-out does not wait for the parent to look. The timer is faulthandler's, which needs no GIL: `9**9**9`, which holds it
in C, ends on time like `while True` does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import math
import multiprocessing
import numbers
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from reinforce_ada.rewards.protocol import Reward
from reinforce_ada.types import Prompt

START_TIMEOUT_S = 300.0  # loading a reward may mean importing torch and a model
_TRACEBACK_CHARS = 2000  # a chunk of 16 answers must fit in the 64 KiB of a pipe, or the worker waits for the parent to read


class Loaded(NamedTuple):
    """The worker's first message: the reward is loaded, or why it is not."""

    failure: str = ""
    traceback: str = ""


class Score(NamedTuple):
    """The answer for one completion of a chunk, in the chunk's order."""

    reward: float | None  # None: the attempt failed
    failure: str = ""
    traceback: str = ""


def as_reward(value: object) -> float:
    """A reward function's result as a finite float.

    Args:
        value: what the function returned: a real number (bool and numpy scalars too) or a 0-dimensional array or tensor.
    Returns: the float.
    Raises: TypeError for anything else (None, str, a longer array), ValueError for NaN and infinities, OverflowError for an integer
        past the floats.
    """
    scalar: Any = value
    if getattr(scalar, "ndim", None) == 0:
        scalar = scalar.item()
    if not isinstance(scalar, numbers.Real):
        raise TypeError(f"the reward returned {type(value).__name__} {value!r:.80}, not a float")
    number = float(scalar)
    if not math.isfinite(number):
        raise ValueError(f"the reward returned {number}, not a finite float")
    return number


def resolve(spec: str) -> Callable[..., object]:
    """The object a "module:function" string names. Raises ImportError or AttributeError as the import does."""
    module, _, names = spec.partition(":")
    found: Any = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


def work(answers: Connection, hang_report: Connection, reward: str | bytes, timeout_s: float) -> None:
    """The process's main: load `reward` ("module:function", or a pickle), then score chunks until the parent hangs up."""
    os.setpgrp()  # Ctrl-C in the terminal is the parent's; and the parent ends whatever the reward started with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(OSError, EOFError):  # the parent hung up
        with _time_limit(START_TIMEOUT_S, hang_report):
            function = _load(reward, answers)
        while function is not None:
            chunk: list[bytes] = answers.recv()
            for score in _score(function, chunk, timeout_s, hang_report):
                answers.send(score)


def _load(reward: str | bytes, answers: Connection) -> Any:
    try:
        function: Any = resolve(reward) if isinstance(reward, str) else pickle.loads(reward)
    except BaseException as error:
        answers.send(Loaded(*_describe(error)))
        return None
    answers.send(Loaded())
    return function


def _score(function: Any, chunk: Sequence[bytes], timeout_s: float, hang_report: Connection) -> Iterator[Score]:
    """One timed call per completion; with a batch form, one timed call for the chunk."""
    batch = getattr(function, "batch", None)
    if batch is not None:
        yield from _attempt(partial(_call_batch, batch, chunk), len(chunk), timeout_s, hang_report)
        return
    for payload in chunk:
        yield from _attempt(partial(_call, function, payload), 1, timeout_s, hang_report)


def _call(function: Reward, payload: bytes) -> list[object]:
    return [function(*pickle.loads(payload))]


def _call_batch(batch: Callable[..., Sequence[object]], chunk: Sequence[bytes]) -> list[object]:
    pairs: list[tuple[Prompt, str]] = [pickle.loads(payload) for payload in chunk]
    values = list(batch([prompt for prompt, _ in pairs], [text for _, text in pairs]))
    if len(values) != len(chunk):
        raise ValueError(f"the batch reward returned {len(values)} values for {len(chunk)} completions")
    return values


def _attempt(call: Callable[[], list[object]], count: int, timeout_s: float, hang_report: Connection) -> list[Score]:
    try:
        with _time_limit(timeout_s, hang_report):
            return [_checked(value) for value in call()]
    except BaseException as error:  # SystemExit too: a reward that calls sys.exit() must not end the worker unseen
        return [Score(None, *_describe(error))] * count


def _checked(value: object) -> Score:
    try:
        return Score(as_reward(value))
    except Exception as error:  # what it returned may raise anything when looked at
        return Score(None, str(error))


def _describe(error: BaseException) -> tuple[str, str]:
    """(one line, the end of the traceback)."""
    line = " ".join(traceback.format_exception_only(type(error), error)[-1].split())
    return line[:300], "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]


@contextlib.contextmanager
def _time_limit(limit_s: float, hang_report: Connection) -> Iterator[None]:
    """Ends the process after `limit_s`, with the stack it hung in written to `hang_report`."""
    faulthandler.dump_traceback_later(limit_s, exit=True, file=hang_report.fileno())
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
