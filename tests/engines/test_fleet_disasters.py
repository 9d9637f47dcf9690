"""A fleet over two steps and a weight sync, on a virtual clock, whatever happens to its replicas; and when none of them is any good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_replicas import DISASTERS, ScriptedReplica, WatchedFleet, World

from reinforce_ada import cli
from reinforce_ada.commands import train
from reinforce_ada.driver import run
from reinforce_ada.engines.fleet import Down
from reinforce_ada.errors import EngineLost
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import CompletionId, Prompt, Request, SamplingResult

NAMES = [f"p{i}" for i in range(5)]


def requests(count: int, version: int = 1, name: str = "p") -> list[Request]:
    return [Request(CompletionId(1, name, k), Prompt(name), 100 + k, version) for k in range(count)]


def by_hand(*num_slots: int, **options: Any) -> tuple[WatchedFleet, list[ScriptedReplica]]:
    """A fleet whose replicas do nothing by themselves; they are up and have weights of version 1."""
    replicas = [ScriptedReplica(f"r{i}", n, auto=False) for i, n in enumerate(num_slots)]
    fleet = WatchedFleet(World(replicas), **options)
    fleet.sync_weights([("w", 0)], 1)
    return fleet, replicas


def let_pass(fleet: WatchedFleet, seconds: float) -> None:
    """Polls for so long; nothing finishes meanwhile."""
    end = fleet.world.now + seconds
    while fleet.world.now < end:
        assert fleet.poll() == []


def test_a_replica_that_only_ever_answers_garbage_is_not_there() -> None:
    replica = ScriptedReplica("mad")
    world = World([replica])
    fleet = WatchedFleet(world, give_up_s=100)  # longer than any one pause
    fleet.sync_weights([], 1)
    world.disasters = [(0, "nan")] * 1000
    fleet.submit(requests(1))
    with pytest.raises(EngineLost, match="mad: answered garbage: a logprob that is not one"):
        let_pass(fleet, 400)


def test_a_pause_of_the_trainer_is_not_held_against_the_replicas() -> None:
    fleet, (a,) = by_hand(1, give_up_s=20)
    a.tell(Down("killed"))
    fleet.poll()
    fleet.world.now += 1000  # nobody polls while the trainer trains
    fleet.sync_weights([], 2)
    assert a.loads[-1] == ("weights 2", 2)


def test_without_members_the_driver_waits_for_one() -> None:
    fleet, _ = by_hand(1)
    fleet.remove("r0")
    assert fleet.free_slots == 1
    fleet.submit(requests(1))
    assert fleet.free_slots == 0
    fleet.abort([requests(1)[0].id])
    late = ScriptedReplica("late", 4)
    polls = 0

    def join_at_the_tenth() -> None:
        nonlocal polls
        polls += 1
        if polls == 10:
            fleet.world.replicas.append(late)
            fleet.add(late)

    step = fleet.world.step
    fleet.world.step = lambda: (step(), join_at_the_tenth())  # type: ignore[method-assign,assignment]
    assert pools(run(sampler(1), fleet, plus)) == undisturbed(1)


def test_the_command_line_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lost(given: Any) -> int:
        raise EngineLost("engine: no replica for 9 s (r0: killed); the run can be resumed")

    monkeypatch.setattr(train, "run", lost)
    assert cli.main(["train"]) == 3
    assert capsys.readouterr().err == "reinforce-ada: engine: no replica for 9 s (r0: killed); the run can be resumed\n"


# -------------------- any order of anything


def plus(prompt: Prompt, text: str) -> float:
    return float(text == "+")


def sampler(version: int, schedule: Any = "stream") -> AdaptiveSampler:
    policy = preset("reinforce-ada-balance")
    return AdaptiveSampler([Prompt(n) for n in NAMES], policy, step=version, policy_version=version, schedule=schedule)


def pools(result: SamplingResult) -> list[list[tuple[CompletionId, float, list[int]]]]:
    return [[(s.id, s.reward, s.completion.token_ids.tolist()) for s in pool.scored] for pool in result.pools]


def undisturbed(version: int, schedule: Any = "stream") -> list[list[tuple[CompletionId, float, list[int]]]]:
    fleet = WatchedFleet(World([ScriptedReplica("alone", 8)]))
    fleet.sync_weights([], version)
    return pools(run(sampler(version, schedule), fleet, plus))


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, str], list[Any]]:
    return {(version, schedule): undisturbed(version, schedule) for version in (1, 2) for schedule in ("stream", "rounds")}


def test_pools_depend_on_the_weights(expected: dict[tuple[int, str], list[Any]]) -> None:
    """Or what follows could not see a completion of old ones."""
    assert [[r for _, r, _ in pool] for pool in expected[1, "stream"]] != [[r for _, r, _ in pool] for pool in expected[2, "stream"]]


@settings(max_examples=300, deadline=None)
@given(
    slots=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    disasters=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(DISASTERS)), max_size=80),
    schedule=st.sampled_from(["stream", "rounds"]),
)
def test_nothing_that_happens_changes_a_pool(
    slots: Sequence[int], disasters: Sequence[tuple[int, str]], schedule: str, expected: dict[tuple[int, str], list[Any]]
) -> None:
    """Two steps with a weight sync between them, in which replicas die, hang, refuse, drop, repeat themselves and answer garbage."""
    world = World([ScriptedReplica(f"r{i}", n) for i, n in enumerate(slots)], disasters)
    fleet = WatchedFleet(world, give_up_s=1e9)
    for version in (1, 2):
        fleet.sync_weights([], version)
        result = run(sampler(version, schedule), fleet, plus)
        assert pools(result) == expected[version, schedule]
        assert sum(pool.num_void for pool in result.pools) == 0
    assert fleet.metrics()["engine_busy_slots"] == fleet.metrics()["engine_queue"] == 0
