"""The adapter for AReaL, with stand-ins of the functions it calls.

Their signatures and effects are those of areal 1.0.4: RolloutWorkflow of areal/api/workflow_api.py, the tensors of
areal/workflow/rlvr.py, the context of areal/infra/workflow_context.py, concat_padded_tensors of areal/utils/data.py, import_from_string of
areal/utils/dynamic_import.py, scalar of areal/utils/stats_tracker.py, and the defaults of PPOConfig of areal/api/cli_args.py.
"""

from __future__ import annotations

import asyncio
import sys
from abc import ABC, abstractmethod
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_sampler import PRESETS, RATES, Rows, assert_same, expected, reward_of, stand_in

from reinforce_ada.errors import InputError
from reinforce_ada.integrations import areal as adapter
from reinforce_ada.sampling import preset


class RolloutWorkflow(ABC):
    @abstractmethod
    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any] | None: ...


class OneRow(RolloutWorkflow):
    """One trajectory an episode, of any length; the tokens say which one it is."""

    def __init__(self, disturbed: bool = False, fails: str = "") -> None:
        self.disturbed, self.fails = disturbed, fails
        self.num_drawn: Counter[int] = Counter()

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> dict[str, Any] | None:
        prompt, index = data["prompt"], self.num_drawn[data["prompt"]]
        self.num_drawn[prompt] += 1
        await asyncio.sleep(0)
        reward = reward_of(prompt, index, self.disturbed)
        if self.fails == "rejects":
            return None
        length = 3 + index % 4
        row = {
            "input_ids": torch.tensor([[prompt, index, *[9] * (length - 2)]], dtype=torch.int32),
            "loss_mask": torch.tensor([[0, *[1] * (length - 1)]], dtype=torch.int32),
            "attention_mask": torch.ones(1, length, dtype=torch.bool),
            "rewards": torch.tensor([reward], dtype=torch.int64 if prompt % 2 else torch.float32),  # a user's may be whole
        }
        return {**row, "rewards": torch.zeros(2)} if self.fails == "two" else row


def concat_padded_tensors(tensor_dicts: list[dict[str, Any]], pad_value: float = 0.0) -> dict[str, Any]:
    def padded(t: torch.Tensor, length: int) -> torch.Tensor:
        return torch.nn.functional.pad(t, (0, length - t.shape[1]), value=pad_value) if t.ndim > 1 else t

    length = max(d["input_ids"].shape[1] for d in tensor_dicts)
    return {key: torch.cat([padded(d[key], length) for d in tensor_dicts]) for key in tensor_dicts[0]}


