"""RewardPool: rewards in worker processes, with time-outs, bounded retries and replacement of workers that hang or die."""

from __future__ import annotations

import atexit
import logging
import math
import pickle
import selectors
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.rewards.by_value import ByValue
from reinforce_ada.rewards.loading import check_reward
from reinforce_ada.rewards.names import FLAG, load_reward
from reinforce_ada.rewards.overlong import OverlongPenalty
from reinforce_ada.rewards.process import WorkerProcess, exit_text, has_main_file
from reinforce_ada.rewards.protocol import Reward
from reinforce_ada.rewards.worker import START_TIMEOUT_S, Score, Started, TimeLimits
from reinforce_ada.types import Completion, Failed, Prompt, Scored

_MAX_CHUNK = 16  # completions in one message: enough to keep a worker busy while a slow engine holds the driver
_SILENCE_S = 5.0  # the worker ends its own overdue calls; only a stopped process is silent for this much longer
_MAX_FAILED_STARTS = 3  # in a row, without one worker that loaded the reward
_MAX_IDLE_DEATHS = 3  # in a row, of workers that had not begun their chunk: no completion is to blame, unless it never ends
_FIRST_CALL = 10  # a worker's first call may take this many times the time-out: models and tables are often loaded there
_MAX_SLOW_STARTS = 2  # in a row; after so many first calls that exceeded even that, first calls get the normal limit
_MAX_PICKLES = 4096  # of prompts, kept for their next completions
_LONGEST_WAIT_S = 1e5  # an epoll takes no number of seconds past 2.1e6

_log = logging.getLogger(__name__)


@dataclass
class RewardCounters:
    """Counts since the pool was made: of completions, unless a field says that it counts attempts or workers."""

    num_scored: int = 0
    num_voids: int = 0
    num_timeouts: int = 0  # attempts
    num_retries: int = 0  # attempts after a first one
    num_workers_replaced: int = 0
    last_traceback: str = ""


@dataclass(eq=False, slots=True)
class _Job:
    """One completion that waits for its score."""

    completion: Completion
    prompt: bytes  # pickled; one object for all completions of a prompt, so that a message holds it once
    num_attempts: int = 0  # failed attempts
    has_timed_out: bool = False  # and the reward declares what it is then worth
    travels_alone: bool = False  # it was part of something that failed


@dataclass(eq=False)
class _Worker:
    process: WorkerProcess
    limits: TimeLimits
    is_loaded: bool = False
    has_scored: bool = False  # its first call is over
    chunk: deque[_Job] = field(default_factory=deque)  # sent and not yet answered, in order
    num_answered: int = 0  # of the chunk
    is_joint_call: bool = False  # the chunk is one call of a batch form, so no single completion is to blame
    silent_since: float = 0.0
    selected: int = selectors.EVENT_READ

    @property
    def is_idle(self) -> bool:
        return self.is_loaded and not self.chunk

    @property
    def limit_s(self) -> float:
        """Return the time limit of the worker's current activity."""
        if not self.is_loaded:
            return START_TIMEOUT_S
        return self.limits.call_s if self.has_scored else self.limits.first_call_s

    @property
    def silent_until(self) -> float:
        """Return when a silent worker counts as stopped."""
        return math.inf if self.is_idle else self.silent_since + self.limit_s * 1.1 + _SILENCE_S


