"""Which policy a trainer follows, and what is refused when the trainer is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from reinforce_ada.errors import InputError
from reinforce_ada.integrations.trl.hooks import TRL
from reinforce_ada.sampling import All, Centered, Policy, sized_preset

Adaptive: TypeAlias = str | Policy | tuple[str, Mapping[str, Any]]

_WHERE = "adaptive"
# The loss that divides by a fixed number: the rows of a batch times max_completion_length. TRL's others divide by a completion's own
# length or by the tokens of the batch, or (luspo) multiply by the length, and these depend on the outcomes.
_FIXED_DENOMINATOR = ("dr_grpo",)
_ATTRIBUTES = ("_metrics", "accelerator", "args", "num_generations", "reward_func_names", "reward_weights", "state")


def policy_of(adaptive: Adaptive, num_generations: int) -> Policy:
    """Return the policy that was given by itself, by a preset's name, or by a name and keywords; a preset keeps `num_generations`.

    Raises: InputError for anything else, and where the preset refuses its keywords.
    """
    if isinstance(adaptive, Policy):
        return adaptive
    name, options = (adaptive, {}) if isinstance(adaptive, str) else _named(adaptive)
    return sized_preset(name, num_generations, **options)


def _named(adaptive: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(adaptive, tuple) and len(adaptive) == 2 and isinstance(adaptive[0], str) and isinstance(adaptive[1], Mapping):
        return adaptive
    raise InputError(_WHERE, repr(adaptive), 'a preset\'s name, a Policy, or ("name", {keyword: value}) is needed')


def check(trainer: Any, policy: Policy) -> None:
    """Raise InputError for a trainer, settings or a policy that cannot go together; called before anything is sampled."""
    if missing := [name for name in _ATTRIBUTES if not hasattr(trainer, name)]:
        raise InputError(_WHERE, f"a trainer of TRL {TRL.version()} without {missing[0]}", TRL.needed(missing[0]))
    _check_policy(policy, trainer.num_generations)
    _check_prompts(trainer)
    _check_advantages(trainer, policy)


def _check_policy(policy: Policy, num_generations: int) -> None:
    where = f"{_WHERE}: policy {policy.name!r}"
    if isinstance(policy.select, All) and policy.cap > policy.group_size:
        raise InputError(where, "it keeps every completion", f"num_generations {num_generations} rows of each prompt are needed")
    if policy.group_size != num_generations:
        raise InputError(where, f"it keeps {policy.group_size} completions of a prompt", f"num_generations {num_generations} is needed")
    if policy.needs_prediction:
        raise InputError(where, "a baseline that is predicted", "TRL's loss does not give the states it needs", "baseline 'memory'")
    if policy.draws_prompts:
        given = f"{type(policy.propose).__name__}, which draws further prompts"
        raise InputError(where, given, "TRL's data loader gives exactly those of a step", "propose=AllPrompts()")


def _check_prompts(trainer: Any) -> None:
    if any(getattr(trainer, name, None) for name in ("environment_factories", "environments")):
        raise InputError(_WHERE, "environment_factory", "TRL resets environments once for a batch, and rounds need it more often")
    if getattr(trainer, "tools", None):
        raise InputError(_WHERE, "tools", "TRL prepares tools once for a batch, and rounds need it more often", "a rollout_func works")
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    check_no_images(columns)


def check_no_images(columns: Any) -> None:
    """Raise InputError if a data set, or a row of one, holds images."""
    if held := [name for name in ("image", "images") if name in columns]:
        raise InputError(_WHERE, f"a data set with {held[0]!r}", "prompts of text are needed")


def _check_advantages(trainer: Any, policy: Policy) -> None:
    """TRL's settings about advantages, which the policy's weight replaces, must not say something else."""
    args, weight = trainer.args, policy.weight
    if getattr(args, "multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize":
        given = f"multi_objective_aggregation {args.multi_objective_aggregation!r}"
        raise InputError(_WHERE, given, "a completion has one reward, the weighted sum", "sum_then_normalize")
    scale = weight.scale if isinstance(weight, Centered) else "none" if policy.objective is not None else args.scale_rewards
    if args.scale_rewards not in ("group", scale):  # "group" is TRL's default
        given = f"scale_rewards {args.scale_rewards!r} with policy {policy.name!r}, whose scale is {scale!r}"
        raise InputError(_WHERE, given, "the policy sets the advantages", "leave scale_rewards out")
    if policy.objective is not None and args.loss_type not in _FIXED_DENOMINATOR:
        given = f"objective {policy.objective!r} with loss_type {args.loss_type!r}, whose denominator depends on the outcomes"
        raise InputError(_WHERE, given, "a fixed denominator is needed", f"loss_type={_FIXED_DENOMINATOR[0]!r}")