@pytest.fixture
def areal(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(is_eval=False, task_id=0, metrics=[])
    tracker = SimpleNamespace(scalar=lambda **metrics: state.metrics.append(metrics))
    modules: dict[str, dict[str, Any]] = {
        "areal": {"workflow_context": SimpleNamespace(get=lambda: state, stat_scope=lambda: "rollout")},
        "areal.api": {"RolloutWorkflow": RolloutWorkflow},
        "areal.utils": {"stats_tracker": SimpleNamespace(get=lambda scope: tracker)},
        "areal.utils.data": {"concat_padded_tensors": concat_padded_tensors},
        "areal.utils.dynamic_import": {"import_from_string": lambda path: {"mine.OneRow": OneRow, "mine.Agent": SimpleNamespace}[path]},
    }
    stand_in(modules, monkeypatch)
    adapter._workflow_class.cache_clear()
    return state


def config_of(**changes: Any) -> SimpleNamespace:
    """AReaL's configuration with its defaults, apart from the two that must change; changes are given with __ for the dots."""
    actor = {
        "reward_norm": None, "adv_norm": None, "reward_bias": 0.0, "reward_scaling": 1.0, "overlong_reward_penalty": False,
        "mask_no_eos_with_zero": False, "kl_ctl": 0.0, "discount": 1.0, "gae_lambda": 1.0, "reward_clip": 1e6,
    }  # fmt: skip
    config = SimpleNamespace(gconfig=SimpleNamespace(n_samples=1), actor=SimpleNamespace(**actor), critic=None)
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(config.actor if path == ["actor"] else config.gconfig if path else config, last, value)
    return config


def workflow_of(inner: dict[str, Any] | None = None, **options: Any) -> Any:
    arguments = adapter.adaptive(config_of(), "mine.OneRow", inner or {}, **options)
    assert arguments["workflow"] == "reinforce_ada.integrations.areal.AdaptiveWorkflow"
    workflow = adapter.AdaptiveWorkflow(**arguments["workflow_kwargs"])
    assert isinstance(workflow, RolloutWorkflow)
    return workflow


async def episodes(workflow: Any) -> list[dict[str, Any] | None]:
    return await asyncio.gather(*(workflow.arun_episode(None, {"prompt": i}) for i in range(len(RATES))))


@pytest.mark.parametrize("disturbed", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_the_rows_and_advantages_are_those_of_one_sampler(name: str, disturbed: bool, areal: SimpleNamespace) -> None:
    published = asyncio.run(episodes(workflow_of({"disturbed": disturbed}, preset=name, group_size=4)))
    found: list[Rows] = []
    for i, rows in enumerate(published):
        assert rows is not None
        assert rows["input_ids"][:, 0].tolist() == [i] * len(rows["rewards"])
        assert torch.equal(rows["loss_mask"].sum(1) + 1, rows["attention_mask"].sum(1))
        indices = rows["input_ids"][:, 1].tolist()
        rewards = [reward_of(i, index, disturbed) for index in indices]
        found.append(list(zip(indices, rewards, rows["rewards"].tolist(), strict=True)))
    assert_same(found, expected(preset(name, group_size=4), disturbed))
    assert sum(m["reinforce_ada/num_completions_kept"] for m in areal.metrics) == sum(map(len, found))


def test_a_prompt_of_which_nothing_is_kept_gets_a_row_that_trains_nothing(areal: SimpleNamespace) -> None:
    truth = expected(preset("reinforce-ada-balance", degenerate="drop"))
    for rows, kept in zip(asyncio.run(episodes(workflow_of(degenerate="drop"))), truth, strict=True):
        assert rows is not None
        assert len(rows["rewards"]) == max(1, len(kept))
        if not kept:
            assert rows["rewards"].tolist() == [0.0]
            assert not rows["loss_mask"].any()
            assert rows["input_ids"].shape == (1, 3)  # the shortest
    assert [] in truth


@pytest.mark.parametrize("fails", ["rejects", "two"])
def test_a_prompt_without_any_reward_is_rejected(fails: str, areal: SimpleNamespace) -> None:
    assert asyncio.run(workflow_of({"fails": fails}).arun_episode(None, {"prompt": 3})) is None


def test_evaluation_is_that_of_the_workflow(areal: SimpleNamespace) -> None:
    areal.is_eval = True
    row = asyncio.run(workflow_of().arun_episode(None, {"prompt": 5}))
    assert row["rewards"].tolist() == [1.0]
    assert areal.metrics == []


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"preset": "reinforce-ada-balanced"}, {}, "did you mean 'reinforce-ada-balance'?"),
        ({"window": 0}, {}, "window 0; an integer of at least 1 is needed"),
        ({"round_siz": 4}, {}, "did you mean 'round_size'?"),
        ({"preset": "dapo"}, {}, "with Refill, which draws further prompts"),
        ({"preset": "reinforce-ada-est"}, {}, "which divides a budget between the prompts of a step"),
        ({"preset": "grpo", "scale": "batch"}, {}, "scale 'batch'; each prompt is sampled alone"),
        ({"preset": "reinforce-ada-memory"}, {}, "a policy that remembers earlier steps; this trainer has no place"),
        ({"preset": "reinforce-ada-exact"}, {}, "objective 'mean' with AReaL's loss, whose denominator depends on the outcomes"),
        ({}, {"gconfig__n_samples": 4}, "gconfig.n_samples=4; the sampler decides how many completions a prompt gets; gconfig.n_samples=1"),
        ({}, {"actor__kl_ctl": 0.1}, "actor.kl_ctl=0.1; the reward of a row is its advantage, which nothing may change; actor.kl_ctl=0"),
        ({}, {"actor__reward_clip": 20.0}, "actor.reward_clip=20.0; the reward of a row is its advantage, which nothing may change"),
    ],
)
def test_what_cannot_be_combined_is_one_line(options: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        adapter.adaptive(config_of(**changes), "mine.OneRow", {}, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


UNUSABLE = {
    "gconfig.n_samples": 2, "actor.reward_norm": "a", "actor.adv_norm": "a", "actor.reward_bias": 0.5, "actor.reward_scaling": 10,
    "actor.overlong_reward_penalty": True, "actor.mask_no_eos_with_zero": True, "actor.kl_ctl": 0.1, "actor.discount": 0.9,
    "actor.gae_lambda": 0.9, "critic": "a",
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSABLE)
def test_every_setting_that_would_change_an_advantage_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"reinforce_ada in AReaL: {name}={UNUSABLE[name]}; .*; {name}="):
        adapter.adaptive(config_of(**{name.replace(".", "__"): UNUSABLE[name]}), "mine.OneRow", {})


def test_another_kind_of_workflow_or_another_areal_is_refused(areal: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="a workflow of type ABCMeta; an import path is needed"):
        adapter.adaptive(config_of(), OneRow, {})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"mine\.Agent, which is no RolloutWorkflow; one that gives trajectories as tensors is needed"):
        adapter.AdaptiveWorkflow(**adapter.adaptive(config_of(), "mine.Agent", {})["workflow_kwargs"])
    with pytest.raises(AttributeError, match="has no attribute 'Adaptive'"):
        adapter.Adaptive  # noqa: B018
    sys.modules["areal.utils.data"].concat_padded_tensors = lambda tensors: tensors
    with pytest.raises(InputError, match=r"its concat_padded_tensors takes \(tensors\) instead of \(tensor_dicts, pad_value\)"):
        workflow_of()
