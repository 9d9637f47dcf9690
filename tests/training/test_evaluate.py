"""Avg@k, its standard error, pass@k and the paired difference, against literal numbers."""

import itertools
import math

import pytest

from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.errors import InputError
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.training.evaluate import evaluate, paired_difference, pass_at_k, standard_error
from reinforce_ada.types import Prompt


def test_evaluation_of_a_scripted_engine():
    prompts = [Prompt("a", (1,)), Prompt("b", (1,)), Prompt("c", (1,))]
    engine = ScriptedEngine({"a": "++--", "b": "----", "c": "++++"})
    e = evaluate(engine, InlineRewards(lambda p, text: float(text == "+")), prompts, k=4, seed=0, policy_version=0, positive_threshold=0.7)
    assert e.per_prompt == (0.5, 0.0, 1.0)
    assert e.avg_at_k == 0.5
    assert e.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert e.pass_at_k["1"] == pytest.approx(0.5)
    assert e.pass_at_k["2"] == pytest.approx((1 - 1 / 6 + 0 + 1) / 3)
    assert e.pass_at_k["4"] == pytest.approx(2 / 3)
    assert e.num_voids == 0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 2), (6, 1, 3), (5, 0, 1), (5, 5, 5), (7, 3, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n, c, k):
    outcomes = [1] * c + [0] * (n - c)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_pass_at_k_refuses_what_it_cannot_estimate():
    for n, c, k in [(4, 5, 1), (4, 2, 5), (4, -1, 1), (4, 2, 0)]:
        with pytest.raises(InputError):
            pass_at_k(n, c, k)


def test_paired_difference():
    difference, stderr = paired_difference([0.0, 0.5, math.nan, 0.25], [0.5, 0.5, 1.0, 1.0])
    assert difference == pytest.approx(1.25 / 3)
    assert stderr == pytest.approx(standard_error([0.5, 0.0, 0.75]))
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(standard_error([1.0]))


def test_no_prompts():
    with pytest.raises(InputError, match="no prompts"):
        evaluate(ScriptedEngine({}), InlineRewards(lambda p, t: 0.0), [], k=1, seed=0, policy_version=0, positive_threshold=0.5)
