"""The examples of --help do what they say: those that need no network, GPU, server or hour are run, in the order of the commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from reinforce_ada import cli
from test_commands import COMMANDS, examples, help_of

# What is not run, by a part of the line, and why.
LEFT_OUT = {
    "Qwen/": "a model of the hub",
    "serve ": "servers of vLLM",
    "--engine openai": "servers of vLLM",
    "push ": "the hub",
    "bench": "minutes, which tests/test_bench.py spends",
}
LIGHT = shlex.split("--engine transformers --eval-prompts 4 --eval-k 2 --prompts-per-step 2 --lora-rank 2")
STUDY = """
name = "sums"
baseline = "grpo-8"
seeds = [0, 1]
learning_rates = [1e-3]
budget = {steps = 1}
shared = {model = "tiny", engine = "transformers", eval_prompts = 4, prompts_per_step = 2}
[[arm]]
name = "grpo-8"
preset = "grpo"
[[arm]]
name = "balance"
preset = "reinforce-ada-balance"
"""


def light(line: list[str], place: str) -> list[str]:
    """The example with a small model, adapters, few steps and a folder of its own where it trains, and few prompts where it evaluates."""
    if line[0] == "eval":
        return [*line, "--engine", "transformers", "--eval-prompts", "4", *([] if "--greedy" in line else ["--eval-k", "2"])]
    if line[0] != "train":
        return line
    if "--resume" in line:
        return [*line, "--steps", "2"]
    model = [] if {"--model", "--config"} & set(line) else ["--model", "tiny"]
    out = [] if {"--out", "--seed"} & set(line) else ["--out", place]  # that with --seed goes where its file says
    return [*line, *model, *out, *([] if "--steps" in line else ["--steps", "1"]), *LIGHT]


def write_files(folder: Path) -> None:
    """The files that the examples name, but for those of a study."""
    questions = "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": a + b}) + "\n" for a in range(4) for b in range(4))
    for name in ("problems.jsonl", "sums.jsonl", "test.jsonl"):
        (folder / name).write_text(questions)
    (folder / "gsm8k.toml").write_text('[task]\ntask = "test.jsonl"\n')
    (folder / "sums.toml").write_text('[task]\ntask = "sums.jsonl"\n')
    (folder / "run.toml").write_text('[model]\nmodel = "tiny"\n[task]\ntask = "problems.jsonl"\n[run]\nout = "runs/example"\n')
    (folder / "rates.csv").write_text("0.2\n0.7\n")


def prepare(folder: Path, command: str) -> None:
    """What the examples of a command expect from those before."""
    if command == "eval":
        for name in ("MODEL", "OTHER"):
            (folder / name).symlink_to("runs/example/model")
    if command == "study":
        (folder / "sums.toml").write_text(STUDY)
    if command == "export":
        (folder / "runs/mine/checkpoints/step-000030").symlink_to("step-000002")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_examples_of_all_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    num_run = 0
    for command in COMMANDS:
        prepare(tmp_path, command)
        for line in examples(help_of(capsys, command)):
            if any(part in shlex.join(line) for part in LEFT_OUT):
                continue
            code, said = cli.main(light(line, f"runs/{num_run}")), capsys.readouterr()
            assert code == 0, f"{shlex.join(line)}: {said.err}"
            num_run += 1
            if line[0] == "eval" and "--json" in line:
                (tmp_path / "before.json").write_text(said.out)
    assert num_run >= 30
    assert (tmp_path / "curves.png").is_file()
    assert (tmp_path / "merged-30/config.json").is_file()
    assert (tmp_path / "studies/sums/page.md").is_file()
