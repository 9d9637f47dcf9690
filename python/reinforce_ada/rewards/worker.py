"""The reward worker: a process that loads one reward and scores the completions it receives. Imports no torch.

It takes a chunk (see `Chunk`), answers one `Score` per completion, several in one message, and times every call
itself, so that a time-out does not depend on when the parent polls. The timer is faulthandler's, which needs no GIL: `9**9**9`, which holds
it in C, ends on time like `while True` does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import process, spawn
from typing import Any, NamedTuple, TypeAlias

from reinforce_ada.rewards.channel import Channel
from reinforce_ada.rewards.loading import as_reward, describe
from reinforce_ada.rewards.names import load_reward
from reinforce_ada.types import Prompt

START_TIMEOUT_S = 300.0  # loading a reward may mean importing torch and a model
_LONGEST_S = 1e9  # a timer of the C library takes no number of seconds past 9.2e9
_SLACK = 0.05  # of a limit: the timer is reset after this share of it, not for every call, which would cost a thread each (50 us)
_FLUSH_S = 0.005  # scores wait this long for others, but not for a slow call
_PROGRESS = struct.Struct("q")
Chunk: TypeAlias = Sequence[tuple[bytes, str, bool]]  # pickled prompt, completion text, whether a call for it has timed out


class TimeLimits(NamedTuple):
    """Time limits in seconds for a call, and for the first one of a worker."""

    call_s: float
    first_call_s: float


class Order(NamedTuple):
    """The first message to a worker."""

    preparation: dict[str, Any]  # what `multiprocessing` lets a spawned process do first: path, folder, the script's own functions
    reward: str | bytes
    limits: TimeLimits


class Started(NamedTuple):
    """The first message of a worker: the reward is loaded, or the reason why not."""

    failure: str = ""
    traceback: str = ""
    hint: str = ""


class Score(NamedTuple):
    """The answer for one completion of a chunk, in the chunk's order."""

    reward: float | None  # None: the attempt failed
    failure: str = ""
    traceback: str = ""


def get_progress(shared: mmap.mmap) -> int:
    """Return the place in the chunk of the current call, which the worker keeps in memory shared with the pool."""
    return int(_PROGRESS.unpack_from(shared)[0])


def set_progress(shared: mmap.mmap, place: int) -> None:
    """Write the place of the current call."""
    _PROGRESS.pack_into(shared, 0, place)


def main(connection: int, hang_report: int, progress: int) -> None:
    """Run the worker with the given file descriptors: load the reward, then score chunks until the parent hangs up."""
    for fd in (connection, hang_report, progress):
        os.set_inheritable(fd, False)
    channel = Channel(socket.socket(fileno=connection), is_waiting=True)
    timer = _Timer(hang_report)
    shared = mmap.mmap(progress, mmap.PAGESIZE)
    with contextlib.suppress(OSError, EOFError):  # the parent hung up
        (order,) = _wait(channel)
        timer.set(START_TIMEOUT_S)
        function = _load(order, channel)
        timer.cancel()
        if function is not None:
            _Scorer(function, order.limits, channel, timer, shared).run()


def _wait(channel: Channel) -> list[Any]:
    while True:
        if messages := channel.receive():
            return messages


def _load(order: Order, channel: Channel) -> Any:
    hint = "a script that starts a pool needs `if __name__ == '__main__':`"
    try:
        current: Any = process.current_process()
        current._inheriting = True  # keeps an unguarded script from starting pools without end
        spawn.prepare(order.preparation)
        del current._inheriting
        hint = ""
        # The pool has checked that code may be run.
        function: Any = load_reward(order.reward, run_code=True) if isinstance(order.reward, str) else pickle.loads(order.reward)
        if (prepare := getattr(function, "prepare", None)) is not None:
            prepare()
    except BaseException as error:
        channel.send(Started(*describe(error), hint))
        return None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # set again in case a module changes it: the parent handles Ctrl-C
    channel.send(Started())
    return function


class _Timer:
    """Ends the process when a call has run too long, and writes the stack in which it hung to `hang_report`."""

    def __init__(self, hang_report: int) -> None:
        self._file = hang_report
        self._limit_s, self._set_at = 0.0, 0.0

    def set(self, limit_s: float) -> None:
        """Limit calls to `limit_s` from now on, and at most 5 % more."""
        now = time.monotonic()
        if limit_s != self._limit_s or now - self._set_at > _SLACK * limit_s:
            faulthandler.dump_traceback_later(min(limit_s * (1 + _SLACK), _LONGEST_S), exit=True, file=self._file)
            self._limit_s, self._set_at = limit_s, now

    def cancel(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._limit_s = 0.0

    @property
    def slack_s(self) -> float:
        """Return how long the timer may stay set while no call runs."""
        return max(0.0, self._set_at + _SLACK * self._limit_s - time.monotonic()) if self._limit_s else 0.0


class _Scorer:
    """Scores one chunk after another."""

    def __init__(self, function: Any, limits: TimeLimits, channel: Channel, timer: _Timer, progress: mmap.mmap) -> None:
        self._function, self._batch = function, getattr(function, "batch", None)
        self._channel, self._timer, self._progress = channel, timer, progress
        self._limit_s, self._call_s = limits.first_call_s, limits.call_s
        self._pid = os.getpid()

    def run(self) -> None:
        while True:
            poller = select.poll()
            poller.register(self._channel, select.POLLIN)
            if not poller.poll(1000 * min(self._timer.slack_s, 0.01)):  # the next chunk does not come soon
                self._timer.cancel()
            for chunk in _wait(self._channel):
                self._score(chunk)

    def _score(self, chunk: Chunk) -> None:
        """Time one call per completion; with a batch form, one call for the chunk."""
        set_progress(self._progress, 0)
        if self._batch is not None and not chunk[0][2]:
            self._channel.send(self._attempt(partial(_call_batch, self._batch, chunk), len(chunk)))
            return
        scores: list[Score] = []
        sent_at = time.monotonic()
        for place, job in enumerate(chunk):
            if scores and (scores[-1].reward is None or time.monotonic() - sent_at > _FLUSH_S):
                self._channel.send(scores)
                scores, sent_at = [], time.monotonic()
            set_progress(self._progress, place)
            scores += self._attempt(partial(_call, self._function, *job), 1)
        self._channel.send(scores)

    def _attempt(self, call: Callable[[], list[object]], count: int) -> list[Score]:
        self._timer.set(self._limit_s)
        try:
            scores = [_checked(value) for value in call()]
        except BaseException as error:  # SystemExit too: a reward that calls sys.exit() must not end the worker unseen
            scores = [Score(None, *describe(error))] * count
        if os.getpid() != self._pid:  # the reward has forked, and this is the copy
            os._exit(0)
        self._limit_s = self._call_s
        return scores


def _call(function: Any, prompt: bytes, text: str, has_timed_out: bool) -> list[object]:
    call = function.timed_out if has_timed_out else function
    return [call(pickle.loads(prompt), text)]  # every call gets its own prompt, so that no other call sees its changes


def _call_batch(batch: Callable[..., Sequence[object]], chunk: Chunk) -> list[object]:
    prompts: list[Prompt] = [pickle.loads(prompt) for prompt, *_ in chunk]
    values = list(batch(prompts, [text for _, text, _ in chunk]))
    if len(values) != len(chunk):
        raise ValueError(f"the batch reward returned {len(values)} values for {len(chunk)} completions")
    return values


def _checked(value: object) -> Score:
    try:
        return Score(as_reward(value))
    except Exception as error:  # the returned object may raise anything when it is examined
        return Score(None, str(error)[:300])
