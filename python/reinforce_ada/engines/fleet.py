"""Many replicas as one engine: least-loaded routing, and replicas that die, hang, answer garbage, leave and come back.

A `Replica` is an engine elsewhere (a server, an actor), which reports events through a mailbox; `Fleet` owns the requests. No failure of a
replica can lose one: its requests go to others with the same seed, and it samples again only after it has loaded the weights that are
current by then.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Protocol, TypeAlias

from reinforce_ada.engines.base import Engine, Placement, PrefixHits, check_prompt_length, garbage
from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.outside import one_line
from reinforce_ada.types import Completion, CompletionId, Request

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
MOST_DROPS = 20  # of one request in a row: otherwise a request that every replica refuses would be passed round for ever
_NUM_PLACEMENTS = 65536  # kept for a profile, which reads them at every poll

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Up:
    """The replica answers; which weights it has is unknown."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The replica has the weights of this policy version."""

    policy_version: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """The replica will not answer this request, but keeps working."""

    id: CompletionId
    reason: str


@dataclass(frozen=True, slots=True)
class Down:
    """The replica is gone, hangs or answers garbage, and all its requests are lost. It is not restarted for at least `pause_s`."""

    reason: str
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """The replica answers but cannot do what it is asked for; a restart does not help unless somebody changes its settings."""

    reason: str


News: TypeAlias = Up | Loaded | Dropped | Down | Refused | Completion


class Replica(Protocol):
    """One engine elsewhere. No call waits; its results are told to the mailbox, from any thread."""

    name: str
    num_slots: int

    def start(self, tell: Callable[[News], None]) -> None:
        """Start the replica, or reach it again after a Down: `Up` or `Down` follows. `tell` of an earlier start is not called any more."""

    def load(self, weights: Any, policy_version: int) -> None:
        """Load weights as the fleet's `publish` returned them: `Loaded` or `Down` follows. Nothing is in flight."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Start these requests: for each a `Completion` or `Dropped` follows, unless a `Down` does."""

    def abort(self, ids: Sequence[CompletionId]) -> None:
        """Stop these requests; their late answers are ignored."""

    def close(self) -> None:
        """Release all resources."""


class State(Enum):
    """The state of a replica."""

    starting = "starting"
    up = "up"  # without the current weights
    loading = "loading"
    ready = "ready"
    down = "down"


@dataclass(slots=True, eq=False)
class Member:
    """What the fleet knows about a replica."""

    replica: Replica
    state: State = State.down
    running: dict[CompletionId, Request] = field(default_factory=dict)
    num_starts: int = 0  # also the number of its mailbox: from messages of an earlier start only late completions are counted
    num_failures: int = 0  # since its last completion
    next_start: float = 0.0
    asked_version: int | None = None  # of the weights that it loads
    reason: str = ""

    @property
    def load(self) -> float:
        return len(self.running) / self.replica.num_slots

    @property
    def has_room(self) -> bool:
        return self.state is State.ready and len(self.running) < self.replica.num_slots

    @property
    def is_there(self) -> bool:
        """Return whether it is ready, or loads for the first time since its last answer: after a failure it may load, and fail, forever."""
        return self.state is State.ready or (self.state in (State.up, State.loading) and self.num_failures == 0)


@dataclass(slots=True)
class FleetCounts:
    """Counts since the fleet began."""

    restarts: int = 0
    moved: int = 0  # requests that went to another replica
    late: int = 0  # completions that nothing waited for any more
    tokens: int = 0
    sync_s: float = 0.0


