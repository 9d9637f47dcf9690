"""The settings `reinforce_ada.*` of verl's configuration, and what cannot be combined with them. They need no verl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.integrations import settings
from reinforce_ada.sampling import Policy

ZeroRows: TypeAlias = Literal["all", "one", "none"]

ESTIMATOR = "reinforce_ada"
TRAIN = "train"  # verl's partition of the rows that train
TAG = "reinforce_ada"  # of a row: its prompt's advantages; of a prompt: its metrics
HISTORY = "__reinforce_ada_history__"  # the column with which a prompt's remembered counts travel to a worker
WHERE = "reinforce_ada in verl"
# Both divide the summed losses of a mini-batch by a number that does not depend on the outcomes.
_FIXED_DENOMINATORS = ("seq-mean-token-sum", "seq-mean-token-sum-norm")


class Settings(NamedTuple):
    """The section `reinforce_ada` of verl's configuration.

    policy, window: see `integrations.settings`; a preset keeps `rollout.n` completions.
    zero_rows: which rows of a prompt are published if all of its advantages are 0, as they are where every answer is right, or wrong:
        "all", "one" (the default) or "none". Fewer rows spare the actor their cost. A loss that averages over tokens then averages over
        fewer of them; and a step in which no prompt has a row ends verl's run, so that "none" suits large batches.
    """

    policy: Policy
    window: int | None
    zero_rows: ZeroRows


def settings_of(config: Any) -> Settings:
    """Return the settings of verl's whole configuration. Raises: InputError for unknown names and values that cannot be used."""
    given: dict[str, Any] = {name: tuple(v) if _is_list(v) else v for name, v in dict(config.get("reinforce_ada") or {}).items()}
    zero_rows = given.pop("zero_rows", "one")
    if zero_rows not in get_args(ZeroRows):
        raise unknown_name(WHERE, "value of reinforce_ada.zero_rows", str(zero_rows), get_args(ZeroRows))
    return Settings(*settings.settings_of(WHERE, given, int(config.actor_rollout_ref.rollout.n), remembers=True), zero_rows)


def _is_list(value: Any) -> bool:
    return not isinstance(value, str | Mapping) and hasattr(value, "__iter__")


def check(config: Any, policy: Policy, *, has_rewards: bool) -> None:
    """Raise InputError for settings of verl that the policy cannot be combined with; called when the manager is made.

    Args:
        has_rewards: whether verl scores completions while it samples; a colocated reward model scores them afterwards.
    """
    rollout, algorithm = config.actor_rollout_ref.rollout, config.algorithm
    if not has_rewards:
        needed = "rewards are needed while completions are sampled: a function, or a model with a resource pool of its own"
        raise InputError(WHERE, "a colocated reward model", needed, "reward.reward_model.enable_resource_pool=True")
    if algorithm.adv_estimator != ESTIMATOR:
        given = f"algorithm.adv_estimator={algorithm.adv_estimator}"
        raise InputError(WHERE, given, "the advantages come from whole pools", f"algorithm.adv_estimator={ESTIMATOR}")
    if algorithm.get("use_kl_in_reward", False):
        needed = "the sampler's advantages are those of the rewards alone"
        raise InputError(WHERE, "algorithm.use_kl_in_reward=True", needed, "actor_rollout_ref.actor.use_kl_loss=True")
    if (algorithm.get("rollout_correction") or {}).get("bypass_mode", False) and not rollout.calculate_log_probs:
        given = "algorithm.rollout_correction.bypass_mode=True without the logprobs of the rollout"
        raise InputError(WHERE, given, "they stand for the old logprobs", "actor_rollout_ref.rollout.calculate_log_probs=True")
    loss_agg_mode = config.actor_rollout_ref.actor.loss_agg_mode
    if policy.objective is not None and loss_agg_mode not in _FIXED_DENOMINATORS:
        given = f"objective {policy.objective!r} with loss_agg_mode={loss_agg_mode}, whose denominator depends on the outcomes"
        raise InputError(WHERE, given, "a fixed one is needed", f"actor_rollout_ref.actor.loss_agg_mode={_FIXED_DENOMINATORS[0]}")
