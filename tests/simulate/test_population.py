"""Pass rates, outcomes and lengths: functions of identity alone, with the distributions they claim."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from simulated_world import refused

from reinforce_ada.errors import InputError
from reinforce_ada.simulate.command import population
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.population import BetaRates, GivenRates, World, read_rates

NUM_PROMPTS, CAP = 400, 50
PROMPT_OF, INDEX = (grid.ravel() for grid in np.meshgrid(np.arange(NUM_PROMPTS), np.arange(CAP), indexing="ij"))


def test_a_completion_is_the_same_whenever_it_is_drawn() -> None:
    world = World(np.full(NUM_PROMPTS, 0.5), LengthModel(), 3)
    correct, tokens = world.draw(PROMPT_OF, INDEX)
    order = np.random.default_rng(0).permutation(len(INDEX))
    again = World(np.full(NUM_PROMPTS, 0.5), LengthModel(), 3).draw(PROMPT_OF[order], INDEX[order])
    assert (again[0] == correct[order]).all()
    assert (again[1] == tokens[order]).all()
    one = world.draw(PROMPT_OF[:1], INDEX[:1])
    assert (one[0][0], one[1][0]) == (correct[0], tokens[0])
    other = World(np.full(NUM_PROMPTS, 0.5), LengthModel(), 4).draw(PROMPT_OF, INDEX)
    assert (other[0] == correct).mean() == pytest.approx(0.5, abs=4 * 0.5 / len(INDEX) ** 0.5)


def test_prompts_and_indices_are_independent() -> None:
    correct = World(np.full(NUM_PROMPTS, 0.5), LengthModel(), 0).draw(PROMPT_OF, INDEX)[0].reshape(NUM_PROMPTS, CAP)
    sums = correct.sum(axis=1), correct.sum(axis=0)
    assert sums[0].var() == pytest.approx(CAP / 4, rel=4 * (2 / NUM_PROMPTS) ** 0.5)  # binomial, 4 standard errors
    assert sums[1].var() == pytest.approx(NUM_PROMPTS / 4, rel=4 * (2 / CAP) ** 0.5)


def test_outcomes_and_lengths_have_their_distributions() -> None:
    """Draw 20 000 completions; tolerances are 4 standard errors, for a prompt's common factor over 400 prompts."""
    lengths = LengthModel(median_correct=100, median_wrong=300, sigma=0.4, sigma_prompt=0.3, max_tokens=100_000)
    correct, tokens = World(np.full(NUM_PROMPTS, 0.3), lengths, 1).draw(PROMPT_OF, INDEX)
    assert correct.mean() == pytest.approx(0.3, abs=4 * (0.21 / len(INDEX)) ** 0.5)
    logs = np.log(tokens)
    for found, median in ((correct, 100), (~correct, 300)):
        assert logs[found].mean() == pytest.approx(math.log(median), abs=4 * 0.3 / NUM_PROMPTS**0.5)
        assert logs[found].std() == pytest.approx(0.5, rel=0.1)
    centred = (logs - np.where(correct, math.log(100), math.log(300))).reshape(NUM_PROMPTS, CAP)
    assert centred.std(axis=1, ddof=1).mean() == pytest.approx(0.4, rel=0.03)
    assert centred.mean(axis=1).std() == pytest.approx(math.hypot(0.3, 0.4 / CAP**0.5), rel=4 / (2 * NUM_PROMPTS) ** 0.5)


def test_lengths_are_cut_at_the_limit() -> None:
    tokens = World(np.zeros(NUM_PROMPTS), LengthModel(max_tokens=500), 0).draw(PROMPT_OF, INDEX)[1]
    assert tokens.max() == 500
    assert tokens.min() >= 1
    assert (tokens == 500).mean() == pytest.approx(0.64, abs=0.05)  # P(z > log(500 / 709) / hypot(0.8, 0.55))


def test_beta_rates_have_their_mean_and_are_the_same_for_a_seed() -> None:
    rates = BetaRates(2.5, 0.6).draw(10_000, 5)
    assert rates.mean() == pytest.approx(2.5 / 3.1, abs=4 * 0.196 / 100)
    assert (rates == BetaRates(2.5, 0.6).draw(10_000, 5)).all()
    assert (rates != BetaRates(2.5, 0.6).draw(10_000, 6)).any()


@pytest.mark.parametrize(
    ("name", "text"),
    [("rates.csv", "prompt,rate\na,0.5\nb,1\n\n"), ("rates.txt", "0.5\n1.0\n"), ("rates.json", "[0.5, 1]")],
)
def test_a_file_of_pass_rates(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    rates = read_rates(tmp_path / name)
    assert rates == GivenRates((0.5, 1.0), name)
    assert rates.draw(2, 0).tolist() == [0.5, 1.0]
    assert set(rates.draw(50, 0).tolist()) == {0.5, 1.0}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rates.csv", "rate\n", "rates.csv: no pass rates; at least one is needed"),
        ("rates.txt", "0.5\n1.5\n", "rates.txt: pass rate 1.5; a number from 0 to 1 is needed"),
        ("rates.txt", "0.5\nhalf\n", "could not convert string to float: 'half'; a JSON list of pass rates, or one a line, is needed"),
        ("rates.json", '{"a": 1}', "a JSON list of pass rates, or one a line, is needed"),
    ],
)
def test_a_file_of_something_else(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with refused(message):
        read_rates(tmp_path / name)


def test_words_for_a_population(tmp_path: Path) -> None:
    assert population("beta:.5,2.5") == BetaRates(0.5, 2.5)
    for text, message in (
        ("beta:1", "population 'beta:1'; beta:A,B with two numbers is needed"),
        ("beta:0,1", "BetaRates: a = 0.0; a number from 1e-06 to 1000000"),
        ("no.csv", "simulate: cannot read no.csv: No such file or directory; a file of pass rates is needed"),
        (str(tmp_path), "does not exist; a store to read is needed"),
    ):
        with refused(message):
            population(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineModel(slots=0), "EngineModel: slots = 0; an integer from 1 to 1000000"),
        (lambda: EngineModel(step_ms=-1), "EngineModel: step_ms = -1; a number from 0 to 10000000"),
        (lambda: EngineModel(step_ms=0, busy_ms=0), "EngineModel: step_ms 0 and busy_ms 0; a decode step that takes time is needed"),
        (lambda: LengthModel(median_wrong=0), "LengthModel: median_wrong = 0; a number above 0 and up to 10000000"),
        (lambda: LengthModel(sigma=math.nan), "LengthModel: sigma = nan; a number from 0 to 10"),
    ],
)
def test_models_of_nothing_are_refused(make, message: str) -> None:
    with pytest.raises(InputError) as e:
        make()
    assert str(e.value) == message
