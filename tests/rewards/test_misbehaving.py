"""Rewards that misbehave in every way they can (the table is in pool_rewards.py): one event for each completion, and the right one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pool_rewards
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool_rewards import MISBEHAVIOUR, PROCESS, RAISES, RETURNS
from test_reward_pool import LONG_S, collect, completion, score, submit

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import InlineRewards, RewardPool
from reinforce_ada.rewards import pool as pool_module
from reinforce_ada.rewards.loading import as_reward
from reinforce_ada.types import Failed, Prompt, Scored


def is_right(result: float | str, expected: float | str) -> bool:
    if isinstance(expected, str):
        return isinstance(result, str) and expected in result and "\n" not in result and len(result) < 400
    return type(result) is float and result == expected and np.signbit(result) == np.signbit(expected)


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "_SILENCE_S", 0.2)
        patch.setattr(pool_module, "_FIRST_CALL", 3)
        with RewardPool(pool_rewards.tricky, num_workers=2, timeout_s=0.7, retries=0) as pool:
            yield pool


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_in_a_worker(pool: RewardPool, name: str) -> None:
    expected = MISBEHAVIOUR[name][1]
    first, result, last = score(pool, ["0.5", name, "0.25"])
    assert is_right(result, expected), result
    assert (first, last) == (0.5, 0.25)  # whoever travels with it
    if isinstance(expected, str):
        assert pool.last_traceback


@pytest.mark.parametrize("name", [*RETURNS, *RAISES])
def test_in_this_process(name: str) -> None:
    runner = InlineRewards(pool_rewards.tricky, max_attempts=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.submit([Prompt("p")], [completion("p", name)])
        (event,) = runner.poll()
    result = event.reward if isinstance(event, Scored) else event.reason
    assert is_right(result, MISBEHAVIOUR[name][1]), result
    assert bool(runner.last_traceback) == isinstance(event, Failed)


def test_an_interrupt_in_this_process_is_the_users() -> None:
    runner = InlineRewards(pool_rewards.tricky)
    runner.submit([Prompt("p")], [completion("p", "interrupt")])
    with pytest.raises(KeyboardInterrupt):
        runner.poll()


@pytest.mark.parametrize("reward", [pool_rewards.asynchronous, pool_rewards.generating, pool_rewards.Asynchronous, 3.5])
def test_what_gives_no_number_is_refused_in_this_process_too(reward: object) -> None:
    with pytest.raises(InputError, match=r"async|generator|class|callable"):
        InlineRewards(reward)  # type: ignore[arg-type]


QUICK = [n for n in MISBEHAVIOUR if n not in PROCESS] + ["os._exit", "sigkill", "fork", "print", "sigint", "interrupt"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.sampled_from([*QUICK, "1", "0.125"]), min_size=1, max_size=24))
def test_any_mixture(pool: RewardPool, texts: list[str]) -> None:
    ids = submit(pool, texts)
    events = collect(pool, len(ids))
    for prompt_id, text in zip(ids, texts, strict=True):
        event = events[prompt_id]
        result = event.reward if isinstance(event, Scored) else event.reason
        assert is_right(result, MISBEHAVIOUR[text][1] if text in MISBEHAVIOUR else float(text)), (text, result)


def test_a_tensor_is_a_number_where_it_is_one() -> None:
    import torch

    assert as_reward(torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)) == 0.5
    with pytest.raises(TypeError, match="not a float"):
        as_reward(torch.ones(1))
    with pytest.raises(RuntimeError):
        as_reward(torch.ones((), device="meta"))


def test_what_a_reward_does_to_its_prompt_no_other_call_sees() -> None:
    with RewardPool("pool_rewards:consuming", num_workers=1, timeout_s=LONG_S, retries=0) as pool:
        prompt = Prompt("p", data={"answer": "1"})
        pool.submit([prompt] * 3, [completion(f"p{i}", "1") for i in range(3)])
        assert {e.reward for e in collect(pool, 3).values() if isinstance(e, Scored)} == {1.0}
    assert prompt.data == {"answer": "1"}
