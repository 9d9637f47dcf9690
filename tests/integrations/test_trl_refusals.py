"""What cannot go together with TRL's trainer is refused in one line, before anything is sampled."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from trl_runs import grpo_trainer, third, trainer_of

from reinforce_ada import doctor
from reinforce_ada.errors import InputError
from reinforce_ada.integrations.trl import adaptive, hooks
from reinforce_ada.integrations.trl.checks import check, policy_of
from reinforce_ada.integrations.trl.playback import kept_rows
from reinforce_ada.integrations.trl.rows import Generated
from reinforce_ada.sampling import NearestRate, preset


def tool(a: int) -> int:
    """Add one.

    Args:
        a: a number.
    """
    return a + 1


CASES = [
    ({"adaptive": preset("grpo")}, {}, "adaptive: policy 'grpo': it keeps 8 completions of a prompt; num_generations 4 is needed"),
    (
        {"adaptive": "knapsack"}, {},
        "adaptive: policy 'knapsack': it keeps every completion; num_generations 4 rows of each prompt are needed",
    ),
    (
        {"adaptive": "dapo"}, {},
        "adaptive: policy 'dapo': Refill, which draws further prompts; TRL's data loader gives exactly those of a step; "
        "propose=AllPrompts()",
    ),
    (
        {"adaptive": ("reinforce-ada-memory", {"baseline": "predicted"})}, {},
        "adaptive: policy 'reinforce-ada-memory': a baseline that is predicted; TRL's loss does not give the states it needs; "
        "baseline 'memory'",
    ),
    (
        {"adaptive": replace(preset("grpo", group_size=4), propose=NearestRate())}, {},
        "adaptive: policy 'grpo': NearestRate, which draws further prompts; TRL's data loader gives exactly those of a step; "
        "propose=AllPrompts()",
    ),
    ({"adaptive": "gropo"}, {}, "preset: unknown name 'gropo'; known: "),
    ({"adaptive": ("grpo", {"rounds": 2})}, {}, "preset 'grpo': unknown override 'rounds'; known: "),
    ({"adaptive": 4}, {}, """adaptive: 4; a preset's name, a Policy, or ("name", {keyword: value}) is needed"""),
    (
        {"train_dataset": {"prompt": ["a"] * 9, "image": ["b"] * 9}}, {},
        "adaptive: a data set with 'image'; prompts of text are needed",
    ),
    (
        {}, {"multi_objective_aggregation": "normalize_then_sum"},
        "adaptive: multi_objective_aggregation 'normalize_then_sum'; a completion has one reward, the weighted sum; sum_then_normalize",
    ),
    (
        {}, {"scale_rewards": "batch"},
        "adaptive: scale_rewards 'batch' with policy 'reinforce-ada-balance', whose scale is 'none'; the policy sets the advantages; "
        "leave scale_rewards out",
    ),
    *(
        (
            {"adaptive": "reinforce-ada-exact"}, {"loss_type": loss_type, "importance_sampling_level": "sequence"},
            f"adaptive: objective 'mean' with loss_type '{loss_type}', whose denominator depends on the outcomes; "
            "a fixed denominator is needed; loss_type='dr_grpo'",
        )
        for loss_type in ("grpo", "dapo", "luspo")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "settings", "line"), CASES)
def test_one_line_when_the_trainer_is_made(model_folder, tmp_path, options, settings, line):
    from datasets import Dataset

    options = {name: Dataset.from_dict(value) if name == "train_dataset" else value for name, value in options.items()}
    with pytest.raises(InputError) as caught:
        trainer_of(model_folder, tmp_path, options=options, **settings)
    said = str(caught.value)
    assert said.startswith(line)
    assert "\n" not in said
    assert said == line or line.endswith("known: ")


@pytest.mark.parametrize(
    ("held", "line"),
    [
        ({"tools": [tool]}, "adaptive: tools; TRL prepares tools once for a batch, and rounds need it more often; a rollout_func works"),
        (
            {"environment_factories": {None: object}},
            "adaptive: environment_factory; TRL resets environments once for a batch, and rounds need it more often",
        ),
        (
            {"environments": [object()]},
            "adaptive: environment_factory; TRL resets environments once for a batch, and rounds need it more often",
        ),
    ],
)
def test_tools_and_environments_are_refused(held, line):
    """The trainer as TRL leaves it with each: making one needs a chat template that knows tools."""
    args = SimpleNamespace(scale_rewards="group", loss_type="dapo")
    made = {"num_generations": 4, "args": args, "train_dataset": None, "_metrics": 0, "accelerator": 0, "state": 0}
    trainer = SimpleNamespace(**made, reward_func_names=[], reward_weights=[], tools=[], environments=None)
    check(trainer, policy_of("reinforce-ada-balance", 4))
    vars(trainer).update(held)
    with pytest.raises(InputError) as caught:
        check(trainer, policy_of("reinforce-ada-balance", 4))
    assert str(caught.value) == line
    del trainer.reward_weights
    with pytest.raises(InputError, match=r"^adaptive: a trainer of TRL [\d.]+ without reward_weights; that of TRL 1.0 to 1.16 is needed"):
        check(trainer, policy_of("reinforce-ada-balance", 4))


