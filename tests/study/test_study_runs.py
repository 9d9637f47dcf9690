"""Real studies on a tiny model: killed and resumed, in shards, with an arm that fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest

from reinforce_ada import cli
from reinforce_ada.study import runs
from reinforce_ada.study.plan import cells_of
from reinforce_ada.study.prediction import Prediction
from reinforce_ada.study.settings import read_study
from reinforce_ada.training import launch, models
from reinforce_ada.training.log import read_log

QUESTIONS = [f"{a} plus {b} is" for a in range(4) for b in range(3)]
FILE = """\
name = "tiny"
seeds = [0, 1]
learning_rates = [1e-3]
baseline = "grpo"
[budget]
steps = 3
completions_per_step = 24
[shared]
model = "{world}/llama"
dtype = "float32"
device = "cpu"
engine = "transformers"
task = "{world}/task.jsonl"
reward = "{world}/reward.py:even_length"
num_examples = 0
eval_prompts = 2
eval_k = 2
eval_every = 2
max_tokens = 4
max_model_len = 128
[[arm]]
name = "grpo"
preset = "grpo"
[[arm]]
name = "balance"
preset = "reinforce-ada-balance"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, a task, a reward, and the file of a study."""
    folder = tmp_path_factory.mktemp("world")
    models.build_tiny(folder / "llama", models.tiny_tokenizer(QUESTIONS), [(QUESTIONS[0], "3")], seed=0, num_updates=1)
    (folder / "task.jsonl").write_text("".join(json.dumps({"prompt": q, "answer": "3"}) + "\n" for q in QUESTIONS))
    (folder / "reward.py").write_text("def even_length(prompt, completion):\n    return float(len(completion) % 2 == 0)\n")
    (folder / "s.toml").write_text(FILE.format(world=folder))
    return folder


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[list[Sequence[str]]]:
    """Runs are trained in this process, which has imported everything, and draw no figure; the test of the kill starts a real one."""
    begun: list[Sequence[str]] = []

    def start(arguments: Sequence[str], output: int, num_jobs: int) -> Mock:
        begun.append(arguments)
        with os.fdopen(os.dup(output), "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = cli.main(arguments)
        return Mock(poll=lambda: status, wait=lambda: status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "start", start)
        patch.setattr(launch, "finish", lambda out, display: None)
        yield begun


def study(world: Path, out: Path, *more: str, file: str = "s.toml") -> int:
    return cli.main(["study", str(world / file), "--out", str(out), *more])


def without_times(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    for run in found["runs"]:
        for evaluation in run["evaluations"]:
            del evaluation["costs"]["seconds"]
    return found


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("studies") / "undisturbed"
    assert study(world, out) == 0
    return out


def copy_without(undisturbed: Path, out: Path, *runs: str) -> None:
    """A study as it was before these runs."""
    shutil.copytree(undisturbed, out)
    (out / "results.json").unlink()
    for run in runs:
        shutil.rmtree(out / run)


def test_the_results(undisturbed: Path) -> None:
    assert {"plan.json", "results.json", "page.md", "figure.png", "untrained", "grpo", "balance"} <= {p.name for p in undisturbed.iterdir()}
    found = without_times(undisturbed)
    assert [(run["arm"], run["seed"], [e["step"] for e in run["evaluations"]]) for run in found["runs"]] == [
        (arm, seed, [0, 2, 3]) for seed in (0, 1) for arm in ("grpo", "balance")
    ]
    per_step = found["predictions"][0]["prompts_per_step"]
    assert per_step == 3  # of 8 completions each, to make 24
    costs = found["runs"][0]["evaluations"][-1]["costs"]
    assert (costs["steps"], costs["generated_completions"], costs["trained_completions"]) == (3, 72, 72)
    logged = [r for r in read_log(undisturbed / "grpo/lr0.001/seed0/log.jsonl") if r["kind"] == "step"]
    assert costs["generated_tokens"] == sum(r["tokens_committed"] + r["tokens_wasted"] for r in logged)
    assert costs["trained_tokens"] == costs["generated_tokens"]


def test_the_untrained_model_is_the_same_for_all_runs_of_a_seed(undisturbed: Path) -> None:
    found = without_times(undisturbed)
    for seed in (0, 1):
        assert len({run["evaluations"][0]["reward"] for run in found["runs"] if run["seed"] == seed}) == 1


def test_a_finished_study_trains_nothing(world: Path, undisturbed: Path, in_this_process: list[Sequence[str]]) -> None:
    before, num_begun = without_times(undisturbed), len(in_this_process)
    assert study(world, undisturbed) == 0
    assert without_times(undisturbed) == before
    assert len(in_this_process) == num_begun


def test_killed_and_resumed(world: Path, undisturbed: Path, tmp_path: Path, in_this_process: list[Sequence[str]]) -> None:
    """The study is killed while it trains the second of its runs; that run's process ends with it."""
    out = tmp_path / "out"
    copy_without(undisturbed, out, "grpo/lr0.001/seed1", "balance")
    command = [sys.executable, "-m", "reinforce_ada", "study", str(world / "s.toml"), "--out", str(out)]
    run = out / "balance/lr0.001/seed0"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(9)]
        assert said[-1] == "[1/3] balance/lr0.001/seed0 begins\n"
        while not (run / "config.toml").exists():
            assert not select.select([process.stdout], [], [], 0.02)[0]  # it says nothing more before the run ends
        process.send_signal(signal.SIGKILL)
    with (run / ".reinforce-ada").open() as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)  # free once the run's process is gone
    assert not (run / "model").exists()
    num_begun = len(in_this_process)
    assert study(world, out) == 0
    assert [arguments[1] for arguments in in_this_process[num_begun:]] == ["--resume", "--config", "--config"]
    assert without_times(out) == without_times(undisturbed)


