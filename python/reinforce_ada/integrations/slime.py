"""Adaptive sampling in slime's trainer, by arguments alone: no line of slime or of a training script changes.

    --rollout-function-path reinforce_ada.integrations.slime.generate_rollout
    --custom-reward-post-process-path reinforce_ada.integrations.slime.advantages
    --custom-config-path adaptive.yaml      # with the line  reinforce_ada: {preset: reinforce-ada-balance, round_size: 8}

Importing this module imports no slime.
"""

from __future__ import annotations

import asyncio
import copy
import math
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from reinforce_ada.advantages import advantages_of
from reinforce_ada.async_driver import adaptive_group
from reinforce_ada.errors import InputError
from reinforce_ada.integrations.hooks import Hooks
from reinforce_ada.integrations.settings import Settings, check_values, settings_of
from reinforce_ada.sampling.metrics import joined
from reinforce_ada.types import Prompt, Request, SamplingResult, Scored

_WHERE = "reinforce_ada in slime"
_DELIVERY = "reinforce_ada.integrations.slime.advantages"
_KEY = "reinforce_ada"  # of a sample's metadata: its advantage
ROLLOUT = Hooks(
    "slime", "slime 0.3.1", "rollout/sglang_rollout.py", "", {
        "generate_and_rm": ("args", "sample", "sampling_params", "evaluation"),
        "generate_rollout": ("args", "rollout_id", "data_source", "evaluation"),
    },
)  # fmt: skip
_ALONE = "the sampler decides how many completions a prompt gets, and which are kept"
_POOLS = "the advantages come from whole pools"
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "custom_reward_post_process_path": ((_DELIVERY,), _POOLS),
    "custom_convert_samples_to_train_data_path": ((None,), _POOLS),
    "custom_advantage_function_path": ((None,), _POOLS),
    "advantage_estimator": (("grpo", "gspo", "cispo"), "the others do not take a row's reward as its advantage"),
    "normalize_advantages": ((False,), _POOLS),
    "partial_rollout": ((False,), _ALONE),
    "dynamic_sampling_filter_path": ((None,), _ALONE),
    "rollout_sample_filter_path": ((None,), _ALONE),
    "rollout_all_samples_process_path": ((None,), "completions that are not kept are not handed on"),
    "group_rm": ((False,), "each completion is scored as soon as it ends"),
}


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """Sample the prompts of one rollout until the policy has what it needs; evaluation is slime's own.

    Every prompt gets exactly `n_samples_per_prompt` rows, since slime drops rows that do not fill a global batch. What the policy did not
    keep, because too few completions could be scored or by choice, is filled up with short rows whose loss mask and advantage are 0: they
    train nothing, and count only where slime counts rows. A completion that raises, is aborted or gets no reward is a void.

    Returns: slime's RolloutFnTrainOutput, with the metrics `reinforce_ada/*`.
    Raises: InputError for settings that cannot be combined; RuntimeError if no completion of any prompt could be scored.
    """
    from slime.rollout import sglang_rollout
    from slime.rollout.base_types import RolloutFnTrainOutput
    from slime.utils.async_utils import run

    if evaluation:
        return sglang_rollout.generate_rollout(args, rollout_id, data_source, evaluation=True)
    settings = settings_of(_WHERE, getattr(args, "reinforce_ada", None) or {}, int(args.n_samples_per_prompt))
    check(args, settings)
    ROLLOUT.check(_WHERE, sglang_rollout)
    groups = data_source.get_samples(args.rollout_batch_size)
    results = run(_sample_all(args, settings, rollout_id, groups))
    metrics = {f"reinforce_ada/{k}": v for k, v in joined([r.metrics for r in results]).items() if not math.isnan(v)}
    return RolloutFnTrainOutput(samples=_published(groups, results, settings), metrics=metrics)


