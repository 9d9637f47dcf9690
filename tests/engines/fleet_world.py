"""A `Fleet` of replicas that do what a test says, when it says so, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reinforce_ada.engines.fleet import Fleet, Loaded, News, Up
from reinforce_ada.types import Completion, CompletionId, Prompt, Request

MAX_TOKENS, VOCAB_SIZE = 6, 100


def answer(request: Request, version: int) -> Completion:
    """The same for the same seed."""
    rng = np.random.default_rng(request.seed)
    tokens = rng.integers(0, 100, int(rng.integers(1, MAX_TOKENS + 1)))
    return Completion(request.id, tokens, -rng.random(len(tokens)), " ".join(map(str, tokens)), "stop", version)


class Scripted:
    """A replica that does what the test says, when it says so."""

    def __init__(self, name: str, num_slots: int = 2) -> None:
        self.name, self.num_slots = name, num_slots
        self.running: dict[CompletionId, Request] = {}
        self.loaded: list[tuple[Any, int]] = []
        self.num_starts = 0
        self.closed = False

    def start(self, tell: Callable[[News], None]) -> None:
        self.tell, self.running = tell, {}
        self.num_starts += 1

    def load(self, weights: Any, policy_version: int) -> None:
        self.loaded.append((weights, policy_version))

    def submit(self, requests: Sequence[Request]) -> None:
        assert self.loaded
        assert len(self.running) + len(requests) <= self.num_slots
        self.running.update((r.id, r) for r in requests)

    def abort(self, ids: Sequence[CompletionId]) -> None:
        for i in ids:
            self.running.pop(i, None)  # it may have finished, and nobody has read that yet

    def close(self) -> None:
        self.closed = True

    # -------------------- by the test

    def come(self) -> None:
        """Up, and loaded as soon as it is asked to."""
        self.tell(Up())

    def finish(self, which: int = 0) -> None:
        request = self.running.pop(list(self.running)[which])
        self.tell(answer(request, self.loaded[-1][1]))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fleet_of(*replicas: Scripted, said: list[str] | None = None, **options: Any) -> tuple[Fleet, Clock]:
    clock = Clock()
    options = {"max_tokens": MAX_TOKENS, "vocab_size": VOCAB_SIZE, "wait_s": 0.0, "clock": clock, **options}
    fleet = Fleet(
        replicas, lambda tensors, version: f"weights {version} of {list(tensors)}", say=([] if said is None else said).append, **options
    )
    return fleet, clock


def ready(*replicas: Scripted, version: int = 1, **options: Any) -> tuple[Fleet, Clock]:
    """All of them, with the weights of `version`."""
    fleet, clock = fleet_of(*replicas, **options)
    for replica in replicas:
        replica.come()
        load = replica.load

        def loading(weights: Any, policy_version: int, replica: Scripted = replica, load: Any = load) -> None:
            load(weights, policy_version)
            replica.tell(Loaded(policy_version))

        replica.load = loading  # type: ignore[method-assign]
    fleet.sync_weights([], version)
    return fleet, clock


def requests(count: int, version: int = 1) -> list[Request]:
    return [Request(CompletionId(1, "p", k), Prompt("p", (1,)), 100 + k, version) for k in range(count)]


def states(fleet: Fleet) -> list[str]:
    return [m.state.value for m in fleet.members]
