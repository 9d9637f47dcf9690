"""The report: what is drawn is what the log and the store hold; the table's numbers are literal."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reinforce_ada import plots
from reinforce_ada.errors import InputError
from reinforce_ada.report import draw, report, summary_table
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.run_report import figure as panels_of
from reinforce_ada.run_report.reading import PassRates, Run, read_run
from reinforce_ada.types import Completion, CompletionId, Failed, Group, Outcome, Pool, Prompt, SamplingResult, Scored

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed")

HEADER = {
    "kind": "run",
    "cap": 8,
    "config": {"sampling": {"preset": "grpo"}, "task": {"task": "data/sums.jsonl"}, "model": {"model": "tiny"}},
}


def step_record(step: int, reward: float | None, signal: float, used: float, issued: float) -> dict[str, Any]:
    """A step of two prompts."""
    return {
        "kind": "step", "step": step, "first_round_reward": reward, "signal_fraction": signal, "samples_per_prompt": used,
        "issued_per_prompt": issued, "num_prompts": 2.0, "num_completions_committed": 2 * used, "num_completions_issued": 2 * issued,
        "num_voids": 1.0, "tokens_committed": 1000.0, "tokens_wasted": 100.0, "sampling_s": 2.5, "training_s": 1.0, "loss": 0.1,
        "completion_length_mean": 10.0 * used, "truncated_fraction": reward,
    }  # fmt: skip


def eval_record(step: int, per_prompt: Sequence[float | None]) -> dict[str, Any]:
    known = [share for share in per_prompt if share is not None]
    stderr = float(np.std(known, ddof=1) / math.sqrt(len(known)))
    pass_at_k = {"1": float(np.mean(known)), "4": max(known)}
    return {
        "kind": "eval",
        "step": step,
        "k": 4,
        "avg_at_k": pass_at_k["1"],
        "stderr": stderr,
        "per_prompt": list(per_prompt),
        "pass_at_k": pass_at_k,
    }


RECORDS = [
    HEADER,
    eval_record(0, [0.0, 0.25, 0.5]),
    step_record(1, 0.25, 0.5, 4.0, 6.0),
    step_record(2, None, 0.0, 8.0, 8.0),
    step_record(3, 0.75, 1.0, 4.0, 4.0),
    eval_record(3, [0.25, 0.5, 1.0]),
]


def pool(step: int, prompt_id: str, rewards: Sequence[float | None]) -> Pool:
    """None is a void."""
    outcomes: list[Outcome] = []
    for index, reward in enumerate(rewards):
        id_ = CompletionId(step, prompt_id, index)
        if reward is None:
            outcomes.append(Failed(id_, step, "no"))
        else:
            outcomes.append(Scored(Completion(id_, np.arange(2), np.zeros(2), "t", "stop", step), reward))
    known = [r for r in rewards if r is not None]
    correct = sum(r > 0.5 for r in known)
    moments = (float(np.mean(known)), 0.0, min(known), max(known)) if known else (0.0, 0.0, math.inf, -math.inf)
    return Pool(
        Prompt(prompt_id), tuple(outcomes), correct, len(known) - correct, rewards.count(None), *moments, len(rewards), "satisfied", 32
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS) + '{"kind": "step", "st')  # killed mid-line
    pools = {
        1: [pool(1, "a", [0, 0, 0, 1]), pool(1, "b", [None, None])],
        2: [pool(2, "a", [1, 1]), pool(2, "b", [1, 1])],
        3: [pool(3, "a", [0, 1, None]), pool(3, "b", [1, 1])],
    }
    with RolloutStore(folder / "rollouts.sqlite") as store:
        for step, of_step in pools.items():
            store.append([outcome for p in of_step for outcome in p.outcomes])
            store.finish_step(step, SamplingResult(tuple(of_step), tuple(Group(p, p.scored[:1]) for p in of_step), {}))
    return folder


def drawn(name: str, *runs: Run) -> Any:
    """The axes with one panel of these runs."""
    axes = plots.new_figure(5, 4, dpi=100).subplots()
    panels_of.draw_panel(axes, name, runs, plots.LIGHT)
    axes.figure.canvas.draw()
    return axes


def labelled(axes: Any) -> dict[str, Any]:
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def test_report_writes_the_figure_and_the_rollouts(run_dir: Path) -> None:
    import pyarrow.parquet as pq

    figure, rollouts = report(run_dir)
    assert (figure, rollouts) == (run_dir / "figure.png", run_dir / "rollouts.parquet")
    header = figure.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")) == (1575, 1110)
    assert pq.read_metadata(rollouts).num_rows == 15


def test_a_report_may_be_drawn_while_the_run_goes_on(run_dir: Path) -> None:
    with RolloutStore(run_dir / "rollouts.sqlite"):
        assert len(report(run_dir)) == 2


def test_the_reward_panel_holds_the_logs_numbers(run_dir: Path) -> None:
    run = read_run(run_dir)
    axes = drawn("reward", run)
    assert run.title == "grpo · sums.jsonl · tiny"
    handles = labelled(axes)
    line = handles["training prompts, first round"]
    np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(line.get_ydata(), [0.25, np.nan, 0.75])
    points, caps, (bars,) = handles["held-out Avg@4 ± standard error"]
    np.testing.assert_array_equal(points.get_xdata(), [0, 3])
    np.testing.assert_allclose(points.get_ydata(), [0.25, 1.75 / 3])
    spans = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    np.testing.assert_allclose(spans, [2 * RECORDS[1]["stderr"], 2 * RECORDS[5]["stderr"]])
    assert len(caps) == 2
    assert axes.get_ylim()[0] == 0.0


def test_the_signal_and_sample_panels_hold_the_logs_numbers(run_dir: Path) -> None:
    signal, samples = (drawn(name, read_run(run_dir)) for name in ("signal", "samples"))
    np.testing.assert_array_equal(signal.lines[0].get_ydata(), [0.5, 0.0, 1.0])
    handles = labelled(samples)
    np.testing.assert_array_equal(handles["used"].get_ydata(), [4, 8, 4])
    vertices = handles["issued, then wasted"].get_paths()[0].vertices
    assert {(1.0, 4.0), (1.0, 6.0), (3.0, 4.0)} <= {tuple(v) for v in vertices}
    assert [t.get_text() for t in samples.texts] == ["cap 8"]
    assert samples.get_ylim()[1] > 8


def bars(axes: Any) -> dict[str, list[float]]:
    return {group.get_label(): [bar.get_height() for bar in group] for group in axes.containers}


def test_the_pass_rates_are_of_the_first_and_last_quarter_without_voids(run_dir: Path) -> None:
    axes = drawn("pass_rates", read_run(run_dir))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none", "under ¼", "¼ to ½", "½ to ¾", "¾ or more", "all"]
    assert bars(axes) == {"step 1": [0, 0, 1, 0, 0, 0], "step 3": [0, 0, 0, 0.5, 0, 0.5]}  # 1/4, and a pool of voids; 1/2 and 2/2
    assert axes.get_ylim() == (0, 1)


@pytest.mark.parametrize(
    ("correct", "wrong", "place"),
    [(0, 1, 0), (0, 32, 0), (1, 31, 1), (7, 25, 1), (8, 24, 2), (15, 17, 2), (16, 16, 3), (23, 9, 3), (24, 8, 4), (31, 1, 4), (3, 0, 5)],
)
def test_the_classes_of_pass_rates(correct: int, wrong: int, place: int) -> None:
    shares = panels_of.class_shares(PassRates(1, 1, ((correct, wrong, 3), (0, 0, 9))))
    assert shares.tolist() == [float(i == place) for i in range(6)]


def test_runs_are_drawn_beside_each_other_by_what_they_generated(run_dir: Path, tmp_path: Path) -> None:
    write_run_of(tmp_path / "other", {"sampling": {"preset": "reinforce-ada-balance"}})
    runs = read_run(run_dir), read_run(tmp_path / "other")
    handles = labelled(axes := drawn("reward_by_cost", *runs))
    assert set(handles) == {"grpo", "reinforce-ada-balance"}
    np.testing.assert_array_equal(handles["grpo"].get_xdata(), [12, 28, 36])  # issued until each step
    held_out = [points for points, *_ in axes.containers]
    assert [points.get_xdata().tolist() for points in held_out] == [[0, 36], [0, 36]]
    assert [points.get_color() for points in held_out] == [handle.get_color() for handle in handles.values()]
    assert len({handle.get_color() for handle in handles.values()}) == 2
    assert axes.get_xlabel() == "completions generated"
    assert bars(drawn("pass_rates", *runs)) == {"grpo, step 3": [0, 0, 0, 0.5, 0, 0.5]}  # the other has no store
    panels_of.draw_figure(runs, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG"


def test_what_was_generated_until_a_step_does_not_depend_on_the_order_of_the_log() -> None:
    steps = [{"kind": "step", "step": step, "num_completions_issued": number} for step, number in ((2, 5), (1, 3), (4, None), (7, 2.0))]
    assert Run("run", {}, steps, [], None, None).generated_until([0, 1, 2, 3, 4, 7, 9]).tolist() == [0, 3, 8, 8, 8, 10, 10]


@given(st.lists(st.one_of(st.just(math.nan), st.floats(0, 1)), min_size=1, max_size=40), st.integers(1, 9))
def test_the_running_mean_is_that_of_its_window(values: list[float], window: int) -> None:
    found = panels_of.running_mean(np.array(values), window)
    for i, mean in enumerate(found):
        span = [v for v in values[max(0, i - window + 1) : i + window] if not math.isnan(v)]
        assert mean == pytest.approx(sum(span) / len(span) if span else math.nan, nan_ok=True)


def test_the_table(run_dir: Path) -> None:
    # per-prompt gains .25, .25, .5: mean 1/3, sample standard deviation .1443, over sqrt(3)
    assert summary_table(run_dir) == [
        ("held-out Avg@4 before", "0.250 ± 0.144 after step 0"),
        ("held-out Avg@4 after", "0.583 ± 0.220 after step 3"),
        ("difference, paired by prompt", "+0.333 ± 0.083"),
        ("pass@4", "0.500 → 1.000"),
        ("steps", "3 of 6 prompts in all"),
        ("prompts with signal", "50%"),
        ("samples", "32 of 48 (67% of the cap 8), 5.3 per prompt"),
        ("wasted", "4 (11.1% of those issued)"),
        ("voids", "3"),
        ("tokens", "3,000 committed, 300 wasted"),
        ("length", "60.0 tokens on average, 50.0% cut at max_tokens"),  # over 8, 16 and 8 completions; the second step knows no share
        ("time", "8 s sampling, 3 s training"),
    ]


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([eval_record(0, [0.0, 1.0])], ["held-out Avg@4"]),
        ([eval_record(0, [0.0, 1.0]), eval_record(2, [0.0, None, 1.0])], ["held-out Avg@4 before", "held-out Avg@4 after", "pass@4"]),
        ([step_record(1, 0.5, 1.0, 4.0, 4.0)], ["steps", "prompts with signal", "samples", "wasted", "voids", "tokens", "length", "time"]),
    ],
)
def test_an_unfinished_run_is_reported_as_far_as_it_goes(tmp_path: Path, records: list[dict[str, Any]], names: list[str]) -> None:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [name for name, _ in summary_table(tmp_path)] == names
    assert draw(tmp_path).stat().st_size > 0


@pytest.mark.parametrize("content", [None, "", json.dumps(HEADER) + "\n"])
@pytest.mark.parametrize("call", [draw, report, summary_table])
def test_a_folder_without_a_run_is_one_line(tmp_path: Path, content: str | None, call: Any) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"^report: .* holds no log.jsonl with a step or an evaluation; a folder that"):
        call(tmp_path)
    assert not (tmp_path / "figure.png").exists()


def test_a_figure_that_cannot_be_written_is_one_line(run_dir: Path) -> None:
    (run_dir / "figure.png").mkdir()
    with pytest.raises(InputError, match=r"^report: cannot write .*figure.png: Is a directory; "):
        draw(run_dir)


def test_without_matplotlib_it_says_what_to_install(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'^report: matplotlib is not installed; pip install "reinforce-ada\[report\]"$'):
        draw(run_dir)


def test_drawing_needs_neither_torch_nor_pyplot(run_dir: Path) -> None:
    code = "import sys; from reinforce_ada.report import draw; draw(sys.argv[1]); print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, str(run_dir)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["$x_{$", r"$\frac{$$", "x[/b]", "a\x1b[2Jb\x07", "\udcff", "😀" * 30, "n" * 250])
def test_names_are_drawn_as_they_are(tmp_path: Path, name: str) -> None:
    """As the folder's own name, and as what the run was given: no formula, no markup, no warning about a character the font lacks."""
    folder = tmp_path / "".join(char for char in name if char not in "/\x1b\x07")[:60]
    write_run_of(folder, {"sampling": {"preset": "grpo"}, "task": {"task": name}, "model": {"model": f"models/{name}"}})
    assert draw(folder).stat().st_size > 10_000
    write_run_of(folder, {})
    assert draw(folder).stat().st_size > 10_000


def write_run_of(folder: Path, config: dict[str, Any]) -> None:
    """A run of two steps without a store."""
    folder.mkdir(exist_ok=True)
    records = [{**HEADER, "config": config}, *RECORDS[1:]]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
