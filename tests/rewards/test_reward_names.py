"""What `--reward` may say: names, weights, sums; what a name needs of a record; and which threshold makes sense with it."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_reward_pool import score

from reinforce_ada import config
from reinforce_ada.errors import InputError
from reinforce_ada.rewards import RewardPool, WeightedSum, exact_match, names, number_match
from reinforce_ada.training.tasks import load_records
from reinforce_ada.types import Prompt

PARTS = {
    "number": [("number", 1.0)],
    "number:1.0": [("number", 1.0)],
    " number : 1": None,
    "number:0.5, my.py:form:-.25": [("number", 0.5), ("my.py:form", -0.25)],
    "number,exact:2e-1": [("number", 1.0), ("exact", 0.2)],
    "json:loads": [("json:loads", 1.0)],  # the module of the standard library, as no weight is called so
    "number:score": [("number:score", 1.0)],
    "pkg.mod:Class.method:3": [("pkg.mod:Class.method", 3.0)],
    "/data/Smith, John/my.py:form": [("/data/Smith, John/my.py:form", 1.0)],
    "number,/data/Smith, John/my.py:form:2": [("number", 1.0), ("/data/Smith, John/my.py:form", 2.0)],
    "C:nan": [("C:nan", 1.0)],
    "": None,
    ",": None,
    "number,": None,
    "number,,exact": None,
    "numbr": "did you mean 'number'?",
    "numbr,exact": "did you mean 'number'?",
    "numbr:1": "did you mean 'number'?",
    "number:0": "a number other than 0",
    "number:1e99": "at most 1e+06 is needed",
    "my.py": "or the form",
    "./a,b.py": "or the form",
}


@pytest.mark.parametrize("spec", PARTS)
def test_the_parts_of_a_text(spec: str) -> None:
    expected = PARTS[spec]
    if isinstance(expected, list):
        assert names.parts_of(spec) == expected
        assert names.parts_of(",".join(map(str, names.parts_of(spec)))) == expected
        return
    with pytest.raises(InputError, match=r"^--reward: reward ") as caught:
        names.parts_of(spec)
    assert (expected or "or the form") in str(caught.value)


@given(st.text("number,:.0123456789-e/ py\n", max_size=30))
def test_any_text_has_parts_or_is_refused_in_one_line(text: str) -> None:
    try:
        parts = names.parts_of(text)
    except InputError as error:
        parts = [names.Part(str(error))]
    assert all(part.reward and part.weight and "\n" not in str(part) for part in parts)


@pytest.fixture
def form(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text("def form(prompt, text):\n    return float(text.startswith('#### '))\n")
    return f"{tmp_path / 'mine.py'}:form"


def test_a_weighted_sum(form: str) -> None:
    reward = names.load_reward(f"number,{form}:0.25,exact:-0.125")
    prompt = Prompt("p", data={"answer": "7"})
    assert [reward(prompt, text) for text in ("#### 7", "7", "#### 8", "8", "7 apples")] == [1.25, 0.875, 0.25, 0.0, 1.0]
    with RewardPool(f"number,{form}:0.25", num_workers=1) as pool:
        assert score(pool, ["#### 7", "7", "#### 8", ""], data={"answer": 7}) == [1.25, 1.0, 0.25, 0.0]


def test_a_weighted_sum_is_an_object_too() -> None:
    reward = pickle.loads(pickle.dumps(WeightedSum([(1.0, number_match), (0.5, exact_match)])))
    assert reward(Prompt("p", data={"answer": "7"}), "7") == 1.5
    for weight in (0.0, float("nan"), float("inf"), -1e7):
        with pytest.raises(InputError, match="a number other than 0 and at most"):
            WeightedSum([(weight, number_match)])
    with pytest.raises(InputError, match="is not callable"):
        WeightedSum([(1.0, 3)])  # type: ignore[list-item]


def test_a_part_that_fails_is_a_failure_of_the_sum(form: str) -> None:
    with RewardPool(f"number,{form}", num_workers=1, retries=0) as pool:
        (reason,) = score(pool, ["7"], data={})
    assert "InputError: reward number: prompt '0' has no answer" in str(reason)


def test_names_of_the_same_rewards_in_two_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_this_folder.py").write_text("")
    assert names.whole_reward("number:1.0, my.py:form:0.50") == f"number,{tmp_path}/my.py:form:0.5"
    assert names.whole_reward("of_this_folder:form") == f"{tmp_path}/of_this_folder.py:form"
    assert names.whole_reward("") == names.comparable("") == ""
    for same in (f"number,{tmp_path}/my.py:form:.5", "number:1, my:form:0.5"):
        assert names.comparable(same) == "number,my:form:0.5"
    assert names.comparable("exact,my:form:0.5") != names.comparable("number,my:form:0.5")
    assert names.without_folders(f"number,{tmp_path}/my.py:form:.5") == "number,my.py:form:0.5"


@pytest.mark.parametrize(
    ("spec", "threshold", "needed"),
    [
        ("number", 0.7, ""),
        ("number", 0.0, ""),
        ("number", 1.0, "number gives 0 to 1, and positive_threshold is 1;"),
        ("number", -0.1, "number gives 0 to 1, and positive_threshold is -0.1;"),
        ("number:0.5", 0.7, "number:0.5 gives 0 to 0.5, and positive_threshold is 0.7;"),
        ("number:0.5,exact:0.5", 0.7, ""),
        ("number,exact:-1", -0.5, ""),
        ("number:2,my.py:form", 5.0, ""),  # nobody knows what a function gives
    ],
)
def test_a_threshold_that_every_completion_or_none_exceeds_is_refused(spec: str, threshold: float, needed: str) -> None:
    if not needed:
        names.check_threshold(spec, threshold)
        return
    with pytest.raises(InputError, match=r"--positive-threshold sets it$") as caught:
        names.check_threshold(spec, threshold)
    assert needed in str(caught.value)


@pytest.mark.parametrize(
    ("record", "reward", "needed"),
    [
        ({"answer": "#### 7"}, "number", ""),
        ({}, "my.py:form", ""),
        ({}, "number", "has no answer"),
        ({}, "my.py:form,number:2", "has no answer"),
        ({"answer": "seven"}, "number", "record 1; reward number: the record's answer 'seven'; an answer with a number"),
        ({"answer": "seven"}, "exact", ""),
        ({"answer": {"value": 3}}, "number", "has the answer {'value': 3}"),
        ({"answer": True}, "exact", "has the answer True"),
        ({"answer": True}, "number", "has the answer True"),
    ],
)
def test_a_record_that_the_reward_cannot_use_is_refused_at_load(
    tmp_path: Path, record: dict[str, object], reward: str, needed: str
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", **record}) + "\n" for i in range(4)))
    task = config.TaskConfig(task=str(path), reward=reward, num_examples=0, eval_prompts=1)
    if not needed:
        assert load_records(task, 0, 0).reward == reward
        return
    with pytest.raises(InputError, match=r"^task: ") as caught:
        load_records(task, 0, 0)
    assert needed in str(caught.value)


def test_the_functions_of_the_page_for_trl_and_verl() -> None:
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    block = page.partition("## In TRL and verl")[2].partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["trl_reward"](prompts=["?", "?"], completions=["7", "#### 8"], answer=["7", "7"], completion_ids=[]) == [1.0, 0.0]
    assert found["compute_score"]("gsm8k", "The answer is 1,234.", "1234", {}) == 1.0


def test_the_page_names_every_reward() -> None:
    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| `\w+(?:\(\))?` \|", page.partition("## Rewards by name")[2], re.MULTILINE)
    assert sorted(rows) == sorted(names.BUILT_IN)
