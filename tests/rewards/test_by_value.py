"""Rewards that no worker can import: they travel with their code."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import RewardPool, exact_match
from reinforce_ada.rewards.by_value import ByValue, is_importable, name_of
from reinforce_ada.rewards.names import load_reward
from reinforce_ada.rewards.unit_tests import UnitTests
from reinforce_ada.types import Prompt

SCRIPT = """
    import re
    import sys
    import numpy as np
    from reinforce_ada.rewards import RewardPool
    from reinforce_ada.rewards.by_value import ByValue, is_importable
    from reinforce_ada.types import Completion, CompletionId, Prompt

    print("top", file=sys.stderr)
    BONUS = 0.25

    class Judge:
        def __init__(self, right):
            self.right = right

        def __call__(self, prompt, completion):
            return score(prompt, completion) * (completion == self.right)

    def score(prompt, completion):
        return float(np.sum([bool(re.search("[0-9]", completion)), BONUS]))

    def scored(reward):
        assert not is_importable(reward)
        prompt = Prompt("p", text="?", data={"answer": 1})
        texts = ["none", "7", "8"]
        with RewardPool(ByValue(reward), num_workers=1, imports_main=False) as pool:
            pool.submit([prompt] * 3, [Completion(CompletionId(0, "p", i), [1], [0.0], text, "stop", 0) for i, text in enumerate(texts)])
            found = []
            while len(found) < 3:
                found += pool.poll(1.0)
        return [event.reward for event in sorted(found, key=lambda event: event.completion.id.index)]

    factor = 2.0
    print(scored(score), scored(Judge("8")), scored(lambda prompt, completion: factor * len(completion)))
"""


@pytest.mark.parametrize("form", ["a script", "without a file, as a notebook"])
def test_functions_of_the_program_itself_score_in_workers(tmp_path: Path, form: str) -> None:
    """The script has no `if __name__ == "__main__":`, and its top level runs once."""
    code = textwrap.dedent(SCRIPT)
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, str(tmp_path / "script.py")] if form == "a script" else [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.returncode) == ("[0.25, 1.25, 1.25] [0.0, 0.0, 1.25] [8.0, 2.0, 2.0]\n", 0), done.stderr
    assert done.stderr.count("top") == 1


CELL = """
    from reinforce_ada.rewards import RewardPool, WeightedSum, exact_match
    from reinforce_ada.types import Completion, CompletionId, Prompt

    RIGHT = "7"

    def score(prompt, completion):
        return float(completion == RIGHT)

    rewards = [score, lambda prompt, completion: 2.0, WeightedSum([(1.0, score), (0.5, exact_match)]), exact_match, "exact"]
    prompt = Prompt("p", data={"answer": "7"})
    for reward in rewards:
        with RewardPool(reward, num_workers=1) as pool:
            pool.submit([prompt], [Completion(CompletionId(0, "p", 0), [1], [0.0], "7", "stop", 0)])
            found = []
            while not found:
                found += pool.poll(1.0)
            print(found[0].reward, end=" ")
"""


@pytest.mark.parametrize("form", ["-c", "-"])
def test_a_pool_takes_what_was_typed_into_an_interpreter(tmp_path: Path, form: str) -> None:
    """No worker can import this program: there is no file of it. A notebook is the same."""
    code = textwrap.dedent(CELL)
    command, typed = ([sys.executable, "-c", code], "") if form == "-c" else ([sys.executable, "-"], code)
    done = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.stdout, done.stderr) == ("1.0 2.0 1.5 1.0 1.0 ", "")


def test_what_can_be_imported_is() -> None:
    def inner(prompt: Any, completion: str) -> float:
        return 0.0

    assert is_importable(exact_match)
    assert name_of(exact_match) == "reinforce_ada.rewards.exact:exact_match"
    assert not is_importable(inner)
    assert name_of(inner) == "test_by_value:test_what_can_be_imported_is.<locals>.inner"
    assert not is_importable(partial(exact_match))
    assert name_of(partial(exact_match)) == "reinforce_ada.rewards.exact:<partial exact_match>"
    assert name_of(UnitTests()) == "reinforce_ada.rewards.unit_tests:<UnitTests>"
    assert not is_importable(lambda prompt, completion: 0.0)


def test_it_has_what_the_reward_has() -> None:
    """The pool asks for these: what a call that ran out of time is worth, the batch form, what a completion answers."""
    reward = ByValue(UnitTests())
    assert reward.timed_out(None, "") == 0.0
    assert not any(hasattr(reward, name) for name in ("batch", "answer"))
    assert pickle.loads(pickle.dumps(ByValue(exact_match)))(Prompt("p", data={"answer": "1"}), "1") == 1.0


@pytest.mark.parametrize("name", ["__main__:score", "my:<partial score>"])
def test_a_reward_of_another_program_is_refused_in_words_that_fit(name: str) -> None:
    with pytest.raises(InputError, match=r"belongs to the program that called reinforce_ada\.train; that program is needed"):
        load_reward(name)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (3, "reward: builtins:<int> is not callable"),
        (lambda completion: 0.0, r"reward: test_by_value:<lambda>: too many positional arguments"),
    ],
)
def test_what_cannot_be_called_is_refused(reward: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ByValue(reward)


def test_what_cannot_be_pickled_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(InputError, match="does not pickle"):
        RewardPool(ByValue(lambda prompt, completion: float(file.fileno())))


def test_without_cloudpickle_the_line_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reinforce_ada.errors.is_installed", lambda name: name != "cloudpickle")
    with pytest.raises(InputError, match=r"^reward: cloudpickle is not installed; pip install .*; or move the reward to a module"):
        ByValue(exact_match)