class FakeProcess:
    """A process that runs until it has been asked three times, or is killed."""

    now: ClassVar[list[FakeProcess]] = []
    most = 0

    def __init__(self, folder: Path, status: int) -> None:
        self.folder, self.status, self.left = folder, status, 3
        self.now.append(self)
        FakeProcess.most = max(FakeProcess.most, len(self.now))

    def poll(self) -> int | None:
        self.left -= 1
        return None if self.left else self.wait()

    def wait(self) -> int:
        if self in self.now:
            self.kill()
            if self.status == 0:
                (self.folder / "model").mkdir(parents=True)
        return self.status

    def kill(self) -> None:
        self.now.remove(self)


@pytest.mark.parametrize("num_jobs", [1, 2, 3, 9])
def test_runs_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_jobs: int) -> None:
    """Four runs, of which the last fails; then the last again, and the user loses patience."""
    (tmp_path / "s.toml").write_text(FILE.format(world=tmp_path))
    cells = cells_of(found := read_study(tmp_path / "s.toml"), [Prediction(arm.name, 1, 8.0, 0.5) for arm in found.arms])
    names = [cell.run.name for cell in cells]

    def start(arguments: Sequence[str], output: int, jobs: int) -> FakeProcess:
        assert jobs == num_jobs
        folder = Path(arguments[-1]).with_suffix("")
        return FakeProcess(folder, int(str(folder).endswith(names[-1])))

    FakeProcess.most, said = 0, list[str]()
    monkeypatch.setattr(runs, "start", start)
    assert runs.execute_all(tmp_path, cells, said.append, num_jobs) == 1
    assert FakeProcess.most == min(num_jobs, 4)
    assert [line for line in said if " begins" in line] == [f"[{i}/4] {name} begins" for i, name in enumerate(names, 1)]
    assert sum(" finished · " in line for line in said) == 3
    assert [line for line in said if " failed: " in line] == [line for line in said if f"{names[-1]} failed: exit status 1: " in line]
    monkeypatch.setattr(runs.time, "sleep", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        runs.execute_all(tmp_path, cells, said.append, num_jobs)
    assert said[-1] == f"[1/1] {names[-1]} begins"
    assert FakeProcess.now == []


def test_shards_share_a_folder(world: Path, undisturbed: Path, tmp_path: Path) -> None:
    copy_without(undisturbed, tmp_path / "out", "grpo/lr0.001/seed1", "balance/lr0.001/seed0")
    for i, num_finished in ((2, 3), (1, 4)):
        assert study(world, tmp_path / "out", "--shard", f"{i}/2") == 0
        assert len(without_times(tmp_path / "out")["runs"]) == num_finished
    assert without_times(tmp_path / "out") == without_times(undisturbed)


def test_an_arm_that_fails(world: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FILE.format(world=world).replace('preset = "reinforce-ada-balance"', f'preset = "grpo"\nloss = "{world}/gone.py:loss"')
    (world / "fails.toml").write_text(text)
    out = tmp_path / "out"
    copy_without(undisturbed, out, "balance")
    assert study(world, out, file="fails.toml") == 1
    said = capsys.readouterr().out
    failed = [line for line in said.splitlines() if " failed: " in line]
    assert [line.split(" failed: ")[0] for line in failed] == ["[1/2] balance/lr0.001/seed0", "[2/2] balance/lr0.001/seed1"]
    assert all("exit status 2: reinforce-ada: " in line and "gone.py" in line for line in failed)
    assert "2 runs failed; the same command tries them again" in said
    whole = without_times(undisturbed)["runs"]
    assert without_times(out)["runs"] == [run for run in whole if run["arm"] == "grpo"]
    assert "2 of 4 runs are not finished" in (out / "page.md").read_text()


@pytest.mark.parametrize("lost", ['"kind": "step", "step": 2', '"kind": "eval"'])
def test_a_log_that_lost_a_line(world: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], lost: str) -> None:
    """The last line with this text is damaged: neither the costs nor the end of such a run are known."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    log = out / "grpo/lr0.001/seed1/log.jsonl"
    before, found, after = log.read_text().rpartition(lost)
    assert found
    log.write_text(before + lost[:-4] + after)
    assert study(world, out) == 0
    assert "grpo/lr0.001/seed1 is left out: its log lacks a step or the last evaluation" in capsys.readouterr().out
    whole = without_times(undisturbed)["runs"]
    assert without_times(out)["runs"] == [run for run in whole if (run["arm"], run["seed"]) != ("grpo", 1)]


def test_a_configuration_that_cannot_be_trained(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "no_model.toml").write_text(FILE.format(world=world).replace("/llama", "/gone"))
    assert study(world, tmp_path / "out", file="no_model.toml") == 2
    error = capsys.readouterr().err
    assert error.startswith("reinforce-ada: study: the untrained model cannot be evaluated: exit status 2: reinforce-ada: model: ")
    assert error.count("\n") == 1


def test_another_study_in_the_folder(world: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "other.toml").write_text(FILE.format(world=world).replace("steps = 3", "steps = 4"))
    assert study(world, undisturbed, file="other.toml") == 2
    assert "has begun with steps=3 (now 4)" in capsys.readouterr().err
