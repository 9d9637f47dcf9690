"""The model card: its numbers are the run's, and whatever a name holds it stays a name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce_ada import config as configuration
from reinforce_ada.training.card import _plain, _yaml, card_text, write_card

STEP = {
    "kind": "step", "num_completions_issued": 40, "tokens_committed": 90, "tokens_wasted": 10, "num_completions_kept": 16,
    "tokens_trained": 50, "sampling_s": 1.5, "training_s": 0.5,
}  # fmt: skip
EVAL = {"kind": "eval", "k": 4, "stderr": 0.125}
RECORDS: list[dict[str, Any]] = [
    {
        "kind": "run",
        "reinforce_ada": "0.1.0",
        "torch": "2.13.0",
        "engine": "TransformersEngine",
        "device": "cpu",
        "cpu": "X, AVX2",
    },
    {**EVAL, "step": 0, "avg_at_k": 0.25, "pass_at_k": {"1": 0.25, "2": 0.4, "4": 0.5}, "per_prompt": [0.0, 0.5, 0.25, None]},
    *({**STEP, "step": step} for step in (1, 2, 3)),
    {**EVAL, "step": 3, "avg_at_k": 0.75, "pass_at_k": {"1": 0.75, "2": 0.8, "4": 1.0}, "per_prompt": [0.5, 1.0, 0.75, None]},
]


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_whole_card() -> None:
    config = configuration.load(None, {"model": "smollm2", "task": "gcd", "steps": 3, "servers": "http://host:1", "out": "elsewhere"})
    text = card_text("my_run", config, RECORDS)
    assert front_matter(text) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0", "tags": ["reinforcement-learning", "reinforce-ada"],
    }  # fmt: skip
    assert "# my\\_run\n" in text
    assert "| Avg@4 | 0.250 ± 0.125 | 0.750 ± 0.125 |" in text
    assert "|  | after step 0 | after step 3 |\n|---|---|---|" in text
    assert "| pass@2 | 0.400 | 0.800 |\n| pass@4 | 0.500 | 1.000 |" in text
    assert "The difference, paired by prompt, is +0.500 ± 0.000." in text  # over the three prompts that have both shares
    for row in ("steps | 3", "completions generated | 120", "tokens generated | 300", "completions trained on | 48", "seconds | 6"):
        assert f"| {row} |" in text
    assert "the preset reinforce-ada-balance of reinforce\\_ada 0.1.0" in text
    assert "torch 2.13.0, engine TransformersEngine, device cpu, cpu X, AVX2" in text
    assert "has the licence apache-2.0." in text


def test_the_configuration_of_the_card_repeats_the_run(tmp_path: Path) -> None:
    """It is whole, but for what belongs to the machine."""
    keys = {"learning_rate": 3e-4, "system_prompt": "Say\n```\nit", "task": "/data/of/me/sums.jsonl", "reward": "/home2/me/my.py:score"}
    of_the_machine = {"servers": "http://host:1", "weights_dir": "/mnt/w", "out": "/mnt/run", "push_to_hub": "me/mine", "track": "x"}
    config = configuration.load(None, {**keys, **of_the_machine, "model": "org/base", "seed": 5, "stop": "]"})
    text = card_text("run", config, RECORDS)
    (fence, toml) = re.search(r"\n(`{4,})toml\n(.*?)\n\1", text, re.DOTALL).groups()
    assert fence == "````"
    (tmp_path / "config.toml").write_text(toml)
    found = configuration.load(tmp_path / "config.toml")
    given = {**keys, "task": str(tmp_path / "sums.jsonl"), "reward": f"{tmp_path / 'my.py'}:score"}  # beside the file, from wherever
    assert found == configuration.load(None, {**given, "model": "org/base", "seed": 5, "stop": "]"})
    for private in ("/data", "home2", "/mnt", "host:1"):
        assert private not in text


def test_a_card_names_every_reward_and_no_folder() -> None:
    keys = {"reward": "number, /home2/me/form.py:form:0.2,/home2/you/b.py:score", "system_prompt": "/no_think"}
    text = card_text("run", configuration.load(None, keys), RECORDS)
    assert 'reward = "number,form.py:form:0.2,b.py:score"' in text
    assert 'system_prompt = "/no_think"' in text  # which is no path
    assert "home2" not in text


@pytest.mark.parametrize("reward", ["__main__:<lambda>", "my:f.<locals>.g", "my:<partial score>", "my:<Judge>"])
def test_a_reward_of_a_program_is_said_to_be_one(reward: str) -> None:
    text = card_text("run", configuration.load(None, {"reward": reward}), RECORDS)
    assert "The reward was a function of the program that called `reinforce_ada.train`." in text


@pytest.mark.parametrize(
    ("evals", "said"),
    [([], "Nothing was held out"), ([0], "| Avg@4 | 0.250 ± 0.125 |\n"), ([0, 3], "paired by prompt")],
)
def test_as_many_evaluations_as_there_are(evals: list[int], said: str) -> None:
    records = [r for r in RECORDS if r["kind"] != "eval" or r["step"] in evals]
    text = card_text("run", configuration.load(), records)
    assert said in text
    assert ("paired by prompt" in text) == (len(evals) == 2)


def test_a_card_of_a_run_that_has_lost_its_log() -> None:
    text = card_text("run", configuration.load(None, {"model": "tiny"}), [])
    assert "base_model" not in front_matter(text)
    assert "It ran with unknown versions" in text
    assert "The licence of the base model tiny is not known here" in text


def test_an_adapter_has_the_card_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("what peft has written")
    write_card(tmp_path, "run", configuration.load(None, {"model": "org/base"}), [])
    text = (tmp_path / "README.md").read_text()
    assert front_matter(text) == {
        "library_name": "peft", "pipeline_tag": "text-generation", "base_model": "org/base",
        "tags": ["reinforcement-learning", "reinforce-ada", "lora"],
    }  # fmt: skip
    assert "An adapter for org/base" in text
    assert "AutoPeftModelForCausalLM" in text


def test_the_base_of_a_second_run_is_that_of_the_first_and_a_folder_has_its_licence(tmp_path: Path) -> None:
    first, base = tmp_path / "first", tmp_path / "base"
    (first / "model").mkdir(parents=True)
    base.mkdir()
    (first / "log.jsonl").touch()
    (first / "config.toml").write_text(configuration.dump(configuration.load(None, {"model": str(base)})))
    second = configuration.load(None, {"model": str(first / "model")})
    assert "The licence of the base model base is not known here" in card_text("second", second, RECORDS)
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: x\n---\nlicense: gpl\n")
    text = card_text("second", second, RECORDS)
    assert front_matter(text)["license"] == "mit"
    assert "base_model" not in front_matter(text)
    assert str(tmp_path) not in text


HOSTILE = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    ["---", "a: b", '"]', "<script>", "| x |", "[x](http://y)", "![](z)", "$x$", "\u2028", "\ufffe", "``", "\\", "\n---\n# x"]
)


@settings(max_examples=50, deadline=None)
@given(HOSTILE)
def test_a_name_is_a_name_in_markdown_and_yaml(name: str) -> None:
    plain = _plain(name)
    assert "\n" not in plain
    assert not re.search(r"(?<!\\)(?:\\\\)*[<>|\[\]`*_$#~&@]", plain)
    loaded = yaml.safe_load(f"key: {_yaml(name)}\nnext: 1\n")
    assert set(loaded) == {"key", "next"}
    assert isinstance(loaded["key"], str)


@settings(max_examples=25, deadline=None)
@given(HOSTILE.filter(lambda text: "\0" not in text))
def test_front_matter_and_tables_stay_whole(name: str) -> None:
    reward = f"m:{name}" if re.fullmatch(r"[^\W0-9]\w*", name) else "m:<" + re.sub(r"[<>:,]|[^ -~]", "", name) + "f>"
    config = configuration.load(None, {"model": f"org/{name}", "reward": reward, "system_prompt": name})
    text = card_text(name, config, RECORDS)
    front = front_matter(text)
    assert set(front) <= {"library_name", "pipeline_tag", "base_model", "license", "tags"}
    assert text.count("\n## ") == 4
    assert len(re.findall(r"^\|", text, re.MULTILINE)) == 5 + 8
