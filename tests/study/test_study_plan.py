"""The plan of a study: its runs, the exact prediction for each arm, and what may change when it goes on."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from study_world import STUDY, changed

from reinforce_ada.errors import InputError
from reinforce_ada.explain.page import explain
from reinforce_ada.sampling import Counts, Policy, Verdict, preset
from reinforce_ada.study.plan import Cell, Prediction, cells_of, expected, keep, predict, untrained_run
from reinforce_ada.study.runs import shard_of
from reinforce_ada.study.settings import Study, read_study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return study_of(tmp_path, STUDY)


def study_of(folder: Path, text: str) -> Study:
    (folder / "s.toml").write_text(text)
    return read_study(folder / "s.toml")


# -------------------- predictions


@pytest.mark.parametrize("name", ["grpo", "pods", "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-exact", "reinforce-ada-est"])
def test_the_prediction_is_what_explain_prints(name: str) -> None:
    rates = [0.01, 0.125, 0.125, 0.5, 0.95]
    found = explain(preset(name)).at(rates)
    assert expected(preset(name), rates) == pytest.approx((sum(found["samples"]) / 5, sum(found["signal"]) / 5))


def test_the_prediction_by_brute_force() -> None:
    """Every sequence of eight draws of a rule that is asked after each."""
    policy, p = preset("reinforce-ada-balance", group_size=2, round_size=4, max_rounds=2, decide_every=1, min_pool=2), 0.25
    completions = with_signal = 0.0
    for draws in itertools.product((True, False), repeat=8):
        n = stop_of(policy, draws)
        probability = p ** sum(draws) * (1 - p) ** (8 - sum(draws))
        completions += n * probability
        with_signal += (0 < sum(draws[:n]) < n) * probability
    assert expected(policy, [p]) == pytest.approx((completions, with_signal))


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
    assert expected(preset("dapo"), rates)[0] == pytest.approx(completions)


@pytest.mark.parametrize(
    ("per_step", "prompts"),
    [("", (7, 7)), ("completions_per_step = 96", (12, 3)), ("completions_per_step = 100", (12, 3)), ("completions_per_step = 1", (1, 1))],
)
def test_prompts_per_step(tmp_path: Path, per_step: str, prompts: tuple[int, int]) -> None:
    """With pass rates of 0 balance uses its cap of 32, grpo 8."""
    own = "" if per_step else "\nprompts_per_step = 7"
    study = study_of(tmp_path, changed(("steps = 3", f"steps = 3\n{per_step}"), ('model = "tiny"', f'model = "tiny"{own}')))
    assert [predict(study, arm, [0.0, 0.0]) for arm in study.arms] == [
        Prediction("grpo-8", prompts[0], 8.0, 0.0), Prediction("balance", prompts[1], 32.0, 0.0),
    ]  # fmt: skip


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
