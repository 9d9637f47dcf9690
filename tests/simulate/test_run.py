"""The event loop against cases worked by hand, the sequential law, and itself at other samplers."""

from __future__ import annotations

import numpy as np
import pytest
from simulated_world import ScriptedWorld

from reinforce_ada.sampling import preset, stopping_table
from reinforce_ada.sampling.policies.contracts import Counts, Verdict
from reinforce_ada.sampling.statistics import samples, signal
from reinforce_ada.sampling.windows import PosteriorWindow
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.population import BetaRates, World
from reinforce_ada.simulate.run import _Drawn, simulate

ONE = preset("grpo", group_size=1)
EACH = preset("reinforce-ada-balance", decide_every=1)
TWO_SLOTS = EngineModel(slots=2, step_ms=10, busy_ms=1)


def test_a_free_slot_is_filled_at_once_by_hand() -> None:
    """With lengths 2, 5, 3 in two slots, the third starts at step 2, and both end at step 5 with no slot idle."""
    done = simulate(ScriptedWorld(["+", "-", "+"], [[2], [5], [3]]), ONE, TWO_SLOTS)
    assert (done.num_steps, done.tokens, done.tokens_committed) == (5, 10, 10)
    assert done.wall_s == pytest.approx(5 * 0.010 + 10 * 0.001)
    assert (done.utilisation, done.waste, done.samples_per_prompt, done.signal_fraction) == (1.0, 0.0, 1.0, 0.0)


def test_prompts_and_weights_cost_time_of_their_own() -> None:
    engine = EngineModel(slots=2, step_ms=10, busy_ms=1, prefill_ms=2, prompt_tokens=3, sync_ms=100)
    done = simulate(ScriptedWorld(["+", "-", "+"], [[2], [5], [3]]), ONE, engine)
    assert done.wall_s == pytest.approx(0.060 + 0.100 + 3 * 3 * 0.002)


def test_what_an_exit_aborts_has_cost_its_tokens_so_far() -> None:
    """Requests 0 to 2 end at step 1 and admit 8 to 10; 3 ends it at step 10, when 4 to 7 have 10 tokens each and 8 to 10 have 9."""
    world = ScriptedWorld(["++--" + 28 * "-"], [[1, 1, 1, 10] + 28 * [20]])
    done = simulate(world, EACH, EngineModel(slots=8), window=8)
    assert (done.num_steps, done.tokens, done.tokens_committed) == (10, 13 + 4 * 10 + 3 * 9, 13)
    assert (done.waste, done.utilisation) == (pytest.approx(67 / 80), 1.0)
    assert (done.samples_per_prompt, done.signal_fraction) == (4.0, 1.0)


def test_what_the_answers_settle_is_aborted_at_once() -> None:
    """Requests 1 to 4 end at step 1 with two of each class: 5 to 9 are given up with one token each, and 0 goes on to step 10."""
    world = ScriptedWorld(["+" + "++--" + 27 * "-"], [[10, 1, 1, 1, 1] + 27 * [20]])
    done = simulate(world, EACH, EngineModel(slots=10), window=PosteriorWindow(EACH))
    assert (done.num_steps, done.tokens, done.tokens_committed) == (10, 10 + 4 + 5, 14)


def test_rounds_wait_for_the_slowest() -> None:
    policy = preset("reinforce-ada-balance", round_size=4, max_rounds=2)
    world = ScriptedWorld(["++++++++", "++--++++"], [[1, 1, 1, 5, 3, 3, 3, 3], [1, 1, 1, 9] + 4 * [1]])
    done = simulate(world, policy, EngineModel(slots=8), schedule="rounds")
    assert (done.num_steps, done.tokens, done.waste) == (9 + 3, 8 + 12 + 12, 0.0)
    assert done.samples_per_prompt == 6.0
    assert simulate(world, policy, EngineModel(slots=8), window=4).num_steps == 9  # 5 + 3 beside 9


def test_completions_are_the_same_drawn_in_blocks_and_all_at_once() -> None:
    world, cap = World(BetaRates().draw(300, 5), LengthModel(), 5), 13  # no multiple of a block either way
    drawn = _Drawn(world, cap)
    prompt_of, index = np.divmod(np.arange(300 * cap), cap)
    correct, tokens = world.draw(prompt_of, index)
    signed = [drawn(prompt, i) for prompt, i in zip(prompt_of.tolist(), index.tolist(), strict=True)]
    assert signed == np.where(correct, tokens, -tokens).tolist()


def test_a_policy_that_refills_wants_its_share_of_the_prompts() -> None:
    policy = preset("dapo", group_size=2, max_prompts_factor=2)
    world = ScriptedWorld(["++", "+-", "-+", "+-"], [[1, 1]] * 4)
    done = simulate(world, policy, EngineModel(slots=4))
    assert (done.num_prompts, done.num_with_signal) == (3, 2)  # 2 wanted, one dropped and replaced


@pytest.mark.parametrize("policy", [EACH, preset("reinforce-ada-balance"), preset("reinforce-ada-pos", decide_every=1)])
def test_pools_are_those_of_the_sequential_sampler(policy) -> None:
    world = World(BetaRates().draw(40, 1), LengthModel(), 1)
    total = with_signal = 0
    for prompt in range(40):
        correct = world.draw(np.full(policy.cap, prompt), np.arange(policy.cap))[0]
        counts = Counts(0, 0)
        for right in correct.tolist():
            counts = Counts(counts.correct + right, counts.wrong + (not right))
            if policy.verdict(counts) is not Verdict.CONTINUE:
                break
        total += counts.committed
        with_signal += counts.correct > 0 and counts.wrong > 0
    for kwargs in ({"schedule": "rounds"}, {"window": 5}, {"window": PosteriorWindow(policy)}):
        done = simulate(world, policy, EngineModel(slots=32), **kwargs)
        assert (done.num_committed, done.num_with_signal) == (total, with_signal)


def test_samples_and_signal_are_those_of_the_exact_program() -> None:
    """2000 prompts of Beta(1, 2): 4 standard errors, which are below 0.25 samples and 0.006 of signal."""
    policy = preset("reinforce-ada-balance")
    done = simulate(World(BetaRates().draw(2000, 0), LengthModel(), 0), policy, EngineModel(slots=2000), window=8)
    table = stopping_table(policy)
    assert done.samples_per_prompt == pytest.approx(table.expect_beta(samples, 1, 2), abs=4 * 8.5 / 2000**0.5)
    assert done.signal_fraction == pytest.approx(table.expect_beta(signal, 1, 2), abs=4 * 0.24 / 2000**0.5)