class Fleet(Engine):
    """An engine made of replicas.

    Args:
        replicas: start immediately, and are used as they come up.
        publish: puts the weights where replicas find them, and returns what `Replica.load` takes.
        max_tokens: the most tokens of a completion.
        vocab_size: every token id must be below.
        max_model_len: the longest prompt + completion; None leaves the check of prompts to the replicas.
        policy_version: that of the weights which the replicas have from the start; None if they have none before a sync.
        wrong: says what is wrong with a completion, from (completion, policy version, max_tokens, vocab_size); "" if nothing is.
        give_up_s: raise EngineLost after this long without any replica, counted since the last answer of one.
        say: takes one line whenever a replica comes or goes; by default the log of this module does.
        clock, wait_s: monotonic seconds; how long `poll` waits for a message at most.
    """

    def __init__(
        self,
        replicas: Iterable[Replica],
        publish: Callable[[Iterable[tuple[str, Any]], int], Any],
        *,
        max_tokens: int,
        vocab_size: int,
        max_model_len: int | None = None,
        policy_version: int | None = None,
        wrong: Callable[[Completion, int | None, int, int], str] = garbage,
        give_up_s: float = 600.0,
        say: Callable[[str], None] = _log.info,
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = 0.05,
    ) -> None:
        self._publish, self._max_tokens, self._max_model_len, self._vocab_size = publish, max_tokens, max_model_len, vocab_size
        self._give_up_s, self._say, self._clock, self._wait_s = give_up_s, say, clock, wait_s
        self._mailbox: queue.SimpleQueue[tuple[Member, int, News]] = queue.SimpleQueue()
        self._waiting: deque[Request] = deque()
        self._droppers: dict[CompletionId, list[Member]] = {}  # replicas that dropped a request since it was last answered
        self._weights: Any = None
        self._version, self._wrong = policy_version, wrong
        self._lost_s = 0.0  # seconds without a replica, since the last answer
        self._lost_at: float | None = None  # when `_lost_s` was last increased; None while a replica can be used
        self.counts, self.hits = FleetCounts(), PrefixHits()
        self.members: list[Member] = []
        self.placements: deque[Placement] = deque(maxlen=_NUM_PLACEMENTS)
        for replica in replicas:
            self.add(replica)

    # -------------------- members

    def add(self, replica: Replica) -> None:
        """Add a replica; it is used once it is up and has the weights."""
        member = Member(replica)
        self.members.append(member)
        self._start(member)

    def remove(self, name: str) -> None:
        """Remove a replica; its requests go to others."""
        for member in [m for m in self.members if m.replica.name == name]:
            self.members.remove(member)
            self._take_back(member)
            self._close(member)

    # -------------------- Engine

    @property
    def free_slots(self) -> int:
        """Return the free slots of the ready replicas, or of all if none is ready, so that requests wait here; 1 if there are none."""
        if not self.members:
            return 0 if self._waiting else 1
        there = [m for m in self.members if m.state is State.ready] or self.members
        return max(0, sum(m.replica.num_slots - len(m.running) for m in there) - len(self._waiting))

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue these requests, and hand out as many as the replicas have room for.

        Raises: InputError for a prompt that leaves no room for max_tokens.
        """
        if self._max_model_len is not None:
            for request in requests:
                check_prompt_length("engine", request, self._max_tokens, self._max_model_len)
        self._waiting.extend(requests)
        self._give_out()

    def poll(self) -> list[Completion]:
        """Return finished completions; wait a little when there are none. Raises EngineLost after `give_up_s` without a replica."""
        finished = self._read(0.0)
        self._restart()
        self._give_out()
        if not finished:
            finished = self._read(self._wait_s)
            self._give_out()
        self._give_up()
        return finished

    def abort(self, ids: Sequence[CompletionId]) -> None:
        unwanted = set(ids)
        self._waiting = deque(r for r in self._waiting if r.id not in unwanted)
        for request_id in unwanted:
            self._droppers.pop(request_id, None)
        for member in self.members:
            if gone := [i for i in ids if member.running.pop(i, None) is not None]:
                self._call(member, partial(member.replica.abort, gone))

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Publish the weights and wait until every replica that is up has loaded them, at least one. Raises EngineLost as `poll` does."""
        if in_flight := len(self._waiting) + sum(len(m.running) for m in self.members):
            raise InputError("engine", f"sync_weights with {in_flight} requests in flight", "none")
        began = self._clock()
        self._lost_at = None  # time since the last step does not count: nothing was polled
        self._weights, self._version = self._publish(named_tensors, policy_version), policy_version
        for member in self.members:
            if member.state in (State.up, State.ready):
                self._load(member)
        while any(m.state is State.loading for m in self.members) or not any(m.state is State.ready for m in self.members):
            self._read(self._wait_s)
            self._restart()
            self._give_up()
        self.counts.sync_s += self._clock() - began

    def metrics(self) -> dict[str, float]:
        ready = [m for m in self.members if m.state is State.ready]
        return {
            "engine_replicas": float(len(ready)),
            "engine_slots": float(sum(m.replica.num_slots for m in ready)),
            "engine_busy_slots": float(sum(len(m.running) for m in self.members)),
            "engine_queue": float(len(self._waiting)),
            **{f"engine_{name}": float(count) for name, count in asdict(self.counts).items()},
            **self.hits.metrics(),
        }

    def close(self) -> None:
        for member in self.members:
            self._close(member)
        self.members = []
        self._waiting.clear()

    # -------------------- messages

    def _read(self, wait_s: float) -> list[Completion]:
        finished: list[Completion] = []
        try:
            while True:
                member, start, news = self._mailbox.get(timeout=wait_s) if wait_s > 0 else self._mailbox.get_nowait()
                wait_s = 0.0
                if start != member.num_starts:  # its requests of that start went to others
                    self.counts.late += isinstance(news, Completion)
                elif (completion := self._take(member, news)) is not None:
                    finished.append(completion)
        except queue.Empty:
            return finished

    def _take(self, member: Member, news: News) -> Completion | None:
        match news:
            case Up() if member.state is State.starting:
                member.state = State.up
                self._say(f"engine: {member.replica.name} is up")
                if self._version is not None:
                    self._load(member)
            case Up():  # it has restarted by itself, and has lost its weights and its requests
                self._fail(member, "came up a second time")
            case Loaded(policy_version) if member.state is not State.loading or policy_version != member.asked_version:
                self._reject(member, f"loaded policy version {policy_version} unasked")
            case Loaded(policy_version):
                if policy_version == self._version:
                    member.state = State.ready
                else:  # newer weights were published while it loaded
                    self._load(member)
            case Dropped(request_id, reason):
                if (request := member.running.pop(request_id, None)) is not None:
                    self._say(f"engine: {member.replica.name} dropped a request: {reason}")
                    self._dropped(member, request, reason)
            case Down(reason, pause_s):
                self._fail(member, reason, min(pause_s, LONGEST_BACKOFF_S))
            case Refused(reason):
                self._refused(member, reason)
            case Completion():
                return self._completed(member, news)
        return None

    def _completed(self, member: Member, completion: Completion) -> Completion | None:
        if completion.id not in member.running:
            self.counts.late += 1
        elif wrong := self._wrong(completion, self._version, self._max_tokens, self._vocab_size):
            self._reject(member, f"answered garbage: {wrong}")
        else:
            self.hits.add(member.running.pop(completion.id), completion)
            self._droppers.pop(completion.id, None)
            member.num_failures, self._lost_s = 0, 0.0  # only an answer shows that it works: it may come up and fail, forever
            self.counts.tokens += len(completion.token_ids)
            return completion
        return None

    def _refused(self, member: Member, reason: str) -> None:
        """Stop the run with this reason, unless it has had answers and another replica works; then retry this one after a minute."""
        if not self.counts.tokens or not any(m.is_there for m in self.members if m is not member):
            raise InputError("engine", f"{member.replica.name}: {reason}", "one that fits")
        self._reject(member, f"cannot be used: {reason}", LONGEST_BACKOFF_S)

    # -------------------- requests

    def _give_out(self) -> None:
        """Give each request to the replica with the smallest share of its slots taken, among those that dropped it least."""
        while given := self._assign():  # again if a replica did not take its requests
            for member, requests in given.items():
                self._call(member, partial(member.replica.submit, requests))

    def _assign(self) -> Mapping[Member, list[Request]]:
        given: defaultdict[Member, list[Request]] = defaultdict(list)
        stay: list[Request] = []
        while self._waiting and any(m.has_room for m in self.members):
            request = self._waiting.popleft()
            if free := self._takers(request):
                member = min(free, key=lambda m: m.load)
                member.running[request.id] = request
                self.placements.append(Placement(request.id, member.replica.name, self._clock()))
                given[member].append(request)
            else:
                stay.append(request)
        self._waiting.extendleft(reversed(stay))
        return given

    def _takers(self, request: Request) -> list[Member]:
        """Return the replicas with room among those that dropped it least. It waits for them rather than be dropped again."""
        ready = [m for m in self.members if m.state is State.ready]
        if droppers := self._droppers.get(request.id):
            least = min(map(droppers.count, ready))
            ready = [m for m in ready if droppers.count(m) == least]
        return [m for m in ready if m.has_room]

    def _dropped(self, member: Member, request: Request, reason: str) -> None:
        self._put_back([request])
        droppers = self._droppers.setdefault(request.id, [])
        droppers.append(member)
        if len(droppers) >= MOST_DROPS:
            raise EngineLost(f"engine: a request was dropped {MOST_DROPS} times (at last: {reason}); the run can be resumed")

    def _put_back(self, requests: Sequence[Request]) -> None:
        self.counts.moved += len(requests)
        self._waiting.extendleft(reversed(requests))

    def _take_back(self, member: Member) -> None:
        self._put_back(list(member.running.values()))
        member.running.clear()

    # -------------------- replicas

    def _start(self, member: Member) -> None:
        member.state = State.starting
        member.num_starts += 1
        start = member.num_starts
        self._call(member, partial(member.replica.start, lambda news: self._mailbox.put((member, start, news))))

    def _load(self, member: Member) -> None:
        assert self._version is not None
        member.state, member.asked_version = State.loading, self._version
        self._call(member, partial(member.replica.load, self._weights, self._version))

    def _call(self, member: Member, call: Callable[[], None]) -> None:
        """Call a replica, which is down if it raises; an InputError is passed on to the user."""
        try:
            call()
        except InputError:
            raise
        except Exception as error:
            self._fail(member, f"{type(error).__name__}: {one_line(str(error))}")

    def _close(self, member: Member) -> None:
        member.num_starts += 1  # anything that it still sends is ignored
        try:
            member.replica.close()
        except Exception as error:  # the others are closed all the same
            self._say(f"engine: {member.replica.name} did not close: {one_line(str(error))}")

    def _reject(self, member: Member, reason: str, least_pause_s: float = 0.0) -> None:
        """Mark a replica as down by the fleet's verdict. It does not know, so the requests that others get now are aborted there."""
        ids = list(member.running)
        self._fail(member, reason, least_pause_s)
        if ids:
            with suppress(Exception):  # it is down already
                member.replica.abort(ids)

    def _fail(self, member: Member, reason: str, least_pause_s: float = 0.0) -> None:
        self._take_back(member)
        pause = max(least_pause_s, min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2**member.num_failures))
        member.state, member.reason = State.down, reason
        member.num_starts += 1  # anything that it sends from now on is ignored
        member.num_failures += 1
        member.next_start = self._clock() + pause
        self._say(f"engine: {member.replica.name} is down: {reason}; again in {pause:.0f} s")

    def _restart(self) -> None:
        for member in self.members:
            if member.state is State.down and self._clock() >= member.next_start:
                self.counts.restarts += 1
                self._start(member)

    def _give_up(self) -> None:
        if any(m.is_there for m in self.members):
            self._lost_at = None
            return
        now = self._clock()
        if self._lost_at is not None:
            self._lost_s += now - self._lost_at
        elif not all(m.state is State.starting for m in self.members):  # not at the very beginning
            self._say(f"engine: no replica is there; waiting up to {self._give_up_s - self._lost_s:.0f} s")
        self._lost_at = now
        if self._lost_s > self._give_up_s:
            reasons = "; ".join(f"{m.replica.name}: {m.reason or m.state.value}" for m in self.members) or "there are none"
            raise EngineLost(f"engine: no replica for {self._give_up_s:.0f} s ({reasons}); the run can be resumed")
