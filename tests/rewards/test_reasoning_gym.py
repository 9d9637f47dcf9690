"""ReasoningGymReward against the dataset's own scoring, here and in a worker."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import ReasoningGymReward, RewardPool, make_entries
from reinforce_ada.types import Completion, CompletionId, Prompt, Scored

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_entries_follow_the_seed() -> None:
    entries = make_entries("chain_sum", 5, 7, **ONE_DIGIT)
    assert entries == make_entries("chain_sum", 5, 7, **ONE_DIGIT)
    assert entries != make_entries("chain_sum", 5, 8, **ONE_DIGIT)
    assert len(entries) == 5
    for entry in entries:
        assert set(entry) == {"question", "answer", "metadata"}
        assert eval(entry["metadata"]["expression"]) == int(entry["answer"])


def test_scores_with_the_datasets_own_rule() -> None:
    (entry,) = make_entries("chain_sum", 1, 7, **ONE_DIGIT)
    reward = ReasoningGymReward("chain_sum", **ONE_DIGIT)
    prompt = Prompt("p", data=entry)
    answer = entry["answer"]
    assert reward(prompt, f" {answer}\n") == 1.0
    assert reward(prompt, f"Adding up. Answer: {answer}") == 1.0
    assert reward(prompt, f"<answer>{answer}</answer>") == 1.0
    assert reward(prompt, str(int(answer) + 100)) < 1.0
    assert reward(prompt, "") == 0.0


def test_scores_the_same_in_a_worker() -> None:
    entries = make_entries("letter_counting", 3, 1)
    prompts = [Prompt(f"p{i}", data=entry) for i, entry in enumerate(entries)]
    texts = [entries[0]["answer"], "no idea", f"answer: {entries[2]['answer']}"]
    reward = ReasoningGymReward("letter_counting")
    completions = [
        Completion(CompletionId(0, p.prompt_id, 0), np.zeros(1), np.zeros(1), text, "stop", 0)
        for p, text in zip(prompts, texts, strict=True)
    ]
    with RewardPool(reward, num_workers=1, timeout_s=1.0) as pool:  # the import takes longer: it is off the clock
        pool.submit(prompts, completions)
        events = []
        while pool.num_pending:
            events += pool.poll(60.0)
    got = {e.id.prompt_id: e.reward for e in events if isinstance(e, Scored)}
    assert got == {p.prompt_id: reward(p, text) for p, text in zip(prompts, texts, strict=True)}
    assert got["p0"] == got["p2"] == 1.0 > got["p1"]


def test_pickles_as_its_arguments() -> None:
    assert len(pickle.dumps(ReasoningGymReward("chain_sum", **ONE_DIGIT))) < 300


def test_an_unknown_dataset_names_the_nearest() -> None:
    for call in (lambda: make_entries("chain_sums", 1, 0), lambda: ReasoningGymReward("chain_sums")):
        with pytest.raises(InputError, match=r"^reasoning_gym: unknown dataset 'chain_sums'; .*did you mean 'chain_sum'\?$"):
            call()


@pytest.mark.parametrize("config", [{"no_such_setting": 1}, {"min_terms": 5, "max_terms": 2}])
def test_settings_the_dataset_refuses_are_one_line(config: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"^reasoning_gym: chain_sum with .*; settings that dataset takes are needed$"):
        ReasoningGymReward("chain_sum", **config)


def test_importing_the_rewards_imports_neither_torch_nor_reasoning_gym() -> None:
    code = "import sys, reinforce_ada.rewards; print(sorted({'torch', 'reasoning_gym'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


HOSTILE = ["", "x", "answer: 2 x 3", "[1,2", "{", "9" * 60, "None", "1/0", "\x00", "-1"]


@pytest.mark.parametrize("dataset", ["prime_factorization", "boxnet", "rush_hour", "graph_color", "chain_sum"])
@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_that_the_scorer_raises_on_is_a_wrong_answer(dataset: str, text: str) -> None:
    (entry,) = make_entries(dataset, 1, 1)
    assert 0.0 <= ReasoningGymReward(dataset)(Prompt("p", data=entry), text) < 1.0


def test_a_failure_of_the_scorer_itself_comes_through() -> None:
    (entry,) = make_entries("prime_factorization", 1, 1)
    with pytest.raises(KeyError, match="answer"):
        ReasoningGymReward("prime_factorization")(Prompt("p", data={k: v for k, v in entry.items() if k != "answer"}), "2")