class RewardPool:
    """A RewardRunner that scores completions in `num_workers` processes of its own.

    Every submitted completion yields exactly one event: Scored with a finite reward, or, after `1 + retries` failed attempts, Failed with
    the reason. An attempt fails when the reward raises, returns anything but a finite number, exceeds its time limit, or ends its worker.
    Such a worker is replaced. Workers start at the first `submit` and load while the caller continues; no method waits for a worker that
    does not read or answer.

    Args:
        reward: (prompt, completion text) -> float; a callable, which travels with its code where a worker cannot import it (a lambda, a
            function of a notebook; see `ByValue`); or what `--reward` takes: a name such as "number",
            "module:function" or "file.py:function", several with weights (see `names.parts_of`). With a `batch` method,
            one call scores a chunk of up to 16 completions; a chunk that fails is tried again one completion at a time, and the failed
            chunk counts as an attempt of none of them.
        timeout_s: seconds for one call, measured in the worker from the call's start; ten times as many for a worker's first call, unless
            the reward has a `prepare` method. A reward with a `timed_out` method says itself what a call that exceeds its limit is worth
            (see `Reward`).
        retries: further attempts for a completion whose attempt failed.
        penalty: is added to every reward; None adds nothing.
        run_code: allow the name "python", a reward that runs what the model wrote.
        imports_main: workers import the script of this process first, as those of multiprocessing do; a reward or a prompt that needs
            nothing of it can do without, and the script then needs no `if __name__ == "__main__":`.

    Raises: InputError when the reward cannot be called like this, imported or pickled, or a setting is out of range; from `poll` when no
        worker can load the reward.
    """

    def __init__(
        self, reward: Reward | str, *, num_workers: int = 2, timeout_s: float = 10.0, retries: int = 2,
        penalty: OverlongPenalty | None = None, run_code: bool = False, imports_main: bool = True,
    ) -> None:  # fmt: skip
        _check_settings(num_workers, timeout_s, retries)
        function = load_reward(reward, run_code=run_code) if isinstance(reward, str) else reward  # here, so that a typo costs no process
        if not isinstance(reward, str):
            check_reward(reward, repr(reward))
        self._reward = reward if isinstance(reward, str) else _pickled(reward, imports_main)
        self._has_batch_form = hasattr(function, "batch")
        self._has_late_form = getattr(function, "timed_out", None) is not None
        self._first_call = 1 if getattr(function, "prepare", None) is not None else _FIRST_CALL
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._retries = retries
        self._penalty = penalty
        self._imports_main = imports_main
        self._queue: deque[_Job] = deque()
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._events: list[Scored | Failed] = []
        self._failed_starts = 0
        self._slow_starts = 0
        self._idle_deaths = 0
        self._is_closed = False
        self._pickles: dict[int, tuple[Prompt, bytes]] = {}  # by the prompt's id(), which no other object gets while it is here
        self.counters = RewardCounters()
        atexit.register(_close_at_exit, weakref.ref(self))

    def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        """Start scoring. Raises InputError when a prompt cannot be pickled."""
        self._check_open()
        self._queue += [_Job(c, self._pickled(p)) for p, c in zip(prompts, completions, strict=True)]
        self._dispatch()

    def poll(self, wait_s: float = 0.0) -> list[Scored | Failed]:
        self._check_open()
        deadline = time.monotonic() + wait_s
        self._advance(0.0)
        while not self._events and self.num_pending and time.monotonic() < deadline:
            self._advance(deadline - time.monotonic())
        events, self._events = self._events, []
        return events

    @property
    def num_pending(self) -> int:
        """Return the number of submitted completions whose event has not been returned yet."""
        return len(self._queue) + sum(len(w.chunk) for w in self._workers) + len(self._events)

    @property
    def last_traceback(self) -> str:
        """Return the traceback of the attempt that failed last, or ""."""
        return self.counters.last_traceback

    def close(self) -> None:
        """Stop the workers, even if they hang, and all processes they started. Unscored completions yield no event. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._selector.close()
        for worker in self._workers:
            worker.process.channel.close()  # an idle worker leaves by itself
        leave_until = time.monotonic() + 1.0
        for worker in self._workers:
            if worker.is_idle:
                worker.process.wait(leave_until - time.monotonic())
            worker.process.end()
        self._workers.clear()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "counters"):  # a constructor that raised has nothing to close
            self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise InputError("RewardPool", "it is closed", "an open pool is needed")

    # -------------------- messages from workers

    def _advance(self, wait_s: float) -> None:
        """Read the workers' messages, end silent workers, and hand out completions."""
        next_silence = min((w.silent_until for w in self._workers), default=math.inf)
        for key, mask in self._selector.select(max(0.0, min(wait_s, next_silence - time.monotonic(), _LONGEST_WAIT_S))):
            self._serve(key.data, mask)
        now = time.monotonic()
        for worker in [w for w in self._workers if w.silent_until < now]:
            self._replace(worker, is_timeout=True)
        self._dispatch()

    def _serve(self, worker: _Worker, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE and worker.process.channel.flush():
                worker.silent_since = time.monotonic()  # it reads
            if mask & selectors.EVENT_READ:
                for message in worker.process.channel.receive():
                    self._take(worker, message)
            self._select(worker)
        except (EOFError, OSError):
            self._replace(worker)

    def _select(self, worker: _Worker) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.process.channel.has_unsent else 0)
        if wanted != worker.selected and worker in self._workers:
            worker.selected = wanted
            self._selector.modify(worker.process.channel, wanted, worker)

    def _take(self, worker: _Worker, message: Started | list[Score]) -> None:
        worker.silent_since = time.monotonic()
        if isinstance(message, Started):
            if message.failure:
                self._give_up(message.failure, message.traceback, message.hint)
            worker.is_loaded = True
            self._failed_starts = 0
            return
        worker.has_scored = True
        self._slow_starts = self._idle_deaths = 0
        for score in message:
            if not worker.chunk:
                raise EOFError("more answers than questions: something else has written them")
            job = worker.chunk.popleft()
            worker.num_answered += 1
            if score.reward is None:
                self._attempt_failed(job, worker, score.failure, score.traceback)
            else:
                self.counters.num_scored += 1
                penalty = self._penalty(job.completion) if self._penalty is not None else 0.0
                self._events.append(Scored(job.completion, score.reward + penalty if penalty else score.reward))

    def _replace(self, worker: _Worker, *, is_timeout: bool = False) -> None:
        """Remove a worker that died or fell silent. The completion in its call has failed; the rest of its chunk is queued again."""
        self._workers.remove(worker)
        self._selector.unregister(worker.process.channel)
        if not is_timeout:
            worker.process.wait(1.0)  # let it finish writing and dying
        progress = worker.process.progress
        exit_code, hang = worker.process.end()
        self.counters.num_workers_replaced += 1
        if not worker.is_loaded:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._give_up(f"{self._failed_starts} workers in a row died of {exit_text(exit_code)} before they had it", hang)
        jobs = list(worker.chunk)
        if jobs and progress < 0 and not (is_timeout or hang) and self._idle_deaths < _MAX_IDLE_DEATHS:
            self._idle_deaths += 1
            self._queue.extendleft(reversed(jobs))
            return
        at = max(0, min(progress - worker.num_answered, len(jobs) - 1))
        failed = jobs if worker.is_joint_call else jobs[at : at + 1]
        self._queue.extendleft(reversed([job for job in jobs if job not in failed]))
        if failed:
            self._call_failed(worker, failed, f"the worker died of {exit_text(exit_code)}", hang, is_timeout or bool(hang))

    def _call_failed(self, worker: _Worker, jobs: Sequence[_Job], reason: str, hang: str, is_timeout: bool) -> None:
        if is_timeout:
            reason = f"timed out after {worker.limit_s:g} s"
            self.counters.num_timeouts += 1
            self._slow_starts += not worker.has_scored
            if self._has_late_form and not (worker.is_joint_call or jobs[0].has_timed_out):
                jobs[0].has_timed_out = jobs[0].travels_alone = True
                self._queue.append(jobs[0])
                return
        for job in jobs:
            self._attempt_failed(job, worker, reason, hang)

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
        where, reward = (FLAG, f"reward {self._reward!r}") if isinstance(self._reward, str) else ("reward", "it")
        raise InputError(where, f"a worker cannot load {reward} ({failure})", "one that a fresh process can load", hint)

    # -------------------- messages to workers

    def _dispatch(self) -> None:
        if not self._queue:
            return
        for worker in [w for w in self._workers if w.is_idle]:
            if self._queue:
                self._send(worker, self._next_chunk())
        num_coming = sum(not w.is_loaded for w in self._workers)
        for _ in range(min(self._num_workers - len(self._workers), len(self._queue) - num_coming)):
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        is_patient = self._slow_starts < _MAX_SLOW_STARTS
        limits = TimeLimits(self._timeout_s, self._timeout_s * self._first_call if is_patient else self._timeout_s)
        worker = _Worker(WorkerProcess(self._reward, limits, imports_main=self._imports_main), limits, silent_since=time.monotonic())
        self._selector.register(worker.process.channel, selectors.EVENT_READ, worker)
        self._select(worker)
        return worker

    def _pickled(self, prompt: Prompt) -> bytes:
        known = self._pickles.get(id(prompt))
        if known is None:
            if len(self._pickles) >= _MAX_PICKLES:
                self._pickles.clear()
            try:
                known = prompt, pickle.dumps(prompt, protocol=5)
            except Exception as error:  # PicklingError, AttributeError or TypeError, depending on the data
                given = f"prompt {prompt.prompt_id!r} does not pickle ({error})"
                raise InputError("RewardPool", given, "Prompt.data must pickle") from error
            self._pickles[id(prompt)] = known
        return known[1]

    def _next_chunk(self) -> list[_Job]:
        """Return a fair share of the queue. A completion that failed before travels alone, so that it cannot affect others."""
        size = min(_MAX_CHUNK, math.ceil(len(self._queue) / self._num_workers))
        chunk = [self._queue.popleft()]
        while len(chunk) < size and not chunk[0].travels_alone and not self._queue[0].travels_alone:
            chunk.append(self._queue.popleft())
        return chunk

    def _send(self, worker: _Worker, chunk: list[_Job]) -> None:
        try:
            worker.process.send_chunk([(job.prompt, job.completion.text, job.has_timed_out) for job in chunk])
        except OSError:  # it died while idle, which no completion caused: the next read of its channel finds the end of file
            self._queue.extendleft(reversed(chunk))
            return
        worker.chunk.extend(chunk)
        worker.num_answered = 0
        worker.is_joint_call = self._has_batch_form and len(chunk) > 1
        worker.silent_since = time.monotonic()
        self._select(worker)


