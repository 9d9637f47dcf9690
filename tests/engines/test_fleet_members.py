"""`Fleet` with scripted replicas and a virtual clock: without any of them, with new ones, with new weights, and what it says of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_scenes import refusal
from fleet_world import Scripted, answer, ready, requests, states

from reinforce_ada.engines.fleet import Down, Loaded, Refused, Up
from reinforce_ada.errors import EngineLost

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
