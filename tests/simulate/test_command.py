"""`reinforce-ada simulate`: its table, its files, and its messages about arguments that it cannot use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_fit import write_run

from reinforce_ada import cli
from reinforce_ada.simulate import command
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.population import BetaRates
from reinforce_ada.simulate.study import published_settings, run_study

SMALL = ["--prompts", "6", "--seeds", "2", "--slots", "12", "--max-tokens", "200"]


def simulate(capsys, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["simulate", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_published_comparison_is_the_default(capsys) -> None:
    code, out, err = simulate(capsys, *SMALL)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Beta(1, 2), 6 prompts on 12 slots, 2 seeds (± is their spread)"
    assert lines[1].split() == ["policy", "schedule", "wall", "s", "relative", "Mtok", "wasted", "signal", "samples/prompt", "utilisation"]
    assert len(lines) == 2 + len(published_settings()) + 1
    assert lines[2].split()[:2] == ["reinforce-ada-balance", "rounds"]
    assert "1.000 ± 0.000" in lines[2]


def test_policies_schedules_windows_and_populations_multiply(capsys, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    rates = tmp_path / "rates.csv"
    rates.write_text("0.2\n0.5\n0.7\n")
    options = ["--schedule", "rounds", "stream", "--window", "4", "posterior:0.3", "--population", "beta:1,1", rates, "--json", path]
    code, out, _ = simulate(
        capsys, "grpo:group_size=4", "reinforce-ada-pos", *options, "--seeds", "2", "--slots", "8", "--engine-step-ms", "5"
    )
    assert code == 0
    beta, given = json.loads(path.read_text())
    assert (beta["population"], beta["num_prompts"], given["population"], given["num_prompts"]) == ("Beta(1, 1)", 64, "rates.csv", 3)
    assert beta["engine"]["step_ms"] == 5
    assert beta["engine"]["slots"] == 8
    assert [(r["policy"], r["schedule"], r["window"]) for r in beta["rows"]] == [
        (policy, schedule, window)
        for policy in ("grpo:group_size=4", "reinforce-ada-pos")
        for schedule, window in (("rounds", ""), ("stream", "4"), ("stream", "posterior:0.3"))
    ]
    assert beta["rows"][0]["relative"] == 1
    assert len(beta["rows"][0]["wall_s"]) == 2
    assert out.count("samples/prompt") == 2


def test_the_figure_is_drawn(capsys, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for populations in (["beta:1,2"], ["beta:1,2", "beta:2,1", "beta:1,1"]):
        path = tmp_path / f"{len(populations)}.png"
        assert simulate(capsys, *SMALL, "--population", *populations, "--figure", path)[0] == 0
        assert path.read_bytes().startswith(b"\x89PNG")


def test_names_in_the_figure_are_no_formulas(capsys, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rates = tmp_path / "$x_{$ [bold] 😀.csv"
    rates.write_text("0.5\n0.2\n")
    assert simulate(capsys, *SMALL, "--population", rates, "--figure", tmp_path / "$a_{$.png")[0] == 0
    assert (tmp_path / "$a_{$.png").read_bytes().startswith(b"\x89PNG")


def test_in_the_figure_no_two_families_look_alike() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from reinforce_ada import plots
    from reinforce_ada.simulate.figure import draw_signal

    policies = ("grpo", "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-balance:decide_every=1", "reinforce-ada-exact")
    settings = command.settings(policies, (), ("4", "adaptive", "posterior"))
    study = run_study(settings, BetaRates(), EngineModel(slots=8), LengthModel(max_tokens=20), num_prompts=2, num_seeds=1)
    axes = plots.new_figure(4, 4, dpi=100).subplots()
    draw_signal(axes, study.record())
    lines = [line for line in axes.get_lines() if line.get_label()[0] != "_"]
    assert len(lines) == 4 * 5 - 1  # both variants of balance are one family in rounds
    assert len({(x.get_color(), x.get_marker(), x.get_markerfacecolor()) for x in lines}) == len(lines)


def test_a_run_gives_the_models_and_flags_override_them(capsys, tmp_path: Path) -> None:
    write_run(tmp_path, schedule="rounds", window=None, num_steps=3)
    to = tmp_path / "study.json"
    code, out, _ = simulate(capsys, "reinforce-ada-balance", "--fit", tmp_path, "--seeds", 1, "--sigma", 0.1, "--prompts", 8, "--json", to)
    assert code == 0
    assert out.startswith("fitted to ")
    (study,) = json.loads(to.read_text())
    assert study["engine"]["step_ms"] == pytest.approx(6.0)
    assert study["lengths"]["sigma"] == 0.1
    assert study["lengths"]["max_tokens"] == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--window 8", "simulate: --schedule or --window without a preset; a preset is needed; such as reinforce-ada-balance"),
        ("grpo --window x", "simulate: window 'x'; a number, adaptive, posterior or posterior:SURVIVAL is needed"),
        ("grpoo", "preset: unknown name 'grpoo'"),
        ("grpo --population no.csv", "simulate: cannot read no.csv: No such file or directory; a file of pass rates is needed"),
        ("grpo --prompts 0", "simulate: argument --prompts: '0'; an integer from 1 to 10000000"),
        ("grpo --slots 0", "simulate: argument --slots: '0'; an integer from 1 to 1000000"),
        ("grpo --json no/where.json", "simulate: --json no/where.json; a file in a folder that exists is needed"),
        ("grpo --json .", "simulate: --json .; a file in a folder that exists is needed"),
        ("grpo --figure study.pdf", "simulate: --figure study.pdf; a file name that ends with .png is needed"),
        ("grpo --schedule rounds --window 8", "simulate: --window with --schedule rounds; rounds have no window; leave one of them out"),
        ("grpo --fit nowhere", "simulate --fit: nowhere holds no run with two finished steps"),
    ],
)
def test_what_cannot_be_used_is_one_line(capsys, arguments: str, message: str) -> None:
    code, out, err = simulate(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("reinforce-ada")
    assert err.count("\n") == 1


def test_help_names_every_flag_and_needs_no_numpy(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--help"])
    out = capsys.readouterr().out
    flags = ("--schedule", "--window", "--population", "--prompts", "--slots", "--seeds", "--fit", "--json", "--figure")
    assert all(flag in out for flag in (*flags, "--engine-step-ms", "--engine-busy-ms", "--median-wrong", "--sigma-prompt"))
    assert "posterior:0.3" in out
    code = "import sys; from reinforce_ada.simulate import command; print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_line_of_progress_is_for_terminals(monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "_EVERY_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, _, err = simulate(capsys, "grpo", "--schedule", "rounds", *SMALL)
    assert code == 0
    assert "[1/2] 0:00 grpo rounds, seed 0: " in err
    assert err.endswith("\r\033[K")
