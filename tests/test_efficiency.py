"""Progress for cost: literal tables, an independent program, and the ranking on the command line."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reinforce_ada.cli import main
from reinforce_ada.explain.effective import effective_weight
from reinforce_ada.explain.efficiency import efficiency, posteriors
from reinforce_ada.sampling import Policy, preset

POPULATIONS = ((0.5, 2.5), (1.0, 2.0), (2.5, 0.6))
REFERENCE = preset("grpo", scale="none")


def relative(policy: Policy, axis: str, remembered: int = 0) -> list[float]:
    rows = [(efficiency(policy, {ab: 1.0}, remembered=remembered), efficiency(REFERENCE, {ab: 1.0})) for ab in POPULATIONS]
    return [round(getattr(found, axis)() / getattr(reference, axis)(), 2) for found, reference in rows]


@pytest.mark.parametrize(
    ("policy", "remembered", "per_generated"),
    [
        (preset("reinforce-ada-memory"), 8, [1.84, 2.03, 1.89]),
        (preset("reinforce-ada-memory", group_size=2), 8, [1.67, 1.79, 1.70]),
        (preset("reinforce-ada-memory"), 0, [1.09, 1.71, 1.23]),
        (preset("reinforce-ada-memory", group_size=2), 0, [1.28, 1.61, 1.37]),
        (preset("grpo", group_size=4, scale="none"), 0, [1.18, 1.22, 1.19]),
        (preset("grpo", group_size=16, scale="none"), 0, [0.69, 0.67, 0.69]),
        (preset("grpo", group_size=8, scale="none", baseline="leave-one-out"), 0, [1.0, 1.0, 1.0]),
        (preset("reinforce-ada-pos"), 0, [0.36, 0.56, 0.77]),
        (preset("reinforce-ada-balance"), 0, [0.29, 0.43, 0.31]),
        (preset("pods"), 0, [0.16, 0.17, 0.16]),
    ],
)
def test_per_generated_completion(policy: Policy, remembered: int, per_generated: list[float]) -> None:
    assert relative(policy, "per_generated", remembered) == per_generated


def test_per_trained_completion_balance_leads_grpo() -> None:
    assert relative(preset("reinforce-ada-balance"), "per_trained") == [1.53, 1.57, 1.54]
    assert relative(preset("reinforce-ada-exact"), "per_trained") == [1.75, 1.66, 1.73]


def enumerated(n: int, remembered: int, p: float, score_variance: float) -> tuple[float, float]:
    """(E[w], E[|g|^2]) of baseline "memory" at pass rate p, by all outcomes and memories, with |grad p| = p (1 - p)."""
    mean = second = 0.0
    for seen in range(remembered + 1):
        chance_seen = math.comb(remembered, seen) * p**seen * (1 - p) ** (remembered - seen)
        for outcomes in product((1, 0), repeat=n):
            chance = chance_seen * math.prod(p if r else 1 - p for r in outcomes)
            others = [1 + seen + sum(outcomes) - r for r in outcomes]
            advantages = [r - other / (2 + remembered + n - 1) for r, other in zip(outcomes, others, strict=True)]
            along = sum(a * (1 / p if r else -1 / (1 - p)) for a, r in zip(advantages, outcomes, strict=True)) / n
            across = sum(a * a for a in advantages) / n**2
            mean += chance * along
            second += chance * ((along * p * (1 - p)) ** 2 + score_variance * across)
    return mean, second


@pytest.mark.parametrize(("n", "remembered"), [(1, 0), (1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("score_variance", [1.0, 10.0])
def test_against_an_enumeration_of_outcomes_and_memories(n: int, remembered: int, score_variance: float) -> None:
    a, b = 2.0, 3.0
    p = (np.arange(4000) + 0.5) / 4000
    density = p ** (a - 1) * (1 - p) ** (b - 1)
    density /= density.sum()
    w, second = np.array([enumerated(n, remembered, x, score_variance) for x in p[::8]]).T
    s2 = (p * (1 - p)) ** 2
    found = efficiency(preset("reinforce-ada-memory", group_size=n), {(a, b): 1.0}, remembered=remembered, score_variance=score_variance)
    assert w == pytest.approx(1.0, abs=1e-12)
    assert found.progress == pytest.approx(math.sqrt((density * s2).sum()), rel=1e-5)
    assert found.second_moment == pytest.approx((density[::8] * second).sum() / density[::8].sum(), rel=3e-3)
    assert (found.generated, found.trained) == pytest.approx((n, n))


@pytest.mark.parametrize("name", ["reinforce-ada-balance", "reinforce-ada-pos", "grpo", "dapo"])
def test_against_quadrature_over_the_pass_rates(name: str) -> None:
    policy, (a, b) = preset(name), (2.0, 3.0)
    p = (np.arange(20_000) + 0.5) / 20_000
    density = p ** (a - 1) * (1 - p) ** (b - 1)
    density /= density.sum()
    weight, s2 = effective_weight(policy), (p * (1 - p)) ** 2
    w = weight(p)
    found = efficiency(policy, {(a, b): 1.0}, score_variance=2.0)
    assert found.progress == pytest.approx((density * w * s2).sum() / math.sqrt((density * s2).sum()), rel=1e-6)
    assert found.second_moment == pytest.approx((density * (2 * weight.noise(p) + (weight.variance(p) + w**2) * s2)).sum(), rel=1e-6)


def test_a_mixture_of_populations() -> None:
    """Everything but the length of the gradient of the mean pass rate is a mean over the prompts."""
    policy, one, other = preset("reinforce-ada-balance"), (2.0, 3.0), (0.5, 4.0)
    alone = [efficiency(policy, {ab: 1.0}) for ab in (one, other)]
    mixed = efficiency(policy, {one: 0.25, other: 0.75})
    for name in ("generated", "trained", "second_moment"):
        assert getattr(mixed, name) == pytest.approx(0.25 * getattr(alone[0], name) + 0.75 * getattr(alone[1], name), rel=1e-12)
    s2 = [math.exp(math.lgamma(a + 2) + math.lgamma(b + 2) + math.lgamma(a + b) - math.lgamma(a + b + 4) - math.lgamma(a) - math.lgamma(b))
          for a, b in (one, other)]  # fmt: skip
    along = 0.25 * alone[0].progress * math.sqrt(s2[0]) + 0.75 * alone[1].progress * math.sqrt(s2[1])
    assert mixed.progress == pytest.approx(along / math.sqrt(0.25 * s2[0] + 0.75 * s2[1]), rel=1e-12)


def test_drawn_at_random_from_the_sampler_itself() -> None:
    """Balance by Monte Carlo: pools of random outcomes, the kept ones' advantages, scores with noise within a class."""
    policy, rng, num = preset("reinforce-ada-balance"), np.random.default_rng(0), 20_000
    along, across, generated, trained, s2 = (np.zeros(num) for _ in range(5))
    for i, p in enumerate(rng.beta(1.0, 2.0, num)):
        outcomes = rng.random(32) < p
        n = next((n for n in (8, 16, 24, 32) if 2 <= outcomes[:n].sum() <= n - 2), 32)
        pool = outcomes[:n]
        kept = np.flatnonzero(pool)[: max(2, 4 - (~pool).sum())].tolist() + np.flatnonzero(~pool)[: max(2, 4 - pool.sum())].tolist()
        advantages = np.zeros(4) if pool.all() or not pool.any() else pool[kept] - pool.mean()
        along[i] = (advantages * np.where(pool[kept], 1 / p, -1 / (1 - p))).mean() * p * (1 - p)
        across[i] = (advantages**2).sum() / 16
        generated[i], trained[i], s2[i] = n, 4, (p * (1 - p)) ** 2
    found = efficiency(policy, {(1.0, 2.0): 1.0})
    assert found.generated == pytest.approx(generated.mean(), rel=0.02)
    assert found.trained == pytest.approx(4)
    assert found.progress == pytest.approx((along * np.sqrt(s2)).mean() / math.sqrt(s2.mean()), rel=0.03)
    assert found.second_moment == pytest.approx((along**2 + across).mean(), rel=0.03)


