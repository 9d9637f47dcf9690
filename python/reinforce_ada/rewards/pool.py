"""RewardPool: rewards in worker processes, with time-outs, bounded retries and replacement of workers that hang or die."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import logging
import math
import multiprocessing
import os
import pickle
import signal
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.rewards.protocol import Reward
from reinforce_ada.rewards.worker import START_TIMEOUT_S, Loaded, Score, resolve, work
from reinforce_ada.types import Completion, Failed, Prompt, Scored

_MAX_CHUNK = 16  # completions in one message: enough to keep a worker busy while a slow engine holds the driver
_SILENCE_S = 5.0  # the worker ends its own overdue calls; only a stopped process is silent for so much longer
_MAX_FAILED_STARTS = 3  # in a row, without one worker that got as far as loading the reward

_log = logging.getLogger("reinforce_ada")


@dataclass
class RewardCounters:
    """What happened since the pool was made; attempts and workers, not completions, where it says so."""

    num_scored: int = 0
    num_voids: int = 0
    num_timeouts: int = 0  # attempts
    num_retries: int = 0  # attempts after a first one
    num_workers_replaced: int = 0
    last_traceback: str = ""


@dataclass(eq=False)
class _Job:
    """One completion on its way."""

    completion: Completion
    payload: bytes  # pickled (prompt, text)
    num_attempts: int = 0  # that failed
    travels_alone: bool = False  # it was part of something that failed


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    answers: Connection
    hang_report: Connection
    is_loaded: bool = False
    chunk: deque[_Job] = field(default_factory=deque)  # sent and not yet answered, in order
    is_joint_call: bool = False  # the chunk is one call of a batch form, and no single completion is to blame
    silent_since: float = 0.0

    @property
    def is_idle(self) -> bool:
        return self.is_loaded and not self.chunk

    def silent_until(self, timeout_s: float) -> float:
        """When a worker that has not said a word counts as stopped."""
        if self.is_idle:
            return math.inf
        return self.silent_since + (timeout_s if self.is_loaded else START_TIMEOUT_S) + _SILENCE_S


class RewardPool:
    """Scores completions in `num_workers` spawned processes; a RewardRunner.

    Every submitted completion yields exactly one event: Scored with a finite reward, or, after `1 + retries` failed attempts,
    Failed with the reason. An attempt fails when the reward raises, returns anything but a finite number, runs over its time,
    or takes its worker down. Such a worker is replaced. Workers start at the first `submit` and load while the caller goes on.

    Args:
        reward: (prompt, completion text) -> float; a callable that pickles, or "module:function". With a `batch` method, one
            call scores a chunk of up to 16 completions; a chunk that fails is tried again one completion at a time, and no
            completion loses an attempt by it.
        num_workers: processes.
        timeout_s: seconds for one call, counted in the worker from the call's start.
        retries: further attempts for a completion whose attempt failed.

    Raises: InputError when the reward is not callable so, cannot be imported or pickled, or a setting is out of range; from
        `poll` when no worker can load the reward.
    """

    def __init__(self, reward: Reward | str, *, num_workers: int = 2, timeout_s: float = 10.0, retries: int = 2) -> None:
        _check_settings(num_workers, timeout_s, retries)
        self._reward = _portable(reward)
        self._has_batch_form = hasattr(resolve(reward) if isinstance(reward, str) else reward, "batch")
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._retries = retries
        self._queue: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._events: list[Scored | Failed] = []
        self._failed_starts = 0
        self._is_closed = False
        self.counters = RewardCounters()
        # Before multiprocessing's own exit handler (last registered, first run), which would wait for the workers for ever.
        atexit.register(_close_at_exit, weakref.ref(self))

    def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        """Start scoring; prompts[i] is the prompt of completions[i]. Raises InputError when a prompt does not pickle."""
        self._check_open()
        self._queue += [_Job(c, _payload(p, c)) for p, c in zip(prompts, completions, strict=True)]
        self._dispatch()

    def poll(self, wait_s: float = 0.0) -> list[Scored | Failed]:
        """What has been scored since the last call; waits up to `wait_s` seconds for the first one."""
        self._check_open()
        deadline = time.monotonic() + wait_s
        self._advance(0.0)
        while not self._events and self.num_pending and time.monotonic() < deadline:
            self._advance(deadline - time.monotonic())
        events, self._events = self._events, []
        return events

    @property
    def num_pending(self) -> int:
        """Completions submitted whose event has not been handed out."""
        return len(self._queue) + sum(len(w.chunk) for w in self._workers) + len(self._events)

    def close(self) -> None:
        """Stop the workers, hung ones too. What was not scored yields no event. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        for worker in self._workers:
            worker.answers.close()  # an idle worker leaves by itself
        leave_until = time.monotonic() + 1.0
        for worker in self._workers:
            if worker.is_idle:
                wait([worker.process.sentinel], max(0.0, leave_until - time.monotonic()))
            _end(worker)
        self._workers.clear()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "counters"):  # a constructor that raised has nothing to close
            self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise InputError("RewardPool", "it is closed", "an open pool is needed")

    def _advance(self, wait_s: float) -> None:
        """Read what the workers say, end those that fell silent, hand out work."""
        next_silence = min((w.silent_until(self._timeout_s) for w in self._workers), default=math.inf)
        by_connection = {w.answers: w for w in self._workers}
        ready = wait(by_connection, max(0.0, min(wait_s, next_silence - time.monotonic())))
        for connection in ready:
            self._read(by_connection[connection])  # type: ignore[index]
        now = time.monotonic()
        for worker in [w for w in self._workers if w.silent_until(self._timeout_s) < now]:
            self._replace(worker, f"timed out after {self._timeout_s:g} s")
        self._dispatch()

    def _read(self, worker: _Worker) -> None:
        try:
            while worker.answers.poll():
                self._take(worker, worker.answers.recv())
        except (EOFError, OSError):
            self._replace(worker)

    def _take(self, worker: _Worker, message: Loaded | Score) -> None:
        worker.silent_since = time.monotonic()
        if isinstance(message, Loaded):
            if message.failure:
                self._give_up(message.failure, message.traceback)
            worker.is_loaded = True
            self._failed_starts = 0
            return
        job = worker.chunk.popleft()
        if message.reward is None:
            self._attempt_failed(job, worker, message.failure, message.traceback)
        else:
            self.counters.num_scored += 1
            self._events.append(Scored(job.completion, message.reward))

    def _replace(self, worker: _Worker, reason: str = "") -> None:
        """Bury a worker that died or fell silent; the completion it was at has failed, the rest of its chunk waits again."""
        self._workers.remove(worker)
        hang = _read_hang_report(worker)
        reason = reason or (f"timed out after {self._timeout_s:g} s" if hang else "")
        exit_code = _end(worker)
        self.counters.num_workers_replaced += 1
        if not worker.is_loaded:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                died = f"{self._failed_starts} workers in a row died of {_exit_text(exit_code)} before they had it"
                self._give_up(died, hang, "a script that starts a pool needs `if __name__ == '__main__':`")
        if not worker.chunk:
            return
        self.counters.num_timeouts += bool(reason)
        num_at = len(worker.chunk) if worker.is_joint_call else 1
        for job in list(worker.chunk)[:num_at]:
            self._attempt_failed(job, worker, reason or f"the worker died of {_exit_text(exit_code)}", hang)
        self._queue.extendleft(list(worker.chunk)[: num_at - 1 : -1])

    def _attempt_failed(self, job: _Job, worker: _Worker, reason: str, trace: str) -> None:
        counters = self.counters
        if not counters.last_traceback:
            _log.warning("a reward failed on %s: %s (shown once; further failures are counted)\n%s", job.completion.id, reason, trace)
        counters.last_traceback = trace or reason
        job.travels_alone = True
        job.num_attempts += not worker.is_joint_call
        if job.num_attempts <= self._retries:
            counters.num_retries += 1
            self._queue.append(job)
        else:
            counters.num_voids += 1
            self._events.append(Failed(job.completion.id, job.completion.policy_version, f"{reason} ({job.num_attempts} attempts)"))

    def _give_up(self, failure: str, trace: str, hint: str = "") -> None:
        if trace:
            _log.warning("a reward worker could not load the reward\n%s", trace)
        self.close()
        raise InputError("RewardPool", f"a worker cannot load the reward ({failure})", "a reward that a fresh process can import", hint)

    def _dispatch(self) -> None:
        for worker in [w for w in self._workers if w.is_idle]:
            if self._queue:
                self._send(worker, self._next_chunk())
        num_coming = sum(not w.is_loaded for w in self._workers)
        for _ in range(min(self._num_workers - len(self._workers), len(self._queue) - num_coming)):
            self._workers.append(_start(self._reward, self._timeout_s))

    def _next_chunk(self) -> list[_Job]:
        """A fair share of the queue; what failed before travels alone, so that it takes no other down."""
        size = min(_MAX_CHUNK, math.ceil(len(self._queue) / self._num_workers))
        chunk = [self._queue.popleft()]
        while len(chunk) < size and not chunk[0].travels_alone and not self._queue[0].travels_alone:
            chunk.append(self._queue.popleft())
        return chunk

    def _send(self, worker: _Worker, chunk: list[_Job]) -> None:
        try:
            worker.answers.send([job.payload for job in chunk])
        except OSError:  # it died idle, and nobody's fault: the end of file on its connection says so at the next look
            self._queue.extendleft(reversed(chunk))
            return
        worker.chunk.extend(chunk)
        worker.is_joint_call = self._has_batch_form and len(chunk) > 1
        worker.silent_since = time.monotonic()


