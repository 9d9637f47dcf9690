"""`Fleet` with scripted replicas and a virtual clock: who gets what, who is taken for dead, and that nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
from fleet_world import VOCAB_SIZE, Scripted, answer, ready, requests, states

from reinforce_ada.engines.fleet import Down, Dropped, Loaded
from reinforce_ada.errors import EngineLost
from reinforce_ada.types import Completion, CompletionId

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
