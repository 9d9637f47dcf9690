"""The benchmarks from the command to the page and the figure: what is said of them is what was measured."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from reinforce_ada import cli
from reinforce_ada.bench import command, figure, machine, measure, page
from reinforce_ada.bench.case import Goal
from reinforce_ada.bench.catalogue import OPS, all_cases, choose
from reinforce_ada.bench.record import Results
from reinforce_ada.errors import InputError
from reinforce_ada.ops import _dispatch
from toy_bench import a_case, a_record

ROOT = Path(__file__).parent.parent


# -------------------- the command


def test_list_names_the_cases(capsys):
    assert cli.main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(case) for case in all_cases()]
    assert cli.main(["bench", "policy_loss", "--list", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(case) for case in choose(["policy_loss"], quick=True)]


def test_one_case_from_the_command_to_the_figure(tmp_path, capsys):
    to = tmp_path / "mine.json"
    assert cli.main(["bench", "group_advantages", "--quick", "--case", "mean, s", "--json", str(to)]) == 0
    out, progress = capsys.readouterr()
    progress = re.sub("other programs.*\n", "", progress)
    names = [str(case) for case in choose(["group_advantages"], "mean, s", quick=True)]
    assert [line.split(maxsplit=2)[2][: len(name)] for line, name in zip(progress.splitlines(), names, strict=True)] == names
    assert "[1/2] 0:0" in progress
    assert "≥ 4 × best" in out
    assert "of 4 goals hit" in out
    assert "--quick: the goals are meant for the full shapes" in out
    results = Results.load(to)
    assert [r.label for r in results.records] == names
    assert all(r.rounds >= measure.MIN_ROUNDS and r.backend in _dispatch.BACKENDS for r in results.records)
    shown = {"bincount", "index_add fp32", "index_add float64", "verl's loop", "streaming its bytes"}
    assert results.records[0].others.keys() == shown
    assert {
        "device",
        "threads",
        "cpu",
        "isa",
        "cores",
        "python",
        "versions",
        "commit",
        "started",
        "seconds",
        "quick",
    } <= results.about.keys()
    assert results.about["threads"] == 1
    assert results.about["versions"]["torch"] == torch.__version__
    assert to.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_wrong_results_end_with_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "choose", lambda *_, **__: [a_case(lambda: torch.zeros(4))])
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.7, 0.0, 0.0))
    assert command.run([], "", device="cpu", quick=False, to=tmp_path / "b.json") == 1
    out, progress = capsys.readouterr()
    assert "WRONG RESULTS, not timed: policy_loss/square/fp32/N=4" in out
    assert "other programs are running here (load 1.7)" in progress
    assert "[1/1] 0:0" in progress
    assert "WRONG: policy_loss" in progress
    assert Results.load(tmp_path / "b.json").records == []


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    def interrupted() -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "choose", lambda *_, **__: [a_case(), a_case(interrupted)])
    assert cli.main(["bench", "--json", str(tmp_path / "b.json")]) == 130
    assert [r.name for r in Results.load(tmp_path / "b.json").records] == ["square"]


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda", "--json", str(tmp_path / "b.json")]) == 2
    expected = "reinforce-ada: bench: --device cuda; a CUDA device that torch can use; see reinforce-ada doctor\n"
    assert capsys.readouterr().err == expected


# -------------------- results, page, figure

ABOUT = {
    "started": "2026-01-02", "quick": False, "seconds": 600, "device": "cpu", "cpu": "Some CPU", "isa": "avx2", "cores": 4, "memory_gb": 16,
    "huge_pages": "always", "system": "Linux x86_64", "python": "3.11.0", "versions": {"torch": "2.13.0"}, "commit": "abc123",
}  # fmt: skip


@pytest.fixture
def results() -> Results:
    return Results(ABOUT, [a_record(Goal("speedup", 3.5, "inductor"), Goal("time", 1.2, "reading its bytes"))])


def test_results_survive_the_disk(results, tmp_path):
    results.save(tmp_path / "r.json")
    loaded = Results.load(tmp_path / "r.json")
    assert loaded.records == results.records
    assert loaded.about == {"format": 1, **ABOUT}


@pytest.mark.parametrize("text", ["", "{}", '{"about": {"format": 1}, "records": [{}]}', '{"about": {"format": 0}, "records": []}'])
def test_what_is_no_result_is_said(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=r"bench: .*r.json (holds no results|has format 0)"):
        Results.load(tmp_path / "r.json")
    with pytest.raises(InputError, match="holds no results"):
        Results.load(tmp_path / "absent.json")


TEMPLATE = "{{tally}}|{{summary}}|{{machine}}|{{goals}}|{{slower}}|{{measured}}|{{absent}}|{{others}}"


def test_the_page_has_every_part(results):
    gpu = dataclasses.replace(results, about={**ABOUT, "device": "Some GPU"})
    found = page.render(TEMPLATE, results, [gpu])
    assert found.startswith("1 of 2 goals hit|| operator |")
    for part in (
        "|- device: cpu, one thread\n- processor: Some CPU, 4 cores, 16 GB, kernels for avx2",
        "huge pages: always",
        "| **miss** |",
        "| numpy | 0.80",
        "### policy_loss",
        "- liger: needs a GPU",
        "### Some GPU, Some CPU",
        "#### policy_loss",
    ):
        assert part in found
    assert "--quick" not in found
    assert "not the numbers to quote" in page.render(TEMPLATE, dataclasses.replace(results, about={**ABOUT, "quick": True}))
    for template in (TEMPLATE.replace("{{goals}}", ""), TEMPLATE + "{{speed}}"):
        with pytest.raises(InputError, match="the template has"):
            page.render(template, results)


def test_the_figure_is_drawn(results, tmp_path):
    figure.draw(results, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000
    figure.draw(dataclasses.replace(results, records=[]), tmp_path / "empty.png")


def test_the_figure_of_the_page_has_few_rows_and_every_measurement():
    """The least and the largest of each row are those of the table above the figure."""
    rows = figure.rows_of(Results.load(ROOT / "benchmarks/results/cpu.json").records)
    assert len(rows) == 11
    naive, fastest = rows["token_logprobs", "forward with entropy"].values()
    assert (min(naive), max(naive)) == (pytest.approx(40.69, abs=0.01), pytest.approx(53.59, abs=0.01))
    assert (min(fastest), max(fastest)) == (pytest.approx(5.04, abs=0.01), pytest.approx(5.69, abs=0.01))
    assert [len(values) for values in rows["group_advantages", "sorted"].values()] == [9, 9]  # mean, deviation and pool given


def test_the_machine_is_described():
    found = machine.about("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"] != "unknown"


def test_the_documentation_is_what_the_results_give():
    """`make bench-docs` writes it."""
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "benchmarks/write_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.texts().items():
        assert path.read_text() == text, f"{path.name} is not what make bench-docs writes"
    assert (ROOT / "docs/benchmarks.png").is_file()


def test_every_operator_has_its_pytest_benchmark():
    found = {path.stem.removeprefix("bench_"): path.read_text() for path in (ROOT / "benchmarks").glob("bench_*.py")}
    del found["sampler"], found["rewards"]  # no operators, and no torch
    assert set(found) == set(OPS)
    assert all(f'OP = "{op}"\n' in text for op, text in found.items())