def _check_settings(num_workers: int, timeout_s: float, retries: int) -> None:
    if num_workers < 1:
        raise InputError("RewardPool", f"num_workers={num_workers}", "at least 1 is needed")
    if not 0 < timeout_s < math.inf:
        raise InputError("RewardPool", f"timeout_s={timeout_s}", "a positive number of seconds is needed")
    if retries < 0:
        raise InputError("RewardPool", f"retries={retries}", "0 or more is needed")


def _portable(reward: Reward | str) -> str | bytes:
    """The reward as it travels to a worker, checked here so that a typo costs no process."""
    if isinstance(reward, str):
        _check_callable(_resolved(reward), repr(reward))
        return reward
    _check_callable(reward, repr(reward))
    try:
        return pickle.dumps(reward)
    except Exception as error:  # PicklingError, AttributeError or TypeError, by what is in it
        hint = "define it at the top level of a module, not as a lambda or inside a function"
        raise InputError("RewardPool", f"reward {reward!r} does not pickle ({error})", "workers need a pickle", hint) from error


def _resolved(spec: str) -> object:
    module, _, name = spec.partition(":")
    if not module or not name:
        raise InputError("RewardPool", f"reward {spec!r}", 'the form "module:function" is needed')
    try:
        return resolve(spec)
    except ModuleNotFoundError as error:
        raise InputError("RewardPool", f"reward {spec!r}: {error}", "an importable module is needed") from error
    except AttributeError as error:
        raise InputError("RewardPool", f"reward {spec!r}: {error}", "a function of that module is needed") from error