def check(args: Any, settings: Settings) -> None:
    """Raise InputError for arguments of slime that the policy cannot be combined with."""
    size = args.rollout_batch_size
    needed = {**_NEEDED, "over_sampling_batch_size": ((size,), "the prompts that finish first are no fair sample of all")}
    check_values(_WHERE, {name: getattr(args, name, values[0]) for name, (values, _) in needed.items()}, needed)
    if settings.policy.objective is not None and getattr(args, "custom_pg_loss_reducer_function_path", None) is None:
        given = f"objective {settings.policy.objective!r} with slime's loss, whose denominators depend on the outcomes"
        raise InputError(_WHERE, given, "a fixed one is needed", "--custom-pg-loss-reducer-function-path")


async def _sample_all(args: Any, settings: Settings, step: int, groups: Sequence[list[Any]]) -> list[SamplingResult]:
    return await asyncio.gather(*(_sample(args, settings, step, group) for group in groups))


async def _sample(args: Any, settings: Settings, step: int, group: list[Any]) -> SamplingResult:
    from slime.rollout.sglang_rollout import GenerateState, generate_and_rm

    async def session(request: Request) -> tuple[list[Any], float]:
        sample = copy.deepcopy(group[request.id.index % len(group)])
        sample.session_id = str(uuid.uuid4())
        params = dict(GenerateState(args).sampling_params)
        if getattr(args, "sglang_enable_deterministic_inference", False):
            params["sampling_seed"] = args.rollout_seed + request.id.index
        made = await generate_and_rm(args, sample, params, evaluation=False)
        rows = made if isinstance(made, list) else [made]  # a session of an agent may give several
        if any(row.status.value == "aborted" for row in rows):
            raise RuntimeError("the session was aborted")
        return rows, rows[-1].get_reward_value(args)

    prompt = Prompt(str(group[0].group_index))
    return await adaptive_group(settings.policy, session, prompt=prompt, step=step, seed=args.rollout_seed, window=settings.window)


def _published(groups: Sequence[list[Any]], results: Sequence[SamplingResult], settings: Settings) -> list[list[Any]]:
    spares = [_shortest(result.pools[0].scored) for result in results]
    spare = min((row for row in spares if row is not None), key=lambda row: len(row.tokens), default=None)
    if spare is None:
        raise RuntimeError(f"{_WHERE}: no completion of any of {len(groups)} prompts could be scored; the log has the first failure")
    own_or_other = [spare if own is None else own for own in spares]
    return [list(_rows(*each, settings)) for each in zip(groups, results, own_or_other, strict=True)]


def _shortest(scored: Sequence[Scored]) -> Any:
    rows = (row for s in scored for row in s.completion.output if row.response_length)
    return min(rows, key=lambda row: len(row.tokens), default=None)


def _rows(group: list[Any], result: SamplingResult, spare: Any, settings: Settings) -> Iterator[Any]:
    """Yield the rows of the kept completions, and then those that train nothing, under the indices that slime gave to the group."""
    kept = [s.completion.output for g in result.groups for s in g.kept]
    advantages = [a for of_group in advantages_of(result, settings.policy) for a in of_group]
    for i, place in enumerate(group):
        rows = kept[i] if i < len(kept) else [copy.deepcopy(spare)]
        for row in rows:
            row.index, row.group_index, row.rollout_id = place.index, place.group_index, place.index
            row.metadata = {**(row.metadata or {}), _KEY: advantages[i] if i < len(kept) else 0.0}
            if i >= len(kept):
                row.remove_sample, row.loss_mask = True, [0] * row.response_length
            yield row


def advantages(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Return the rewards of the samples of a rollout, and their advantages in the place of normalised rewards.

    Raises: InputError for samples that `generate_rollout` did not make.
    """
    if any(_KEY not in (sample.metadata or {}) for sample in samples):
        hint = "--rollout-function-path reinforce_ada.integrations.slime.generate_rollout"
        raise InputError(_WHERE, "samples without an advantage", "those of an adaptive rollout are needed", hint)
    return [sample.get_reward_value(args) for sample in samples], [sample.metadata[_KEY] for sample in samples]
