"""The fit returns the models of a run from its store and its log."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reinforce_ada.config import load
from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import AdaptiveSampler, configured, preset
from reinforce_ada.simulate.command import population
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.fit import _Run, fit_beta, fit_run
from reinforce_ada.simulate.population import BetaRates, World
from reinforce_ada.simulate.run import simulate
from reinforce_ada.types import Completion, CompletionId, Prompt, Scored

TRUTH = LengthModel(median_correct=60, median_wrong=110, sigma=0.6, sigma_prompt=0.4, max_tokens=300)
ENGINE = EngineModel(slots=48, step_ms=6.0, busy_ms=0.2)
RATES = BetaRates(1.5, 2.0)
POLICY = preset("reinforce-ada-balance")


def write_run(folder: Path, *, schedule: str, window: int | None, num_steps: int) -> None:
    """Write a run as the trainer would have left it with the model as its engine: `sampling_s` is that of the virtual clock."""
    sampling = {"preset": POLICY.name, "schedule": schedule, "window": window, "max_tokens": TRUTH.max_tokens}
    header = {"kind": "run", "device": "cpu", "config": {"sampling": sampling, "engine": {"max_num_seqs": ENGINE.slots}}}
    records = [header]
    with RolloutStore(folder / "rollouts.sqlite") as store:
        for step in range(1, num_steps + 1):
            num_prompts = 12 + 8 * (step % 4)  # steps of one size would not tell step_ms from busy_ms
            world = World(RATES.draw(num_prompts, step), TRUTH, step)
            done = simulate(world, POLICY, ENGINE, schedule=schedule, window=window)
            records.append({"kind": "step", "step": step, "sampling_s": done.wall_s})
            store.finish_step(step, _sample(store, world, step))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _sample(store: RolloutStore, world: World, step: int):
    """Write the same pools event by event."""
    sampler = AdaptiveSampler([Prompt(f"{step}-{i}") for i in range(world.num_prompts)], POLICY, step=step, window=8)
    while not sampler.done:
        for request in sampler.next_requests(10_000):
            prompt = int(request.id.prompt_id.partition("-")[2])
            correct, tokens = world.draw(np.array([prompt]), np.array([request.id.index]))
            blank = np.zeros(int(tokens[0]))
            event = Scored(Completion(CompletionId(*request.id), blank, blank, "", "stop", 0), float(correct[0]))
            store.append([event])
            sampler.receive(event)
    return sampler.result()


@pytest.mark.parametrize(("schedule", "window"), [("rounds", None), ("stream", 8)])
def test_a_simulated_run_gives_back_its_models(tmp_path: Path, schedule: str, window: int | None) -> None:
    """The speed exactly, since the replay is exact. What 216 prompts share has a standard error of 0.4 / sqrt(216) = 0.027 in the log of a
    median, and more where hard prompts give most wrong answers: 15 % is about four of them.
    """
    write_run(tmp_path, schedule=schedule, window=window, num_steps=9)
    fit = fit_run(tmp_path)
    assert fit.engine.slots == ENGINE.slots
    assert fit.engine.step_ms == pytest.approx(ENGINE.step_ms, rel=1e-6)
    assert fit.engine.busy_ms == pytest.approx(ENGINE.busy_ms, rel=1e-6)
    assert fit.r2 == pytest.approx(1)
    assert fit.num_steps == 9
    assert fit.num_completions > 2000
    assert fit.lengths.median_correct == pytest.approx(TRUTH.median_correct, rel=0.15)
    assert fit.lengths.median_wrong == pytest.approx(TRUTH.median_wrong, rel=0.15)
    assert fit.lengths.sigma == pytest.approx(TRUTH.sigma, abs=0.06)
    assert fit.lengths.sigma_prompt == pytest.approx(TRUTH.sigma_prompt, abs=0.06)
    assert fit.lengths.max_tokens == TRUTH.max_tokens
    assert fit.population.a / (fit.population.a + fit.population.b) == pytest.approx(1.5 / 3.5, abs=4 * 0.23 / 216**0.5)
    assert "9 steps: decode step 6 ms + 0.2 ms a sequence (R² 1.000), 48 slots" in str(fit)
    assert fit_run(tmp_path / "rollouts.sqlite") == fit
    assert population(str(tmp_path)) == population(str(tmp_path / "rollouts.sqlite")) == fit.population


@pytest.mark.parametrize(
    "sampling",
    [
        {"preset": "reinforce-ada-est", "mean_budget": 12},
        {"preset": "reinforce-ada-balance", "objective": "power", "alpha": 0.5},
        {"preset": "dapo", "group_size": 8, "propose": "skip-streaks"},
        {"preset": "reinforce-ada-exact", "decide_every": 2, "min_pool": 6, "positive_threshold": 0.5, "degenerate": "drop"},
        {"preset": "reinforce-ada-pos", "round_size": 4, "max_rounds": 3, "propose": None},
    ],
)
def test_a_run_is_sampled_again_by_the_policy_it_had(sampling: dict) -> None:
    """The fit reads any key of a policy; a log of an earlier version lacks some."""
    config = {"sampling": {"schedule": "stream", "window": 4, "max_tokens": 9, **sampling}, "engine": {"max_num_seqs": 7}}
    run = _Run.of(Path("run"), {"device": "cpu", "config": config})
    whole = replace(load().sampling, **sampling)
    assert run.policy == configured(whole)
    assert (run.window, run.slots, run.max_tokens) == (4, 7, 9)


@pytest.mark.parametrize("header", [{}, {"config": 3}, {"config": {"sampling": {}, "engine": {}}, "device": "cpu"}])
def test_a_header_that_says_nothing_is_one_line(header: dict) -> None:
    with pytest.raises(InputError, match=r"^simulate --fit: the first record of .*log.jsonl does not say how the run sampled"):
        _Run.of(Path("run"), header)


def test_pass_rates_are_found_through_the_stopping_rule() -> None:
    """For 20 000 stopped pools the pool means are biased, but the likelihood is not."""
    rng = np.random.default_rng(0)
    counts = []
    for p in rng.beta(0.5, 2.5, 20_000):
        k = w = 0
        while k + w < 32 and (k < 2 or w < 2):
            k, w = k + (right := int(rng.random() < p)), w + 1 - right
        counts.append((k, w))
    fitted = fit_beta(counts)
    assert fitted.a == pytest.approx(0.5, rel=0.05)
    assert fitted.b == pytest.approx(2.5, rel=0.08)
    assert abs(np.mean([k / (k + w) for k, w in counts]) - 0.5 / 3) > 0.01  # the mean of the pools


def test_fit_beta_of_two_pools_by_hand() -> None:
    """A pool of successes and one of failures: a mean of 1/2 is likelier the smaller a + b is, so the search ends at its bound of 0.01."""
    fitted = fit_beta([(8, 0), (0, 8)])
    assert fitted.a == pytest.approx(fitted.b, rel=0.01)
    assert fitted.a < 0.02
    assert math.isclose(fit_beta([(3, 3)] * 9).a, 100, rel_tol=0.7)  # nothing but halves: as narrow as it goes


def test_what_is_no_run_is_said_in_one_line(tmp_path: Path) -> None:
    needed = "holds no run with two finished steps; a folder that `reinforce-ada train` wrote is needed"
    with pytest.raises(InputError, match=needed):
        fit_run(tmp_path)
    write_run(tmp_path, schedule="rounds", window=None, num_steps=1)
    with pytest.raises(InputError, match=needed):
        fit_run(tmp_path)
    with pytest.raises(InputError, match="no pool with a scored completion"):
        fit_beta([(0, 0)])