def _check_callable(reward: object, shown: str) -> None:
    if not callable(reward):
        raise InputError("RewardPool", f"reward {shown} is not callable", "(prompt, completion text) -> float is needed")
    try:
        signature = inspect.signature(reward)
    except ValueError:  # some builtins have none to look at
        return
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise InputError("RewardPool", f"reward {shown}: {error}", "(prompt, completion text) -> float is needed") from error


def _payload(prompt: Prompt, completion: Completion) -> bytes:
    try:
        return pickle.dumps((prompt, completion.text))
    except Exception as error:  # as above
        raise InputError("RewardPool", f"prompt {prompt.prompt_id!r} does not pickle ({error})", "Prompt.data must pickle") from error


def _start(reward: str | bytes, timeout_s: float) -> _Worker:
    """A new worker process, loading; returns without waiting for it."""
    context = multiprocessing.get_context("spawn")  # never fork: OpenMP and vLLM have threads
    ours, theirs = context.Pipe()
    hang_report, hang_report_in = context.Pipe(duplex=False)
    args: tuple[Any, ...] = (theirs, hang_report_in, reward, timeout_s)
    process = context.Process(target=work, args=args, name="reward-worker")
    with _sigint_blocked():
        process.start()
    theirs.close()  # or its death would not be an end of file here
    hang_report_in.close()
    return _Worker(process, ours, hang_report, silent_since=time.monotonic())


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A child starts with this mask, so a Ctrl-C while it imports does not end it with a traceback on the terminal."""
    resource_tracker.ensure_running()  # starting it unblocks SIGINT, so it has to be there before
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end(worker: _Worker) -> int:
    """Kill the worker and what it started, reap it, and return its exit code (its own, where it had one)."""
    process = worker.process
    if process.pid is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # before the reaping: a zombie keeps its number from being given to another
        except ProcessLookupError:  # too young to have a group
            process.kill()
    process.join()
    exit_code = process.exitcode
    process.close()
    worker.answers.close()
    worker.hang_report.close()
    return exit_code if exit_code is not None else 0


def _read_hang_report(worker: _Worker) -> str:
    """The stack the worker wrote when its time limit ended it, or ""."""
    wait([worker.process.sentinel], 1.0)  # let it finish writing and dying
    if not worker.hang_report.poll():
        return ""
    threads = os.read(worker.hang_report.fileno(), 1 << 16).decode(errors="replace").split("\n\n")
    return "\n".join(stack for stack in threads if "_end_with_parent" not in stack)  # the worker's own thread hangs nowhere


def _exit_text(exit_code: int) -> str:
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def _close_at_exit(reference: weakref.ref[RewardPool]) -> None:
    pool = reference()
    if pool is not None:
        pool.close()
