"""Replicas that do as they are told, on a virtual clock: `World` lets time pass and disasters happen whenever the fleet reads its mail."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reinforce_ada.engines.fleet import Down, Dropped, Fleet, Loaded, News, Refused, Up
from reinforce_ada.types import Completion, CompletionId, Request

MAX_TOKENS, VOCAB_SIZE = 8, 1000
DISASTERS = (
    *("kill", "refuse", "unfit", "hang", "drop", "late", "twice", "nothing"),
    *("nan", "no policy", "too long", "positive", "unequal", "empty", "abort", "no word"),
)


def text_of(seed: int, version: int) -> str:
    """What a request with this seed is answered by weights of this version."""
    return "+" if random.Random(f"{seed} {version}").random() < 0.3 else "-"


def answer(request: Request, version: int) -> Completion:
    ids = np.array([request.seed % 251, version], np.int32)
    return Completion(request.id, ids, np.full(2, -0.5, np.float32), text_of(request.seed, version), "stop", version)


def spoilt(disaster: str, c: Completion) -> Completion:
    """The garbage of that name."""
    n = len(c.token_ids)
    tokens, logprobs, finish, version = {
        "nan": (c.token_ids, np.full(n, np.nan), "stop", c.policy_version),
        "no policy": (c.token_ids, c.rollout_logprobs, "stop", c.policy_version - 1),
        "too long": (np.ones(MAX_TOKENS + 1), -np.ones(MAX_TOKENS + 1), "length", c.policy_version),
        "positive": (c.token_ids, np.full(n, 0.5), "stop", c.policy_version),
        "unequal": (c.token_ids, c.rollout_logprobs[1:], "stop", c.policy_version),
        "empty": (c.token_ids[:0], c.rollout_logprobs[:0], "stop", c.policy_version),
        "no word": (c.token_ids + VOCAB_SIZE, c.rollout_logprobs, "stop", c.policy_version),
        "abort": (c.token_ids, c.rollout_logprobs, "abort", c.policy_version),
    }[disaster]
    return Completion(c.id, tokens.astype(np.int32), logprobs.astype(np.float32), c.text, finish, version)


class ScriptedReplica:
    """Answers its oldest request at each tick. It fails the test when it is asked for what it must not be asked for."""

    def __init__(self, name: str, num_slots: int = 4, *, auto: bool = True) -> None:
        self.name, self.num_slots, self.auto = name, num_slots, auto
        self.tell: Callable[[News], None] = lambda news: None
        self.running: dict[CompletionId, Request] = {}
        self.version: int | None = None
        self.alive, self.closed = False, False
        self.num_refusals = self.hung_ticks = 0
        self.starts: list[float] = []
        self.loads: list[tuple[Any, int]] = []
        self.submitted: list[list[Request]] = []
        self.aborted: list[CompletionId] = []
        self.pending: list[News] = []
        self.clock: Callable[[], float] = lambda: 0.0

    # -------------------- Replica

    def start(self, tell: Callable[[News], None]) -> None:
        self.starts.append(self.clock())
        self.tell, self.version, self.alive, self.hung_ticks = tell, None, True, 0
        self.running.clear()
        self.pending = []
        if self.num_refusals:
            self.num_refusals -= 1
            self.fail("refused")
        else:
            self.say(Up())

    def load(self, weights: Any, policy_version: int) -> None:
        assert self.alive
        assert not self.running
        self.loads.append((weights, policy_version))
        self.version = policy_version
        self.say(Loaded(policy_version))

    def submit(self, requests: Sequence[Request]) -> None:
        self.submitted.append(list(requests))
        for r in requests:
            assert r.policy_version == self.version, "asked before it has the weights"
            assert r.id not in self.running
            self.running[r.id] = r
        assert len(self.running) <= self.num_slots

    def abort(self, ids: Sequence[CompletionId]) -> None:
        for i in ids:
            self.running.pop(i, None)
        self.aborted += ids

    def close(self) -> None:
        self.closed = True

    # -------------------- what happens

    def say(self, news: News) -> None:
        """At the next tick, or at once without `auto`."""
        if self.auto:
            self.pending.append(news)
        else:
            self.tell(news)

    def fail(self, reason: str) -> None:
        self.alive = False
        self.tell(Down(reason))

    def finish(self, request_id: CompletionId) -> None:
        request = self.running.pop(request_id)
        self.tell(answer(request, request.policy_version))

    def tick(self) -> None:
        if not self.alive:
            return
        if self.hung_ticks:
            self.hung_ticks -= 1
            if not self.hung_ticks:
                self.fail("no token for 2 s")
            return
        news, self.pending = self.pending, []
        for each in news:
            self.tell(each)
        if self.running:
            self.finish(next(iter(self.running)))

    def suffer(self, disaster: str) -> None:
        """Whatever it may still say afterwards it says to the mailbox of that start."""
        tell, oldest = self.tell, next(iter(self.running.values()), None)
        if disaster == "kill":
            self.fail("connection refused")
        elif disaster == "refuse":
            self.num_refusals = 2
            self.fail("connection refused")
        elif disaster == "unfit":
            self.tell(Refused("another model"))
        elif disaster == "hang":
            self.hung_ticks = 4
        elif disaster == "late" and oldest is not None:
            self.fail("connection reset")
            tell(answer(oldest, oldest.policy_version))
        elif oldest is None or disaster == "nothing":
            return
        elif disaster == "drop":
            del self.running[oldest.id]
            tell(Dropped(oldest.id, "no room"))
        elif disaster == "twice":
            self.finish(oldest.id)
            tell(answer(oldest, oldest.policy_version))
        elif self.alive:
            del self.running[oldest.id]
            tell(spoilt(disaster, answer(oldest, oldest.policy_version)))


class World:
    """Half a second passes at each reading of mail; then the next disaster of the list happens, and every replica does its work."""

    def __init__(self, replicas: Sequence[ScriptedReplica], disasters: Sequence[tuple[int, str]] = ()) -> None:
        self.replicas, self.disasters, self.now = list(replicas), list(disasters), 0.0
        self.may_refuse: Callable[[ScriptedReplica], bool] = lambda victim: False  # or the run would end
        for replica in replicas:
            replica.clock = lambda: self.now

    def step(self) -> None:
        self.now += 0.5
        if self.disasters:
            which, disaster = self.disasters.pop(0)
            victim = self.replicas[which % len(self.replicas)]
            if victim.alive and not victim.hung_ticks:
                victim.suffer("kill" if disaster == "unfit" and not self.may_refuse(victim) else disaster)
        for replica in self.replicas:
            if replica.auto:
                replica.tick()


class WatchedFleet(Fleet):
    """A fleet in a `World`; nothing waits for real time."""

    def __init__(self, world: World, **options: Any) -> None:
        self.world = world
        world.may_refuse = lambda victim: self.counts.tokens > 0 and any(m.is_there for m in self.members if m.replica is not victim)
        self.said: list[str] = []
        self.published: list[tuple[list[str], int]] = []
        super().__init__(
            world.replicas,
            self.publish,
            max_tokens=MAX_TOKENS,
            vocab_size=VOCAB_SIZE,
            say=self.said.append,
            clock=lambda: world.now,
            wait_s=0.0,
            **options,
        )

    def publish(self, named_tensors: Any, version: int) -> str:
        self.published.append(([name for name, _ in named_tensors], version))
        return f"weights {version}"

    def _read(self, wait_s: float) -> list[Completion]:
        self.world.step()
        return super()._read(0.0)
