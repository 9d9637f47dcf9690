"""Adaptive sampling in AReaL's trainer: a workflow around the one that makes a single trajectory.

    from reinforce_ada.integrations.areal import adaptive

    trainer.train(**adaptive(config, "areal.workflow.rlvr.RLVRWorkflow", workflow_kwargs, preset="reinforce-ada-balance"))

Importing this module imports no AReaL; `AdaptiveWorkflow` is made when AReaL asks for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from reinforce_ada.advantages import advantages_of
from reinforce_ada.async_driver import adaptive_group
from reinforce_ada.errors import InputError
from reinforce_ada.integrations.hooks import Hooks
from reinforce_ada.integrations.settings import Settings, check_values, settings_of
from reinforce_ada.types import Prompt, Request, SamplingResult

_WHERE = "reinforce_ada in AReaL"
_VERSIONS = "AReaL 1.0.4"
WORKFLOW = Hooks("areal", _VERSIONS, "api/workflow_api.py", "RolloutWorkflow", {"arun_episode": ("engine", "data")})
DATA = Hooks("areal", _VERSIONS, "utils/data.py", "", {"concat_padded_tensors": ("tensor_dicts", "pad_value")})
_LARGE = 1e6
_REWARD = "the reward of a row is its advantage, which nothing may change"
_ACTOR = {
    "reward_norm": None, "adv_norm": None, "reward_bias": 0, "reward_scaling": 1, "overlong_reward_penalty": False,
    "mask_no_eos_with_zero": False, "kl_ctl": 0, "discount": 1, "gae_lambda": 1,
}  # fmt: skip
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "gconfig.n_samples": ((1,), "the sampler decides how many completions a prompt gets"),
    **{f"actor.{name}": ((value,), _REWARD) for name, value in _ACTOR.items()},
    "critic": ((None,), _REWARD),
}


def adaptive(config: Any, workflow: str, workflow_kwargs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Return the arguments `workflow` and `workflow_kwargs` of `trainer.train`, after checking that the policy fits AReaL's configuration.

    Args:
        config: AReaL's PPOConfig or GRPOConfig.
        workflow: the import path of a RolloutWorkflow whose `arun_episode` gives one trajectory as tensors with one reward.
        workflow_kwargs: those of that workflow.
        options: `preset`, "reinforce-ada-balance" by default; `window`, how many completions of a prompt may run ahead of those already
            counted; and keywords of the preset, such as `group_size`, which is how many rows of a prompt are kept.
    Raises: InputError for settings that cannot be combined.
    """
    if not isinstance(workflow, str):
        raise InputError(
            _WHERE, f"a workflow of type {type(workflow).__name__}", "an import path is needed", "areal.workflow.rlvr.RLVRWorkflow"
        )
    settings = settings_of(_WHERE, options)
    check_values(_WHERE, {name: functools.reduce(getattr, name.split("."), config) for name in _NEEDED}, _NEEDED)
    if config.actor.reward_clip < _LARGE:
        raise InputError(_WHERE, f"actor.reward_clip={config.actor.reward_clip}", _REWARD, f"actor.reward_clip={_LARGE:g}")
    if settings.policy.objective is not None:
        given = f"objective {settings.policy.objective!r} with AReaL's loss, whose denominator depends on the outcomes"
        raise InputError(_WHERE, given, "a fixed one is needed", "a preset without an objective: reinforce-ada-balance")
    kwargs = {"workflow": workflow, "workflow_kwargs": dict(workflow_kwargs), "options": options}
    return {"workflow": f"{__name__}.AdaptiveWorkflow", "workflow_kwargs": kwargs}


class AdaptiveEpisodes:
    """What `AdaptiveWorkflow` adds to AReaL's RolloutWorkflow: an episode is a prompt, sampled until its policy has what it needs.

    A trajectory that raises, is cancelled, is rejected by its workflow or has no single reward is a void. Only kept rows are published,
    as many as there are; their reward is their advantage. A prompt of which nothing was kept is published as its shortest row, with a loss
    mask and an advantage of 0, which trains nothing: AReaL would replace a rejected prompt by another. Only a prompt without any scored
    completion is rejected. Evaluation is that of the workflow.
    """

    def __init__(self, workflow: str, workflow_kwargs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        from areal.api import RolloutWorkflow
        from areal.utils import data
        from areal.utils.dynamic_import import import_from_string

        WORKFLOW.check(_WHERE, RolloutWorkflow)
        DATA.check(_WHERE, data)
        self._settings: Settings = settings_of(_WHERE, options)
        self._workflow = import_from_string(workflow)(**workflow_kwargs)
        if not isinstance(self._workflow, RolloutWorkflow):
            raise InputError(_WHERE, f"{workflow}, which is no RolloutWorkflow", "one that gives trajectories as tensors is needed")

    async def arun_episode(self, engine: Any, data: dict[str, Any]) -> Any:
        """Return the rows of one prompt, each tensor [rows, ...], or None without a scored completion."""
        from areal import workflow_context
        from areal.utils import stats_tracker

        context = workflow_context.get()
        if context.is_eval:
            return await self._workflow.arun_episode(engine, data)

        async def trajectory(request: Request) -> tuple[dict[str, Any], float]:
            row = await self._workflow.arun_episode(engine, data)
            return row, _reward_of(row)

        policy, window = self._settings
        result = await adaptive_group(policy, trajectory, prompt=Prompt(str(context.task_id)), window=window)
        metrics = {f"reinforce_ada/{k}": v for k, v in result.metrics.items() if not math.isnan(v)}
        stats_tracker.get(workflow_context.stat_scope()).scalar(**metrics)
        return self._published(result)

    def _published(self, result: SamplingResult) -> dict[str, Any] | None:
        from areal.utils.data import concat_padded_tensors

        rows = [
            _with(scored.completion.output, advantage)
            for group, advantages in zip(result.groups, advantages_of(result, self._settings.policy), strict=True)
            for scored, advantage in zip(group.kept, advantages, strict=True)
        ]
        sampled = [scored.completion.output for scored in result.pools[0].scored]
        if not rows and sampled:
            row = _with(min(sampled, key=lambda row: int(row["input_ids"].shape[-1])), 0.0)
            rows = [{**row, "loss_mask": row["loss_mask"].new_zeros(row["loss_mask"].shape)}]
        return concat_padded_tensors(rows) if rows else None


def _reward_of(row: Any) -> float:
    if not isinstance(row, dict) or "rewards" not in row:
        raise TypeError("the workflow gave no single trajectory as tensors with one reward")
    return float(row["rewards"])


def _with(row: dict[str, Any], advantage: float) -> dict[str, Any]:
    reward = row["rewards"]
    return {**row, "rewards": torch.full_like(reward, advantage, dtype=torch.float32)}


@functools.cache
def _workflow_class() -> type[Any]:
    from areal.api import RolloutWorkflow

    return type("AdaptiveWorkflow", (AdaptiveEpisodes, RolloutWorkflow), {"__module__": __name__, "__doc__": AdaptiveEpisodes.__doc__})


def __getattr__(name: str) -> Any:
    if name != "AdaptiveWorkflow":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _workflow_class()
