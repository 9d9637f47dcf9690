"""Every Python block and command line of README.md and docs/, and what examples/ holds, run as they stand."""

from __future__ import annotations

import re
import shlex
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from chat_server import chat_server
from loaded_tasks import load_task
from reinforce_ada import cli, config
from reinforce_ada.commands import bench, completion, doctor, evaluate, explain, export, push, report, serve, simulate, study, train
from reinforce_ada.driver import run
from reinforce_ada.engines.function import FunctionEngine
from reinforce_ada.rewards import RewardPool
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.simulate.command import settings
from reinforce_ada.study.settings import read_study
from reinforce_ada.training.models import tiny_tokenizer
from reinforce_ada.types import Prompt

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


BLOCKS = [
    pytest.param(page, text, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, text in enumerate(blocks(page, "python"))
    if page.stem != "trl"  # tests/integrations/test_trl_pages.py runs this one, where TRL is imported
]
COMMANDS = [
    pytest.param(line, id=f"{page.stem}: {line.split('#')[0].strip()}")
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.splitlines()
    if line.startswith("reinforce-ada ")
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own, in which modules are found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_rewards", None)


@pytest.fixture
def server(monkeypatch):
    """The server that docs/own_loop.md asks."""
    with chat_server(fail=2**40, refuse=2**40) as started:
        monkeypatch.setenv("SERVER", started.url)
        yield started


def given() -> dict[str, object]:
    """What the text around a fragment in docs/ has introduced: a step that waits for its sampler to be run."""
    prompts = [Prompt(f"q{i}", text=f"{i}", data={"answer": str(i)}) for i in range(3)]
    return {
        "sampler": AdaptiveSampler(prompts, preset("grpo", group_size=2), step=3),
        "engine": FunctionEngine(lambda prompts, seeds: [p.text for p in prompts]),
        "rewards": lambda prompt, text: float(text == prompt.data["answer"]),
        "run": run,
        "step": 3,
        "config": {"seed": 0},
    }


@pytest.mark.parametrize(("page", "text"), BLOCKS)
def test_python_blocks_run(page, text, here, server):
    (here / "my_rewards.py").write_text("def reward(prompt, completion):\n    return float(completion.strip() == prompt.data['answer'])\n")
    (here / "runs/mine").mkdir(parents=True)
    names = {} if page.name == "README.md" else given()  # README.md is where people start: its blocks stand alone
    exec(compile(text, f"{page.name}", "exec"), {**names, "__name__": "__main__"})


def test_readme_has_the_two_blocks_for_use_as_a_library(here, capsys):
    sampler, operators = blocks(ROOT / "README.md", "python")
    exec(operators, {"__name__": "__main__"})
    reward = float(re.match(r"reward (\d\.\d\d), loss", capsys.readouterr().out)[1])
    assert reward > 0.5  # 1/16 at first: the loop learns
    exec(sampler, {"__name__": "__main__"})
    signal = dict(re.findall(r"^(\S+): .*signal in (\d+)%", capsys.readouterr().out, re.MULTILINE))
    assert int(signal["reinforce-ada-balance"]) > int(signal["grpo"])


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_are_accepted(line, monkeypatch):
    seen = []
    for command in (train, evaluate, explain, export, push, report, serve, simulate, study, bench, completion, doctor):
        monkeypatch.setattr(command, "run", lambda given: seen.append(given) or 0)
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert len(seen) == 1


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.values[0].split()[1] == "simulate"])
def test_simulations_have_settings(line, monkeypatch):
    found = []
    monkeypatch.setattr(simulate, "run", lambda given: found.extend(settings(given.policies, given.schedule, given.window)) or 0)
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert found


def test_readme_shows_every_command():
    shown = {line.values[0].split()[1] for line in COMMANDS if line.id.startswith("README")}
    assert shown == {"train", "eval", "export", "push", "study", "explain", "simulate", "report", "bench", "doctor"}


def test_the_example_study_loads():
    study = read_study(EXAMPLES / "study.toml")
    assert [arm.name for arm in study.arms] == ["grpo-8", "balance", "memory"]


def test_the_example_configuration_loads_and_gives_a_task(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    c = config.load(Path("train.toml"))
    task = load_task(c.task, tiny_tokenizer(), c.run.seed, c.run.data_seed)
    assert len(task.held_out) == c.task.eval_prompts
    assert len({p.data["question"] for p in islice(task.train(0), 20)}) == 20
    assert preset(c.sampling.preset, group_size=c.sampling.group_size, round_size=c.sampling.round_size).cap == 32
    RewardPool(c.task.reward).close()  # the reward imports, and takes a prompt and a text


@pytest.mark.parametrize(("text", "reward"), [("9", 1.0), (" 9\n", 1.0), ("8", 0.2), ("nine", 0.0), ("", 0.0), ("-9", 0.0)])
def test_the_example_reward(monkeypatch, text, reward):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from my_reward import score

    assert score(SimpleNamespace(data={"answer": 9}), text) == reward
