"""Avg@k, pass@k, maj@k, their standard errors and the paired difference: literal numbers, enumeration, and a simulation of the errors."""

import itertools
import math
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest

from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.errors import InputError
from reinforce_ada.rewards import ReasoningGymReward, exact_match
from reinforce_ada.rewards.exact import answer_given
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rewards.names import answer_of_reward
from reinforce_ada.training.evaluate import evaluate, majority, paired_difference, pass_at_k, standard_error
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
    assert e.pass_at_k_stderr["1"] == pytest.approx(e.stderr)
    assert e.pass_at_k_stderr["4"] == pytest.approx(standard_error([1, 0, 1]))
    assert e.num_voids == 0
    assert (e.maj_at_k, e.maj_at_k_stderr) == (None, None)
    assert "maj_at_k" not in e.record()
    assert repr(e) == "<Evaluation: Avg@4 0.500 ± 0.289 on 3 prompts>"


@pytest.mark.parametrize(
    ("answer", "per_prompt"),
    [
        (lambda text: text, [0.5, 0, 1, 0]),
        (lambda text: text if text == "+" else None, [1, 0, 1, 1]),
        (lambda text: None, [0, 0, 0, 0]),
        (lambda text: [text], [0, 0, 0, 0]),  # no value that can be counted: no vote
        (lambda text: 1 / 0, [0, 0, 0, 0]),
        (lambda text: "the same", [0.5, 0, 1, 0.25]),  # whatever it is worth
    ],
)
def test_majority_of_a_scripted_engine(answer, per_prompt):
    prompts = [Prompt(name, (1,)) for name in "abcd"]
    engine = ScriptedEngine({"a": "++--", "b": "----", "c": "++++", "d": "-+--"})
    settings = {"k": 4, "seed": 0, "policy_version": 0, "positive_threshold": 0.7, "answer": answer}
    e = evaluate(engine, InlineRewards(lambda p, text: float(text == "+")), prompts, **settings)
    assert e.maj_at_k == pytest.approx(sum(per_prompt) / 4)
    assert e.maj_at_k_stderr == pytest.approx(standard_error(per_prompt))
    assert e.record()["maj_at_k"] == e.maj_at_k


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([("4", True)], 1),
        ([("4", True), ("5", False)], 1 / 2),
        ([("4", True), ("5", False), ("5", False)], 0),
        ([("4", True), ("4", True), ("5", False), ("5", False), ("6", False), ("6", False), ("7", True)], 1 / 3),
        ([("4", True), ("4", True), ("6", True), ("6", True), ("5", False), ("5", False)], 2 / 3),  # two spellings, both accepted
        ([(None, False), (None, False), ("4", True)], 1),
        ([(None, False)], 0),
        ([("4", True), ("4", False), ("5", False)], 1 / 2),  # the same answer, scored differently
        ([], 0),
    ],
)
def test_majority(votes, expected):
    assert majority(votes) == pytest.approx(expected)
    assert majority(votes[::-1]) == pytest.approx(expected)


def test_majority_is_the_mean_over_random_ties():
    """Over all orders of the completions, the first of the answers with most votes wins."""
    votes = [("4", True), ("5", False), ("4", True), ("5", False), ("6", True), ("6", True), ("7", False)]
    wins = []
    for order in itertools.permutations(votes):
        counts = Counter(answer for answer, _ in order)
        winner = next(answer for answer, _ in order if counts[answer] == max(counts.values()))
        wins.append(next(is_correct for answer, is_correct in order if answer == winner))
    assert majority(votes) == pytest.approx(sum(wins) / len(wins))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 12 </answer>", Decimal(12)), ("so the answer: 12.0", Decimal(12)), ("1,200", Decimal(1200)), ("\u22123", Decimal(-3)),
        ("Answer: Paris", "Paris"), ("", None), ("<answer> </answer>", None), ("1e999999", Decimal("1e999999")),
    ],
)  # fmt: skip
def test_what_a_completion_answers(text, answer):
    assert answer_given(text) == answer
    assert (answer is None) or hash(answer_given(text)) == hash(answer)


def test_rewards_that_name_answers():
    assert answer_of_reward(exact_match) is answer_given
    assert answer_of_reward("reinforce_ada.rewards.exact:exact_match") is answer_given
    gym = ReasoningGymReward.__new__(ReasoningGymReward)  # without its dataset, which takes a second to import
    assert answer_of_reward(gym)("<answer>7.0</answer>") == 7
    assert answer_of_reward("toy_rewards:even_length") is None


def test_the_standard_errors_are_the_spread_of_whole_evaluations():
    """500 evaluations of 40 prompts with k = 8: the mean squared standard error is the variance of the estimates, within the 6 % that so
    many give it, for all three. That of independent completions, sqrt(p (1 - p) / (40 * 8)), is far too small."""
    rng, k, alpha, beta = np.random.default_rng(0), 8, 0.6, 1.4
    means, errors, naive = [], [], []
    some_of = [pass_at_k(k, c, 4) for c in range(k + 1)]
    for _ in range(500):
        rates = rng.beta(alpha, beta, 40)
        answers = np.where(rng.random((40, k)) < rates[:, None], 0, rng.integers(1, 4, (40, k)))  # 0 is right; three wrong ones
        correct = (answers == 0).sum(1)
        voted = [majority([(int(a), a == 0) for a in row]) for row in answers]
        estimates = [(correct / k).tolist(), [some_of[c] for c in correct], voted]
        means.append([np.mean(values) for values in estimates])
        errors.append([standard_error(values) ** 2 for values in estimates])
        share = correct.mean() / k
        naive.append(share * (1 - share) / (40 * k))
    spread, said = np.var(means, axis=0, ddof=1), np.mean(errors, axis=0)
    np.testing.assert_allclose(said / spread, 1, atol=0.19)  # three standard deviations of a variance from 500
    assert np.mean(naive) < 0.5 * spread[0]
    some_of_four = 1 - math.gamma(beta + 4) * math.gamma(alpha + beta) / (math.gamma(beta) * math.gamma(alpha + beta + 4))
    centre = np.mean(means, axis=0)
    np.testing.assert_allclose(centre[:2], [alpha / (alpha + beta), some_of_four], atol=4 * math.sqrt(spread[:2].max() / 500))


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