# -------------------- the command


def test_the_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--cost-ratio", "3"]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "reinforce-ada-memory " in line and "1.84" in line]
    assert rows[0].split()[1:] == ["1.84"] * 3 + ["2.03"] * 3 + ["1.89"] * 3
    assert "most progress per generated completion: reinforce-ada-memory" in out
    listed = [line.split("  ")[0] for line in out.splitlines() if line[:1].isalpha()]
    assert listed.index("reinforce-ada-memory") < listed.index("reinforce-ada-est") < listed.index("pods")
    assert all(len(line) <= 120 for line in out.splitlines())


def test_the_cost_ratio_weighs_generated_against_trained(capsys: pytest.CaptureFixture[str]) -> None:
    ratios = []
    for x in ("0", "3", "1e6"):
        assert main(["explain", "reinforce-ada-balance", "--cost-ratio", x, "--population", "1,2", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)[0]["efficiency"]
        ratios.append(row["per_cost"])
        assert (round(row["per_generated"], 2), round(row["per_trained"], 2)) == (0.43, 1.57)
    assert ratios == pytest.approx([row["per_generated"], ratios[1], row["per_trained"]], rel=1e-4)
    assert row["per_generated"] < ratios[1] < row["per_trained"]


def test_a_policy_without_weight_has_no_efficiency(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "grpo", "--scale", "batch", "--cost-ratio", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["efficiency"] is None
    assert main(["explain", "grpo", "--scale", "batch", "--cost-ratio", "1"]) == 0
    assert "no w(p), so that it has no efficiency" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--cost-ratio -1", "argument --cost-ratio: '-1'; a number from 0 to 1000000"),
        ("--cost-ratio nan", "argument --cost-ratio: 'nan'; a number from 0 to 1000000"),
        ("--cost-ratio 1 --score-variance inf", "argument --score-variance: 'inf'; a number from 0 to 1000000"),
        ("--cost-ratio 1 --remembered 300", "argument --remembered: '300'; an integer from 0 to 256"),
        ("--remembered 3", "--remembered without --cost-ratio"),
        ("grpo --score-variance 3", "--score-variance without --cost-ratio"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
    assert main(["explain", *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1


# -------------------- of a run


def run_folder(folder: Path, records: list[dict[str, Any]]) -> Path:
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def step(number: int, sampling_s: float, training_s: float) -> dict[str, Any]:
    return {"kind": "step", "step": number, "sampling_s": sampling_s, "training_s": training_s, "num_completions_issued": 40,
            "num_completions_kept": 10}  # fmt: skip


def evaluated(number: int, rates: list[float | None], k: int = 4) -> dict[str, Any]:
    return {"kind": "eval", "step": number, "k": k, "avg_at_k": 0.5, "stderr": 0.1, "pass_at_k": {}, "per_prompt": rates}


EARLY, LATE = [0.0] * 6, [0.0, 0.25, 0.25, 0.5, None, 1.0]


def test_a_run_says_what_training_costs_and_how_hard_its_prompts_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """30 s for 80 generated completions, 9 s for 20 trained ones: a ratio of 1.2."""
    run = run_folder(tmp_path, [evaluated(0, EARLY), step(1, 10.0, 4.0), step(2, 20.0, 5.0), evaluated(2, LATE)])
    assert main(["explain", "reinforce-ada-balance", "--of", str(run), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)[0]["efficiency"]
    found, reference = (efficiency(p, posteriors([0.0, 0.25, 0.25, 0.5, 1.0], 4)) for p in (preset("reinforce-ada-balance"), REFERENCE))
    assert row["population"] == "this run"
    assert row["per_cost"] == pytest.approx(found.per_cost(1.2) / reference.per_cost(1.2), rel=1e-12)
    assert main(["explain", "--of", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Training on a completion took 1.2 times as long as generating one." in out
    assert "The held-out pass rate after step 2 was 0.4" in out
    assert all(len(line) <= 120 for line in out.splitlines())
    assert main(["explain", "reinforce-ada-balance", "--of", str(run), "--cost-ratio", "1e6", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)[0]["efficiency"]
    assert row["per_cost"] == pytest.approx(row["per_trained"], rel=1e-4)


@pytest.mark.parametrize(
    ("records", "flags", "says"),
    [
        ([step(1, 1.0, 1.0)], "", "no evaluation of at least 2 completions a prompt"),
        ([step(1, 1.0, 1.0), evaluated(1, [None, None])], "", "no evaluation of at least 2 completions a prompt"),
        ([step(1, 1.0, 1.0), evaluated(1, LATE, k=1)], "", "no evaluation of at least 2 completions a prompt"),
        ([evaluated(0, LATE)], "", "no step that sampled and trained"),
        ([step(1, 1.0, 1.0), evaluated(1, LATE)], "--population 1,2", "--population with --of; one of the two"),
        ([step(1, 1.0, 1.0), evaluated(1, LATE)], "--remembered 300", "argument --remembered: '300'"),
    ],
)
def test_runs_that_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], records: list[dict[str, Any]], flags: str, says: str
) -> None:
    run = run_folder(tmp_path, records)
    assert main(["explain", "--of", str(run), *flags.split()]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1


def test_a_log_with_other_values_than_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rates outside [0, 1] and seconds that are no numbers are left out."""
    odd = {**step(2, 10.0, 4.0), "sampling_s": "ten", "training_s": None}
    run = run_folder(tmp_path, [step(1, 10.0, 5.0), odd, evaluated(2, [0.25, 7.0, -1.0, 1e300])])
    assert main(["explain", "--of", str(run)]) == 0
    out = capsys.readouterr().out
    assert "took 2 times as long" in out  # 5 s for 20 trained completions, 10 s for 80 generated: the odd step still counts its completions
    assert "The held-out pass rate after step 2 was 0.300" in out  # one prompt, 1 of 4: the prior is (1 + .5) / (4 + 1)
    (run / "log.jsonl").write_text(json.dumps(step(1, -1.0, 1.0)) + "\n" + json.dumps(evaluated(1, LATE)) + "\n")
    assert main(["explain", "--of", str(run)]) == 2
    assert "no step that sampled and trained" in capsys.readouterr().err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--of", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
