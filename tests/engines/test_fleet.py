"""`Fleet` with scripted replicas and a virtual clock: who gets what, who is taken for dead, and that nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine_scenes import refusal

from reinforce_ada.engines.fleet import Down, Dropped, Fleet, Loaded, News, Refused, Up
from reinforce_ada.errors import EngineLost
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


# -------------------- who gets what


def test_the_least_loaded_gets_the_next() -> None:
    a, b = Scripted("a", 4), Scripted("b", 2)
    fleet, _ = ready(a, b)
    assert fleet.free_slots == 6
    fleet.submit(requests(5))
    assert [r.index for r in a.running] == [0, 2, 3]
    assert [r.index for r in b.running] == [1, 4]
    assert fleet.free_slots == 1


def test_what_has_no_place_waits_in_order() -> None:
    a = Scripted("a", 2)
    fleet, _ = ready(a)
    fleet.submit(requests(4))
    assert (len(a.running), fleet.free_slots) == (2, 0)
    a.finish(0)
    assert [c.id.index for c in fleet.poll()] == [0]
    assert [r.index for r in a.running] == [1, 2]


def test_abort_reaches_running_and_waiting_ones() -> None:
    a = Scripted("a", 2)
    fleet, _ = ready(a)
    asked = requests(4)
    fleet.submit(asked)
    fleet.abort([asked[1].id, asked[3].id, CompletionId(9, "other", 0)])
    assert [r.index for r in a.running] == [0]
    fleet.poll()
    assert [r.index for r in a.running] == [0, 2]


# -------------------- who goes


def test_what_a_lost_replica_had_goes_to_the_others_in_order() -> None:
    a, b, said = Scripted("a", 3), Scripted("b", 4), []
    fleet, _ = ready(a, b, said=said)
    fleet.submit(requests(5))
    lost = list(a.running.values())
    a.tell(Down("killed"))
    fleet.poll()
    moved = [r for r in b.running.values() if r in lost]
    assert [r.seed for r in moved] == [r.seed for r in lost][: len(moved)]
    assert fleet.counts.moved == len(lost)
    done = []
    while b.running:
        b.finish()
        done += fleet.poll()
    assert sorted(c.id.index for c in done) == list(range(5))


def test_back_off_doubles_until_a_completion_comes() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, clock = ready(a, b)
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        a.tell(Down("crashes"))
        fleet.poll()
        starts = a.num_starts
        clock.now += pause - 0.01
        fleet.poll()
        assert a.num_starts == starts
        clock.now += 0.02
        fleet.poll()
        assert a.num_starts == starts + 1
        a.come()
        fleet.poll()
    fleet.submit(requests(2))
    a.finish()
    fleet.poll()
    a.tell(Down("crashes"))
    fleet.poll()
    clock.now += 1.01
    assert a.num_starts == starts + 1
    fleet.poll()
    assert a.num_starts == starts + 2


def test_who_comes_back_loads_the_weights_of_now_before_it_samples() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, clock = ready(a, b)
    a.tell(Down("killed"))
    fleet.poll()
    fleet.sync_weights(["new"], 2)
    assert b.loaded[-1] == ("weights 2 of ['new']", 2)
    clock.now += 1.5
    fleet.poll()
    a.load = lambda weights, version: a.loaded.append((weights, version))  # type: ignore[method-assign]
    a.come()
    fleet.submit(requests(4, version=2))
    fleet.poll()
    assert states(fleet) == ["loading", "ready"]
    assert not a.running
    a.tell(Loaded(2))
    fleet.poll()
    assert a.loaded[-1] == ("weights 2 of ['new']", 2)
    assert len(a.running) == 2


def test_what_is_loaded_too_late_is_loaded_again() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, clock = ready(a, b)
    a.tell(Down("killed"))
    fleet.poll()
    clock.now += 1.5
    fleet.poll()
    a.load = lambda weights, version: a.loaded.append((weights, version))  # type: ignore[method-assign]
    a.come()
    fleet.poll()
    b.load = lambda weights, version: (b.tell(Loaded(version)), a.tell(Loaded(1)), a.tell(Loaded(version)))  # type: ignore[method-assign]
    fleet.sync_weights([], 2)
    assert [version for _, version in a.loaded[-2:]] == [1, 2]
    assert states(fleet) == ["ready", "ready"]


def test_what_is_dropped_goes_on_elsewhere() -> None:
    a, b = Scripted("a", 1), Scripted("b", 1)
    fleet, _ = ready(a, b)
    fleet.submit(requests(1))
    (request,) = a.running
    a.running.clear()
    a.tell(Dropped(request, "no memory"))
    fleet.poll()
    assert list(b.running) == [request]  # although a comes first and has as much room
    assert not a.running
    assert states(fleet) == ["ready", "ready"]


def test_what_everyone_drops_ends_it() -> None:
    a, b = Scripted("a", 1), Scripted("b", 1)
    fleet, _ = ready(a, b)
    fleet.submit(requests(1))
    held = []

    def drop() -> None:
        (replica,) = (r for r in (a, b) if r.running)
        held.append(replica.name)
        (request,) = replica.running
        replica.running.clear()
        replica.tell(Dropped(request, "too long a prompt"))
        fleet.poll()

    for _ in range(19):
        drop()
    with pytest.raises(EngineLost, match=r"a request was dropped 20 times \(at last: too long a prompt\); the run can be resumed"):
        drop()
    assert held == ["a", "b"] * 10


def test_who_drops_everything_does_not_end_a_run_that_another_can_do() -> None:
    a, b = Scripted("a", 4), Scripted("b", 1)
    fleet, _ = ready(a, b)
    fleet.submit(requests(5))
    done = []
    for _ in range(100):
        for request_id in list(a.running):
            a.running.clear()
            a.tell(Dropped(request_id, "no"))
        done += fleet.poll()
        if b.running:
            b.finish()
        done += fleet.poll()
    assert sorted(c.id.index for c in done) == [0, 1, 2, 3, 4]
    assert states(fleet) == ["ready", "ready"]


def test_who_asks_for_a_pause_gets_it_within_bounds() -> None:
    for asked, pause in ((0.0, 1), (7.0, 7), (1e9, 60)):
        a, b = Scripted("a"), Scripted("b")
        fleet, clock = ready(a, b)
        a.tell(Down("busy", asked))
        fleet.poll()
        clock.now += pause - 0.01
        fleet.poll()
        assert a.num_starts == 1
        clock.now += 0.02
        fleet.poll()
        assert a.num_starts == 2


def test_late_answers_and_old_news_are_not_heard() -> None:
    a, b = Scripted("a", 1), Scripted("b", 1)
    fleet, clock = ready(a, b)
    asked = requests(2)
    fleet.submit(asked)
    old_tell = a.tell
    a.tell(Down("hangs"))
    fleet.poll()
    old_tell(answer(asked[0], 1))  # of the start before
    clock.now += 1.5
    fleet.poll()
    a.come()
    fleet.poll()
    b.finish()
    b.tell(answer(asked[1], 1))  # again
    assert [c.id.index for c in fleet.poll()] == [1]
    assert fleet.counts.late == 2  # of the start before, and the second of one request
    old_tell(Down("of no interest"))
    fleet.poll()
    assert states(fleet) == ["ready", "ready"]
    a.finish()
    assert [c.id.index for c in fleet.poll()] == [0]


GARBAGE: dict[str, dict[str, Any]] = {
    "an old version": {"policy_version": 0},
    "no tokens": {"token_ids": [], "rollout_logprobs": []},
    "too many": {"token_ids": [1] * 7, "rollout_logprobs": [-1.0] * 7},
    "other lengths": {"token_ids": [1, 2], "rollout_logprobs": [-1.0]},
    "not a number": {"token_ids": [1], "rollout_logprobs": [float("nan")]},
    "above 0": {"token_ids": [1], "rollout_logprobs": [0.5]},
    "far below 0": {"token_ids": [1], "rollout_logprobs": [-3.2e38]},
    "no id": {"token_ids": [-5], "rollout_logprobs": [-1.0]},
    "past the vocabulary": {"token_ids": [1, VOCAB_SIZE], "rollout_logprobs": [-1.0, -1.0]},
    "a strange end": {"finish_reason": "error"},
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_takes_a_replica_down(what: str) -> None:
    a, b = Scripted("a", 1), Scripted("b", 1)
    fleet, _ = ready(a, b)
    fleet.submit(requests(2))
    (request,) = a.running.values()
    fine = {"token_ids": [1, 2], "rollout_logprobs": [-1.0, -2.0], "text": "", "finish_reason": "stop", "policy_version": 1}
    a.tell(Completion(id=request.id, **{**fine, **GARBAGE[what]}))
    assert fleet.poll() == []
    assert states(fleet) == ["down", "ready"]
    b.finish()
    fleet.poll()
    assert list(b.running) == [request.id]


# -------------------- all gone


def test_without_a_replica_it_says_so_once_and_goes_on_when_one_is_back() -> None:
    a, said = Scripted("a"), []
    fleet, clock = ready(a, said=said, give_up_s=100)
    fleet.submit(requests(2))
    a.tell(Down("killed"))
    for _ in range(5):
        assert fleet.poll() == []
    assert fleet.free_slots == 0  # of two places, both asked for
    assert sum("no replica is there; waiting up to 100 s" in line for line in said) == 1
    clock.now += 50
    fleet.poll()
    a.come()
    fleet.poll()
    assert len(a.running) == 2
    a.finish()
    assert len(fleet.poll()) == 1


def test_it_gives_up_in_one_line() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, clock = ready(a, b, give_up_s=100)
    for replica in (a, b):
        replica.tell(Down("power"))
    fleet.poll()
    clock.now += 101
    with pytest.raises(EngineLost, match=r"no replica for 100 s .*power.* can be resumed") as raised:
        fleet.poll()
    assert "\n" not in str(raised.value)


def test_who_hangs_while_it_loads_again_is_not_there() -> None:
    a = Scripted("a")
    fleet, clock = ready(a, give_up_s=100)
    a.load = lambda weights, version: None  # type: ignore[method-assign]
    a.tell(Down("killed"))
    fleet.poll()
    clock.now += 10
    fleet.poll()
    a.come()
    for _ in range(3):
        fleet.poll()
        clock.now += 29
    assert states(fleet) == ["loading"]
    clock.now += 10
    with pytest.raises(EngineLost, match=r"no replica for 100 s \(a: killed\)"):
        fleet.poll()


def test_who_loads_and_has_not_failed_is_there() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, clock = ready(a, give_up_s=100)
    fleet.add(b)
    b.come()
    fleet.remove("a")
    for _ in range(3):
        fleet.poll()
        clock.now += 60
    assert states(fleet) == ["loading"]


def test_a_refusal_before_the_first_answer_ends_it() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, _ = ready(a, b)
    a.tell(Refused("another model"))
    assert refusal(fleet.poll) == "engine: a: another model; one that fits"


def test_a_run_that_has_had_answers_goes_on_with_the_others() -> None:
    """Who refuses is asked again after the longest pause, and is as good as any other when it has been mended."""
    a, b = Scripted("a"), Scripted("b")
    said: list[str] = []
    fleet, clock = ready(a, b, said=said)
    fleet.submit(requests(4))
    b.finish()
    fleet.poll()
    asked = list(a.running)
    a.tell(Refused("another model"))
    fleet.poll()
    assert states(fleet) == ["down", "ready"]
    assert not a.running  # told to let go of them
    assert said[-1] == "engine: a is down: cannot be used: another model; again in 60 s"
    assert fleet.metrics()["engine_moved"] == len(asked) == 2
    clock.now += 59
    fleet.poll()
    assert states(fleet) == ["down", "ready"]
    clock.now += 1
    fleet.poll()
    a.come()
    fleet.poll()
    assert states(fleet) == ["ready", "ready"]


def test_a_refusal_by_the_last_one_ends_it() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, _ = ready(a, b)
    fleet.submit(requests(2))
    b.finish()
    fleet.poll()
    b.tell(Down("killed"))
    fleet.poll()
    a.tell(Refused("another model"))
    assert refusal(fleet.poll) == "engine: a: another model; one that fits"


# -------------------- who joins and leaves, weights


def test_replicas_join_and_leave() -> None:
    a, b = Scripted("a", 1), Scripted("b", 2)
    fleet, _ = ready(a)
    fleet.submit(requests(3))
    fleet.add(b)
    b.come()
    fleet.poll()
    assert states(fleet) == ["ready", "loading"]
    b.tell(Loaded(1))
    fleet.poll()
    assert [r.index for r in b.running] == [1, 2]
    fleet.remove("a")
    assert a.closed
    b.finish()
    fleet.poll()
    assert [r.index for r in b.running] == [2, 0]
    assert [m.replica.name for m in fleet.members] == ["b"]


def test_weights_wait_for_those_that_load_and_not_for_those_that_start() -> None:
    a, b, c = Scripted("a"), Scripted("b"), Scripted("c")
    fleet, _ = ready(a, b)
    fleet.add(c)
    b.load = lambda weights, version: b.tell(Down("out of memory"))  # type: ignore[method-assign]
    fleet.sync_weights([], 2)
    assert states(fleet) == ["ready", "down", "starting"]
    fleet.submit(requests(1))
    assert "1 requests in flight" in refusal(lambda: fleet.sync_weights([], 3))


@pytest.mark.parametrize("call", ["submit", "load", "abort", "start"])
def test_a_call_that_raises_is_a_replica_down(call: str) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionError("pipe closed")

    a, b, said = Scripted("a", 2), Scripted("b", 4), []
    fleet, clock = ready(a, b, said=said)
    wanted = requests(3)
    if call == "submit":
        a.submit = broken  # type: ignore[method-assign]
        fleet.submit(wanted)
    elif call == "load":
        a.load = broken  # type: ignore[method-assign]
        fleet.sync_weights([], 2)
        fleet.submit(wanted)
    elif call == "abort":
        fleet.submit(wanted)
        a.abort = broken  # type: ignore[method-assign]
        fleet.abort([wanted[0].id])
        fleet.poll()
        wanted = wanted[1:]
    else:
        a.start = broken  # type: ignore[method-assign]
        a.tell(Down("killed"))
        fleet.poll()
        clock.now = 1.0
        fleet.submit(wanted)
        fleet.poll()
    assert states(fleet) == ["down", "ready"]
    assert set(b.running) == {r.id for r in wanted}
    assert any("a is down: ConnectionError: pipe closed; again in" in line for line in said)


def test_one_that_begins_anew_by_itself_has_lost_its_requests() -> None:
    a, b = Scripted("a", 1), Scripted("b", 1)
    fleet, _ = ready(a, b)
    fleet.submit(requests(2))
    b.finish()
    a.tell(Up())
    fleet.poll()
    assert states(fleet) == ["down", "ready"]
    assert [r.index for r in b.running] == [0]


@pytest.mark.parametrize("version", [1, 2, 7])
def test_weights_that_nobody_asked_for_are_not_trusted(version: int) -> None:
    a, b = Scripted("a", 1), Scripted("b", 1)
    fleet, _ = ready(a, b)
    a.tell(Loaded(version))
    fleet.poll()
    assert states(fleet) == ["down", "ready"]
    assert len(a.loaded) == 1  # nor is it asked again and again


def test_who_is_taken_for_dead_is_told_to_stop() -> None:
    a, b = Scripted("a", 2), Scripted("b", 2)
    fleet, _ = ready(a, b)
    fleet.submit(requests(4))
    first = next(iter(a.running.values()))
    a.tell(answer(first, 0))
    fleet.poll()
    assert not a.running
    assert states(fleet) == ["down", "ready"]


def test_close_reaches_the_others_when_one_raises() -> None:
    def broken() -> None:
        raise OSError("no such process")

    a, b, said = Scripted("a"), Scripted("b"), []
    fleet, _ = ready(a, b, said=said)
    a.close = broken  # type: ignore[method-assign]
    fleet.submit(requests(5))
    fleet.close()
    assert b.closed
    assert said[-1] == "engine: a did not close: no such process"
    assert fleet.metrics()["engine_queue"] == 0


def test_close_lets_go_of_all() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, _ = ready(a, b)
    fleet.submit(requests(2))
    fleet.close()
    assert a.closed
    assert b.closed
    assert fleet.members == []


def test_metrics() -> None:
    a, b = Scripted("a"), Scripted("b", 1)
    fleet, _ = ready(a, b)
    fleet.submit(requests(4))
    a.finish()
    done = fleet.poll()
    b.tell(Down("killed"))
    fleet.poll()
    numbers = fleet.metrics()
    assert {k: numbers[k] for k in ("engine_replicas", "engine_slots", "engine_busy_slots", "engine_queue", "engine_moved")} == {
        "engine_replicas": 1, "engine_slots": 2, "engine_busy_slots": 2, "engine_queue": 1, "engine_moved": 1,
    }  # fmt: skip
    assert numbers["engine_tokens"] == len(done[0].token_ids)
    assert "engine_prefix_hit_rate" not in numbers  # nobody said


def test_prefix_hits_are_those_of_the_replicas_that_say() -> None:
    a, b = Scripted("a"), Scripted("b")
    fleet, _ = ready(a, b)
    given = requests(3)
    fleet.submit(given)
    size = len(given[0].prompt.token_ids)
    for replica, num_cached in ((a, 0), (b, None), (a, size)):
        _, request = replica.running.popitem()
        replica.tell(replace(answer(request, request.policy_version), num_cached_tokens=num_cached))
    assert len(fleet.poll()) == 3
    assert fleet.metrics()["engine_prefix_hit_rate"] == 0.5