def test_a_trl_with_other_hooks_is_refused():
    trainer = grpo_trainer().GRPOTrainer

    class Later(trainer):
        def _generate(self, prompts, images): ...

    class Without:
        _generate = _generate_and_score_completions = trainer._generate

    version = hooks.TRL.version()
    with pytest.raises(InputError) as caught:
        adaptive(Later)
    assert str(caught.value) == (
        f"adaptive: Later of TRL {version}: its _generate takes (prompts, images) instead of (prompts); "
        "that of TRL 1.0 to 1.16 is needed: _generate_and_score_completions, _generate, _calculate_rewards"
    )
    with pytest.raises(InputError, match=r"its _generate_and_score_completions takes \(prompts\) instead of \(inputs\)"):
        adaptive(Without)
    with pytest.raises(InputError, match="it has no _generate_and_score_completions"):
        adaptive(object)


@pytest.mark.parametrize("items", [([[1]], [[2]], None, ["a"], None), ([[1]], [[2]], None, ["a"], None, None)])
def test_a_generation_of_another_form_is_refused(items):
    with pytest.raises(InputError, match=rf"^adaptive: _generate of TRL [\d.]+ returned {len(items)} items; that of TRL 1.0 to 1.16"):
        Generated(items)


def test_images_in_prompts_are_refused():
    with pytest.raises(InputError, match=r"^adaptive: prompts with images; prompts of text are needed$"):
        Generated(([[1]], [[2]], None, ["a"], None, {}, [["an image"]], []))


def test_rows_out_of_groups_are_refused(model_folder, tmp_path):
    trainer = trainer_of(model_folder, tmp_path)
    trainer.model.train()
    with pytest.raises(InputError, match=r"^adaptive: 3 rows that do not come in groups; num_generations 4 rows of each prompt in a row"):
        trainer._generate_and_score_completions([{"prompt": "a"}] * 3)
    with pytest.raises(InputError, match=r"^adaptive: 4 rows that do not come in groups"):
        trainer._generate_and_score_completions([{"prompt": "a"}] * 2 + [{"prompt": "b"}] * 2)
    with pytest.raises(InputError, match=r"^adaptive: a data set with 'images'; prompts of text"):
        trainer._generate_and_score_completions([{"prompt": "a", "images": []}] * 4)


def test_a_selection_that_keeps_more_is_refused(model_folder, tmp_path):
    def greedy(rewards, correct, group_size):
        return list(range(len(rewards)))

    policy = replace(preset("reinforce-ada-balance", group_size=4), name="greedy", select=greedy)
    trainer = trainer_of(model_folder, tmp_path, options={"adaptive": policy})
    said = r"^adaptive: policy 'greedy': a selection that keeps \d+ completions; at most group_size 4 is possible$"
    with pytest.raises(InputError, match=said):
        trainer.train()
    with pytest.raises(InputError, match=said):
        kept_rows(trainer.sampling_result, policy, {})


def test_the_doctor_says_whether_the_hooks_fit(monkeypatch, tmp_path):
    assert hooks.TRL.state() == "ok"
    assert doctor.examine(check=False)["integrations"]["trl"] == "ok"
    source = tmp_path / "trainer/grpo_trainer.py"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path], origin="trl"))
    assert hooks.TRL.state().startswith("it has no trainer/grpo_trainer.py; that of TRL 1.0 to 1.16 is needed")
    source.parent.mkdir()
    source.write_text("class GRPOTrainer:\n    def _generate_and_score_completions(self, inputs, more): ...\n")
    assert hooks.TRL.state() == f"its _generate_and_score_completions takes (inputs, more) instead of (inputs); {hooks.TRL.needed()}"
    source.write_text("class PPOTrainer: ...\n")
    assert hooks.TRL.state() == f"it has no _generate_and_score_completions; {hooks.TRL.needed()}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert hooks.TRL.state() == "trl is not installed"


def test_a_given_policy_is_followed_as_it_is():
    policy = preset("reinforce-ada-pos", group_size=6)
    assert policy_of(policy, 4) is policy
    assert policy_of("reinforce-ada-pos", 6) == policy
    assert policy_of(("pods", {"num_completions": 8}), 4).cap == 8
    assert third([[1, 2], [1]]) == [1, 0]