def _check_settings(num_workers: int, timeout_s: float, retries: int) -> None:
    if num_workers < 1:
        raise InputError("RewardPool", f"num_workers={num_workers}", "at least 1 is needed")
    if not 0 < timeout_s < math.inf:
        raise InputError("RewardPool", f"timeout_s={timeout_s}", "a positive number of seconds is needed")
    if retries < 0:
        raise InputError("RewardPool", f"retries={retries}", "0 or more is needed")


def _pickled(reward: Reward, imports_main: bool) -> bytes:
    """Return the pickle of a reward: by name where a worker can import it, otherwise with its code."""
    if not isinstance(reward, ByValue):
        with suppress(Exception):  # whatever its contents raise, a lambda does; its code may travel all the same
            named = pickle.dumps(reward)
            if b"__main__" not in named or (imports_main and has_main_file()):
                return named
        reward = ByValue(reward)
    try:
        return pickle.dumps(reward)
    except Exception as error:
        hint = "make what cannot travel, such as an open file or a lock, inside the function"
        given = f"{reward!r} does not pickle ({one_line(str(error), 200)})"
        raise InputError("reward", given, "workers need a pickle", hint) from error


def _close_at_exit(reference: weakref.ref[RewardPool]) -> None:
    pool = reference()
    if pool is not None:
        pool.close()
