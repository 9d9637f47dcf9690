"""reinforce-ada explain: the numbers it prints, to the published digits; its exact program against the operator; what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from reinforce_ada import cli, ops
from reinforce_ada.errors import InputError
from reinforce_ada.explain.effective import binary_advantages, effective_weight
from reinforce_ada.explain.page import POPULATIONS, RATES, WEIGHT_RATES, comparison, comparison_page, explain, page
from reinforce_ada.ops.group_advantages.conventions import binary_pool
from reinforce_ada.sampling import (
    PRESETS,
    AdvantageSpec,
    All,
    Balance,
    Centered,
    Counts,
    First,
    History,
    Policy,
    Positive,
    Rounds,
    Verdict,
    preset,
)
from reinforce_ada.sampling.presets import CONFIGURED

POS, BALANCE, EXACT = "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-exact"
SEVEN = np.array(WEIGHT_RATES)


def close(value: float, printed: str) -> bool:
    """Whether `value` rounds to the printed digits (a half may round either way)."""
    digits = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-digits + 1e-12


def say(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["explain", *line.split()])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


# -------------------- the published tables, from the printout


@pytest.fixture(scope="module")
def printed() -> dict[str, dict[str, list[str]]]:
    """Of `reinforce-ada explain`: title of a table -> policy -> cells."""
    tables = {}
    for block in comparison_page(comparison(), POPULATIONS).split("\n\n")[1:-1]:
        (title, *_), *rows = (re.split(r"\s{2,}", line) for line in block.splitlines())
        tables[title] = {label.rstrip("*"): cells for label, *cells in rows}
    return tables


@pytest.mark.parametrize(
    ("policy", "row"),
    [
        ("grpo, group_size 4, scale none", ".75 .75 .75 .75 .75 .75 .75"),
        ("grpo", "2.41 2.18 1.84 1.74 1.84 2.18 2.41"),
        (POS, "5.88 2.80 1.23 .97 1.15 1.58 1.73"),
        (BALANCE, "7.17 3.95 1.35 1.00 1.35 3.95 7.17"),
        (f"{BALANCE}, scale pool", "34.0 12.6 2.92 1.98 2.92 12.6 34.0"),  # 2.9247
        (EXACT, "1 1 1 1 1 1 1"),
        (f"{POS}, objective mean", "1 1 1 1 1 1 1"),
    ],
)
def test_weights(printed: dict, policy: str, row: str) -> None:
    assert all(close(float(cell), x) for cell, x in zip(printed["w(p)"][policy], row.split(), strict=True))


@pytest.mark.parametrize(
    ("table", "policy", "row"),  # at .02 .1 .3 .5 .8 .95; "-" where nothing is published
    [
        ("E[N]", POS, "25.5 13.6 8.5 - 8.0 8.0"),
        ("E[N]", BALANCE, "30.9 21.0 10.3 - 13.4 27.3"),
        ("E[N]", f"{POS}, decide_every 1", "23.9 10.2 4.8 4.1 4.0 4.0"),
        ("E[N]", f"{BALANCE}, decide_every 1", "30.5 18.1 7.1 5.5 10.1 25.7"),
        ("P(signal)", POS, ".476 .966 1.00 - .83 .34"),
        ("P(signal)", BALANCE, ".476 .966 1.00 - 1.00 .806"),
        ("P(signal)", f"{POS}, decide_every 1", ".476 .966 .992 .937 .590 .185"),
        ("P(signal)", f"{BALANCE}, decide_every 1", ".476 .966 1.00 - 1.00 .806"),
        ("P(signal)", f"{POS}, decide_every 1, min_pool 0", ".456 .866 .700 .500 .200 .050"),
        ("bias", POS, ".016 .030 .009 - .000 .000"),
        ("bias", BALANCE, ".004 .032 .028 - -.038 -.016"),
        ("bias", f"{POS}, decide_every 1", ".031 .065 .036 .011 .000 .000"),
        ("bias", f"{BALANCE}, decide_every 1", ".007 .054 .060 .000 -.071 -.027"),
    ],
)
def test_costs_signals_and_biases(printed: dict, table: str, policy: str, row: str) -> None:
    cells = printed[table][policy]
    assert all(x == "-" or close(float(cell), x) for cell, x in zip(cells, row.split(), strict=True))


@pytest.mark.parametrize(
    ("policy", "row"),
    [
        ("grpo, group_size 4, scale none", ".380 .600 .430"),
        ("grpo", ".526 .778 .587"),
        ("grpo, group_size 16", ".647 .882 .710"),
        ("grpo, group_size 32", ".743 .939 .802"),
        (POS, ".739,16.9 .919,11.1 .592,8.1"),
        (BALANCE, ".743,21.1 .939,14.7 .802,19.6"),
        (f"{BALANCE}, decide_every 1", ".743,19.1 .939,11.9 .802,17.4"),
        (f"{POS}, decide_every 1", ".725,14.3 .875,7.6 .452,4.1"),
    ],
)
def test_populations(printed: dict, policy: str, row: str) -> None:
    for cell, x in zip(printed["P(signal), E[N]"][policy], row.split(), strict=True):
        assert all(close(float(value), y) for value, y in zip(cell.split(", "), x.split(","), strict=False))


def table_of(page: str, title: str) -> dict[str, list[str]]:
    """Of docs/: first cell -> other cells of the table whose first line starts so."""
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    lines = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return {label: cells for label, *cells in ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines)}


def test_the_page_on_statistics_has_the_printed_weights(printed: dict) -> None:
    rows = table_of("statistics.md", "w(p)")
    of = {
        "GRPO, 4 completions, mean baseline": "grpo, group_size 4, scale none",
        "`grpo` (8 completions, ÷ std)": "grpo",
        "the same ÷ pool std": f"{BALANCE}, scale pool",
        **{f"`{name}`": name for name in (POS, BALANCE, EXACT)},
    }
    assert rows.keys() == of.keys()
    for label, cells in rows.items():
        assert [float(cell) for cell in cells] == [float(cell) for cell in printed["w(p)"][of[label]]]


def test_the_page_on_policies_has_every_preset() -> None:
    assert {f"`{name}`" for name in PRESETS} == set(table_of("policies.md", "name | propose"))


def test_every_preset_has_its_row(printed: dict) -> None:
    assert set(PRESETS) <= set(printed["w(p)"])
    assert [len(row) for row in printed["E[N]"].values()] == [len(RATES)] * len(printed["w(p)"])


# -------------------- the exact program


def test_the_formula_is_the_operators() -> None:
    """binary_advantages against ops.group_advantages over every small pool and group, every baseline, scale, ddof and class weight."""
    pools = [(k, w, a, b) for k, w in itertools.product(range(5), range(4)) for a in range(k + 1) for b in range(w + 1) if a + b and k + w]
    k, w, a, b = (np.array(column, dtype=np.float64) for column in zip(*pools, strict=True))
    rewards = torch.tensor([r for _, _, x, y in pools for r in [1.0] * x + [0.0] * y], dtype=torch.float64)
    group_of = torch.tensor([i for i, (_, _, x, y) in enumerate(pools) for _ in range(x + y)])
    rng = np.random.default_rng(0)
    weights = rng.uniform(0, 3, (len(pools), 2))
    baselines = ("pool", "group", "leave-one-out", rng.uniform(0.1, 0.9, len(pools)))
    for baseline, scale, ddof, class_weights in itertools.product(baselines, ("none", "pool", "group"), (0, 1), (None, weights)):
        up, down = binary_advantages(AdvantageSpec(baseline, scale, ddof, 1e-3, class_weights), k, w, a, b)
        expected = ops.group_advantages(
            rewards, group_of, pool=binary_pool(k, w), scale=scale, ddof=ddof, eps=1e-3, backend="reference",
            baseline=baseline if isinstance(baseline, str) else torch.from_numpy(baseline),
            class_weights=None if class_weights is None else torch.from_numpy(class_weights),
        )  # fmt: skip
        ours = torch.where(rewards == 1, torch.from_numpy(up)[group_of], torch.from_numpy(down)[group_of])
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", [Positive(1), Positive(2), Balance(2, 2), Balance(1, 3)], ids=str)
def test_objective_mean_is_exact_in_every_cell(rule: Positive | Balance) -> None:
    """w(p) = 1 for every round size, cap, decide_every, min_pool and group size: 4 x 72 cells."""
    for (size, rounds), every, min_pool, group_size in itertools.product(((8, 4), (5, 3), (8, 8)), (1, 2, 3, 8), (2, 4, 7), (2, 5)):
        policy = dataclasses.replace(
            preset(EXACT), decide=rule, allocate=Rounds(size, rounds), decide_every=every, min_pool=min_pool, group_size=group_size
        )
        np.testing.assert_allclose(effective_weight(policy)(SEVEN), 1, rtol=1e-11)


def test_group_sizes_up_to_64() -> None:
    for n in (2, 3, 7, 16, 64):
        np.testing.assert_allclose(effective_weight(preset("grpo", group_size=n, objective="mean"))(SEVEN), 1, rtol=1e-10)
        mean = effective_weight(preset("grpo", group_size=n, scale="none"))
        np.testing.assert_allclose(mean(SEVEN), 1 - 1 / n, rtol=1e-10)
        np.testing.assert_allclose(mean.objective(SEVEN), (1 - 1 / n) * SEVEN, rtol=1e-10)
        rloo = effective_weight(preset("grpo", group_size=n, scale="none", baseline="leave-one-out"))
        np.testing.assert_allclose(rloo(SEVEN), 1, rtol=1e-10)


def test_nonlinear_objectives_are_near_where_signal_is_sure() -> None:
    """Plug-in, so biased: by less than 5 % in the middle; towards p = 0 the log objective loses the pools without a success."""
    for objective, slope in (("log", lambda p: 1 / p), ("power", lambda p: 0.5 / p**0.5)):
        alpha = {"alpha": 0.5} if objective == "power" else {}
        w = effective_weight(preset(BALANCE, objective=objective, max_rounds=16, min_pool=32, **alpha))
        middle = np.array([0.3, 0.5, 0.7, 0.9])
        np.testing.assert_allclose(w(middle), slope(middle), rtol=0.05)
    assert effective_weight(preset(BALANCE, objective="log"))(np.array([0.02]))[0] < 1 / 0.02


def test_the_integral_and_the_ends() -> None:
    w = effective_weight(preset(BALANCE))
    p = np.linspace(0, 1, 20_001)
    by_trapezoid = np.concatenate([[0], np.cumsum((w(p)[1:] + w(p)[:-1]) / 2 * np.diff(p))])
    np.testing.assert_allclose(w.objective(p[::1000]), by_trapezoid[::1000], rtol=1e-7, atol=1e-12)
    assert np.isfinite(w(np.array([0.0, 1.0]))).all()
    np.testing.assert_allclose(w(np.array([0.0, 1.0])), w(np.array([1e-9, 1 - 1e-9])), rtol=1e-6)


def test_variance_and_noise_by_hand() -> None:
    """GRPO with two completions and a mean baseline: factor 1/(4 p) + 1/(4 q) where they differ, 0 elsewhere."""
    w, p = effective_weight(preset("grpo", group_size=2, scale="none")), np.array([0.2, 0.5])
    factor, mixed = 0.25 / p + 0.25 / (1 - p), 2 * p * (1 - p)
    np.testing.assert_allclose(w.variance(p), mixed * factor**2 - 0.25, rtol=1e-12)
    np.testing.assert_allclose(w.noise(p), mixed * (0.25 + 0.25) / 4, rtol=1e-12)


def test_an_order_dependent_selection_is_simulated() -> None:
    """First 4 of an adaptive pool: against a direct simulation of the process at one rate."""
    policy = dataclasses.replace(preset(POS, decide_every=1), select=First())
    w = effective_weight(policy)
    assert w.simulated
    assert not any(effective_weight(preset(name)).simulated for name in ("grpo", "dapo", POS, BALANCE, EXACT))
    p, rng, total, num = 0.3, np.random.default_rng(4), 0.0, 20_000
    for _ in range(num):
        draws = rng.random(32) < p
        stop = next((n for n in range(4, 33) if policy.verdict(Counts(int(draws[:n].sum()), int(n - draws[:n].sum()))) is Verdict.STOP), 32)
        mean, kept = draws[:stop].mean(), draws[:4]
        total += sum((1 - mean) / p if x else mean / (1 - p) for x in kept) / 4
    assert w(np.array([p]))[0] == pytest.approx(total / num, rel=0.03)


def test_class_weights() -> None:
    """Only what is correct counts: w is the part of the correct; both halves add up."""
    whole, up, down = (
        effective_weight(dataclasses.replace(preset(BALANCE), weight=Centered("pool", class_weights=c)))(SEVEN)
        for c in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0))
    )
    np.testing.assert_allclose(whole, effective_weight(preset(BALANCE))(SEVEN), rtol=1e-14)
    np.testing.assert_allclose(up + down, whole, rtol=1e-12)
    assert up[0] > down[0]


def test_each_cap_has_its_weight() -> None:
    small, big = (effective_weight(preset(BALANCE), cap)(SEVEN) for cap in (8, 32))
    assert small[0] < big[0]
    np.testing.assert_allclose(effective_weight(preset(EXACT), 11)(SEVEN), 1, rtol=1e-12)


# -------------------- what cannot be said, and what is said besides


def test_a_batch_wide_scale_has_no_weight() -> None:
    e = explain(preset("grpo", scale="batch"))
    assert e.weight is None
    assert any("couples prompts" in note for note in e.notes)
    assert "w(p)  " not in page(e, POPULATIONS).split("population")[0].split("\n\n")[-2]
    assert set(e.at(RATES)) == {"samples", "signal", "bias", "pass_rate_bias"}


def test_thresholds_that_binary_rewards_do_not_straddle() -> None:
    with pytest.raises(InputError, match=r"positive_threshold 1.5; one in \[0, 1\) is needed"):
        effective_weight(preset(POS, positive_threshold=1.5))


@pytest.mark.parametrize(
    ("policy", "note"),
    [
        (preset("dapo"), "refill: w is per prompt that enters"),
        (preset(EXACT), "loss_agg seq-mean-token-sum"),
        (preset(BALANCE, scale="pool"), "the std is the pool's"),
        (dataclasses.replace(preset(POS), select=First()), "simulated: the selection depends on the order"),
    ],
)
def test_notes(policy: Policy, note: str) -> None:
    assert any(n.startswith(note) or note in n for n in explain(policy).notes)
    assert explain(preset(BALANCE)).notes == ()


def rule_of_mine(counts: Counts, /) -> Verdict:
    """Stop when one class has a lead of three."""
    return Verdict.STOP if abs(counts.correct - counts.wrong) >= 3 else Verdict.CONTINUE


@dataclasses.dataclass(frozen=True)
class Remembering(Rounds):
    """As many as the memory says: half of the cap without one."""

    needs_memory = True

    def budgets(self, histories: Sequence[History], /) -> Sequence[int]:
        return [self.cap // 2 if h == History() else self.cap for h in histories]


def test_a_rule_of_ones_own() -> None:
    policy = dataclasses.replace(preset(EXACT), decide=rule_of_mine, select=All(), allocate=Remembering(8, 4))
    e = explain(policy, "mine")
    np.testing.assert_allclose(e.weight(SEVEN), 1, rtol=1e-12)
    text = page(e, POPULATIONS)
    assert "decide    rule_of_mine: Stop when one class has a lead of three." in text
    assert "numbers are for a prompt not seen before, up to 16 completions" in text
    assert e.cap == 16
    assert max(e.at(RATES)["samples"]) <= 16


# -------------------- the command


def test_flags_are_the_keys_of_a_policy(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "--help")
    assert code == 0
    assert all(f"--{key.replace('_', '-')}" in out for key in CONFIGURED)
    assert "w(p) says which prompts a policy learns from" in out
    assert not any(flag in out for flag in ("--schedule", "--memory-decay", "--memory-from"))  # what the numbers do not depend on


def test_the_printout_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, f"{POS} --decide-every 1 --population 1,2 3,0.5")
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == POS
    assert "  asked     decide is asked after every completion and at the cap of 32, once 4 have a score" in lines
    assert any(line.split() == ["0.10", "10.2", "0.966", "+0.065", "2.20", "0.40"] for line in lines)
    assert any(line.split() == ["Beta(1,", "2)", "0.875", "7.6"] for line in lines)
    assert any(line.startswith("  Beta(3, 0.5)") for line in lines)


def test_a_policy_that_asks_nothing_and_keeps_all_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = say(capsys, "knapsack")
    assert "  keeps     every scored completion; one is correct when its reward exceeds 0.7" in out.splitlines()
    assert "  asked  " not in out


def test_json_has_everything_unrounded(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = say(capsys, f"{BALANCE} --json")
    (record,) = json.loads(out)
    at = record["p"].index(0.02)
    assert close(record["w"][at], "7.17")
    assert max(map(abs, record["pass_rate_bias"])) < 1e-12 < max(map(abs, record["bias"]))
    assert len(set(map(len, (record[name] for name in ("p", "samples", "signal", "bias", "w", "f", "variance", "noise"))))) == 1
    assert record["parts"]["decide"].startswith("Balance(num_correct=2, num_wrong=2): Stop at")
    _, out, _ = say(capsys, "--json")
    assert {r["policy"] for r in json.loads(out)} > set(PRESETS)


def test_a_configuration_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'[sampling]\npreset = "{POS}"\nround_size = 4\n')
    _, out, _ = say(capsys, f"{file} --max-rounds 3 --objective mean --json")
    (record,) = json.loads(out)
    assert record["parts"]["allocate"].startswith("Rounds(round_size=4, max_rounds=3)")
    np.testing.assert_allclose(record["w"], 1, rtol=1e-12)


def test_the_folder_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text(f'[sampling]\npreset = "{POS}"\nmemory_decay = 0.9\n')
    assert say(capsys, f"{tmp_path}")[1].startswith(f"{POS}\n")
    (tmp_path / "grpo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert say(capsys, "grpo")[1].startswith("grpo\n")  # a preset is one, whatever folders there are


def test_class_weights_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    _, plain, _ = say(capsys, f"{BALANCE} --json")
    _, doubled, _ = say(capsys, f"{BALANCE} --class-weights 2,2 --json")
    np.testing.assert_allclose(json.loads(doubled)[0]["w"], 2 * np.array(json.loads(plain)[0]["w"]))


@pytest.mark.parametrize("what", ["", EXACT])
def test_the_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path, what: str) -> None:
    pytest.importorskip("matplotlib")
    code, _, _ = say(capsys, f"{what} --figure {tmp_path / 'curves.png'}")
    assert code == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("reinforce-ada-bal", "preset = 'reinforce-ada-bal'; one of grpo, dapo,"),
        ("nothing.toml", "config: cannot read nothing.toml"),
        ("tests", "config: cannot read tests/config.toml"),
        ("--decide-every 1", "--decide-every without a policy; a preset or a configuration file is needed"),
        ("grpo --round-size 3", "unknown override 'round_size'"),
        ("grpo --group-size 1001", "a cap of 1001 completions per prompt; at most 1000"),
        ("grpo --population 1", "--population 1; two finite numbers of at least 1e-06"),
        ("grpo --population 0,1", "--population 0,1; two finite numbers of at least 1e-06"),
        ("grpo --population 1e308,1e308", "two finite numbers of at least 1e-06 and at most 1e+06"),
        ("grpo --class-weights 1e308,1 --json", "two finite numbers of at least 0 and at most 1e+06"),
        ("grpo --class-weights x,1", "--class-weights x,1; two finite numbers of at least 0"),
        (f"{EXACT} --class-weights 1,1", "--class-weights with ObjectiveWeight"),
        (f"{POS} --objective mean --decide-every 1 --min-pool 0", "a pool that can end after 1 draw"),
        ("grpo --figure curves.pdf", "--figure curves.pdf; a file name that ends with .png"),
        ("grpo --figure no/such/folder.png", "in a folder that exists"),
        ("grpo --decide-evry 1", "unknown flag '--decide-evry'; did you mean '--decide-every'?"),
        ("grpo dapo", "unexpected argument 'dapo'"),
    ],
)
def test_errors_are_one_line(capsys: pytest.CaptureFixture[str], line: str, error: str) -> None:
    code, out, said = say(capsys, line)
    assert (code, out) == (2, "")
    assert error in said
    assert said.count("\n") == 1
