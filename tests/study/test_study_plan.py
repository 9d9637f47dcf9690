"""The plan of a study: its runs, the exact prediction for each arm, and what may change when it goes on."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from study_world import STUDY, changed

from reinforce_ada.errors import InputError
from reinforce_ada.explain.efficiency import posteriors
from reinforce_ada.explain.page import explain
from reinforce_ada.sampling import Counts, Policy, Verdict, preset
from reinforce_ada.study.plan import Cell, cells_of, keep, untrained_run
from reinforce_ada.study.prediction import Prediction, expected_pool, predict
from reinforce_ada.study.runs import shard_of
from reinforce_ada.study.settings import Study, read_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return study_of(tmp_path, STUDY)


def study_of(folder: Path, text: str) -> Study:
    (folder / "s.toml").write_text(text)
    return read_study(folder / "s.toml")


# -------------------- predictions


def exactly(*rates: float) -> dict[tuple[float, float], float]:
    """Prompts with these pass rates, each but for a variance of 1e-7."""
    return {(1e6 * p + 1e-9, 1e6 * (1 - p) + 1e-9): count / len(rates) for p, count in Counter(rates).items()}


@pytest.mark.parametrize("name", ["grpo", "pods", "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-exact", "reinforce-ada-est"])
def test_the_prediction_is_what_explain_prints(name: str) -> None:
    rates = [0.01, 0.125, 0.5, 0.95]
    found = explain(preset(name)).at(rates)
    wanted = sum(found["samples"]) / 4, sum(found["signal"]) / 4
    assert expected_pool(preset(name), exactly(*rates)) == pytest.approx(wanted, rel=1e-4)
    found = explain(preset(name)).population(1.0, 2.0)
    assert expected_pool(preset(name), {(1.0, 2.0): 1.0}) == pytest.approx((found["samples"], found["signal"]), rel=1e-12)


def test_the_prediction_by_brute_force() -> None:
    """Every sequence of eight draws of a rule that is asked after each."""
    policy, p = preset("reinforce-ada-balance", group_size=2, round_size=4, max_rounds=2, decide_every=1, min_pool=2), 0.25
    completions = with_signal = 0.0
    for draws in itertools.product((True, False), repeat=8):
        n = stop_of(policy, draws)
        probability = p ** sum(draws) * (1 - p) ** (8 - sum(draws))
        completions += n * probability
        with_signal += (0 < sum(draws[:n]) < n) * probability
    assert expected_pool(policy, exactly(p)) == pytest.approx((completions, with_signal), rel=1e-4)


def stop_of(policy: Policy, draws: tuple[bool, ...]) -> int:
    for n in range(1, 9):
        if policy.verdict(Counts(sum(draws[:n]), n - sum(draws[:n])), 8) is Verdict.STOP:
            return n
    return 8


@pytest.mark.parametrize(
    ("rates", "completions"),
    [
        ([0.5], 16 / (1 - 2 * 0.5**16)),  # a group of one class is dropped, and another prompt enters
        ([0.0], 160.0),  # ten times the prompts at most
        ([0.0, 0.5], 16 / (1 - (1 + 2 * 0.5**16) / 2)),
    ],
)
def test_replaced_prompts_count(rates: list[float], completions: float) -> None:
    assert expected_pool(preset("dapo"), exactly(*rates))[0] == pytest.approx(completions, rel=1e-4)


@pytest.mark.parametrize(
    ("per_step", "prompts"),
    [("", (7, 7)), ("completions_per_step = 96", (12, 3)), ("completions_per_step = 100", (12, 3)), ("completions_per_step = 1", (1, 1))],
)
def test_prompts_per_step(tmp_path: Path, per_step: str, prompts: tuple[int, int]) -> None:
    """With pass rates of 0 balance uses its cap of 32, grpo 8."""
    own = "" if per_step else "\nprompts_per_step = 7"
    study = study_of(tmp_path, changed(("steps = 3", f"steps = 3\n{per_step}"), ('model = "tiny"', f'model = "tiny"{own}')))
    found = [predict(study, arm, exactly(0.0)) for arm in study.arms]
    assert [(p.arm, p.prompts_per_step) for p in found] == [("grpo-8", prompts[0]), ("balance", prompts[1])]
    assert [p.completions_per_prompt for p in found] == pytest.approx([8.0, 32.0])


@pytest.mark.parametrize(
    ("arm", "remembered", "per_generated"),
    [
        ('preset = "reinforce-ada-balance"', 8, 0.43),
        ('preset = "reinforce-ada-memory"', 8, 2.03),
        ('preset = "reinforce-ada-memory"', 0, 1.71),
        ('preset = "grpo"\nscale = "batch"', 8, None),
    ],
)
def test_the_predicted_efficiency_is_that_of_explain(tmp_path: Path, arm: str, remembered: int, per_generated: float | None) -> None:
    changes = [('preset = "grpo"', 'preset = "grpo"\nscale = "none"'), ('preset = "reinforce-ada-balance"', arm)]
    study = study_of(tmp_path, changed(*changes, ('name = "sums"', f'name = "sums"\nremembered = {remembered}')))
    reference, found = (predict(study, arm, {(1.0, 2.0): 1.0}).efficiency for arm in study.arms)
    assert reference is not None
    relative = None if found is None else round(found.per_generated() / reference.per_generated(), 2)
    assert relative == per_generated


@pytest.mark.parametrize(("a", "b"), [(0.5, 2.5), (1.0, 2.0), (2.5, 0.6), (30.0, 30.0)])
def test_the_posteriors_have_the_population_that_was_measured(a: float, b: float) -> None:
    """Of 40 000 prompts measured with 8 completions each: the mean, the spread, and what a rule costs."""
    rng = np.random.default_rng(0)
    measured = (rng.binomial(8, rng.beta(a, b, 40_000)) / 8).tolist()
    found = posteriors(measured, 8)
    assert math.fsum(found.values()) == pytest.approx(1.0)
    mean = math.fsum(share * x / (x + y) for (x, y), share in found.items())
    square = math.fsum(share * x * (x + 1) / ((x + y) * (x + y + 1)) for (x, y), share in found.items())
    assert mean == pytest.approx(a / (a + b), rel=0.03)
    assert square == pytest.approx(a * (a + 1) / ((a + b) * (a + b + 1)), rel=0.04)
    truth, ours, as_measured = (expected_pool(preset("reinforce-ada-balance"), r)[0] for r in ({(a, b): 1.0}, found, exactly(*measured)))
    assert ours == pytest.approx(truth, rel=0.02)
    assert abs(as_measured - truth) > 3 * abs(ours - truth)  # 0 of 8 is taken for never


@pytest.mark.parametrize("measured", [[0.0] * 5, [1.0] * 5, [0.5] * 5, [0.0, 1.0], [0.5]])
def test_posteriors_of_extreme_measurements(measured: list[float]) -> None:
    found = posteriors(measured, 2)
    assert all(0 < x < math.inf for ab in found for x in ab)
    assert math.fsum(found.values()) == pytest.approx(1.0)


# -------------------- runs


def cells(study: Study, prompts: int = 5) -> list[Cell]:
    return cells_of(study, [Prediction(arm.name, prompts, 8.0, 0.5) for arm in study.arms])


def test_the_runs(study: Study, tmp_path: Path) -> None:
    assert [cell.run.name for cell in cells(study)] == [
        "grpo-8/lr0.001/seed0", "grpo-8/lr0.01/seed0", "balance/lr0.01/seed0",
        "grpo-8/lr0.001/seed1", "grpo-8/lr0.01/seed1", "balance/lr0.01/seed1",
    ]  # fmt: skip
    config = cells(study)[5].run.config(tmp_path)
    assert (config.sampling.preset, config.sampling.prompts_per_step, config.training.learning_rate) == ("reinforce-ada-balance", 5, 1e-2)
    assert (config.run.seed, config.run.data_seed, config.training.steps, config.run.out) == (
        1,
        0,
        3,
        str(tmp_path / "balance/lr0.01/seed1"),
    )


def test_the_untrained_model_is_evaluated_without_the_keys_of_a_policy(tmp_path: Path) -> None:
    study = study_of(tmp_path, changed(('model = "tiny"', "group_size = 4\npositive_threshold = 0.5"), ("[0, 1]", "[3, 1]")))
    config = untrained_run(study).config(tmp_path)
    assert (config.training.steps, config.run.seed, config.sampling.positive_threshold, config.sampling.group_size) == (0, 1, 0.5, None)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 6, 9])
def test_the_shards_have_every_run_once(study: Study, num_shards: int) -> None:
    found = [cell for i in range(num_shards) for cell in shard_of(cells(study), (i + 1, num_shards))]
    assert sorted(cell.run.name for cell in found) == sorted(cell.run.name for cell in cells(study))


def begin(out: Path, study: Study) -> None:
    for cell in cells(study):
        (out / cell.run.name).mkdir(parents=True)
        (out / cell.run.name / "config.toml").touch()


def test_a_study_may_grow_but_not_change(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    keep(out, [cell.run for cell in cells(study, 6)])
    keep(out, [cell.run for cell in cells(study)])  # nothing has begun
    begin(out, study)
    keep(out, [cell.run for cell in cells(study)])
    kept = (out / "plan.json").read_text()
    larger = study_of(tmp_path, changed(("seeds = [0, 1]", "seeds = [0, 1, 2]"), ("1e-2]", "1e-2, 1e-1]")))
    keep(out, [cell.run for cell in cells(larger)])
    assert (out / "plan.json").read_text() != kept
    other = study_of(tmp_path, changed(("steps = 3", "steps = 4")))
    with pytest.raises(InputError, match=r"grpo-8/lr0.001/seed0 in .* has begun with steps=3 \(now 4\); the settings as they were"):
        keep(out, [cell.run for cell in cells(other)])
    with pytest.raises(InputError, match=r"prompts_per_step=5 \(now 6\)"):
        keep(out, [cell.run for cell in cells(study, 6)])
    keep(out, [cell.run for cell in cells(study)])


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "\x00"])
def test_a_plan_that_is_none(study: Study, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        keep(tmp_path, [cell.run for cell in cells(study)])
