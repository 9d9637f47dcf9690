"""The settings `reinforce_ada.*` of verl's configuration, and what cannot be combined with them. They need no verl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.integrations import settings
from reinforce_ada.outside import is_installed, one_line
from reinforce_ada.sampling import Policy
from reinforce_ada.sampling.policies.contracts import at_least

ZeroRows: TypeAlias = Literal["all", "one", "none"]

ESTIMATOR = "reinforce_ada"
TRAIN = "train"  # verl's partition of the rows that train
TAG = "reinforce_ada"  # of a row: its prompt's advantages; of a prompt: its metrics
HISTORY = "__reinforce_ada_history__"  # the column with which a prompt's remembered counts travel to a worker
WHERE = "reinforce_ada in verl"


class Settings(NamedTuple):
    """The section `reinforce_ada` of verl's configuration.

    policy, window: see `integrations.settings`; a preset keeps `rollout.n` completions.
    zero_rows: which rows of a prompt are published if all of its advantages are 0, as they are where every answer is right, or wrong:
        "all", "one" (the default) or "none". Fewer rows spare the actor their cost; a KL or entropy term would still use them. A loss
        that averages over tokens then averages over fewer of them; and a step in which no prompt has a row ends verl's run, so that
        "none" suits large batches.
    """

    policy: Policy
    window: int | None
    zero_rows: ZeroRows


def settings_of(config: Any) -> Settings:
    """Return the settings of verl's whole configuration. Raises: InputError for unknown names and values that cannot be used."""
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in _section(config).items()}
    zero_rows = given.pop("zero_rows", "one")
    if zero_rows not in get_args(ZeroRows):
        raise unknown_name(WHERE, "value of reinforce_ada.zero_rows", str(zero_rows), get_args(ZeroRows))
    n = config.actor_rollout_ref.rollout.n
    at_least(1, f"{WHERE}: actor_rollout_ref.rollout", n=n)
    return Settings(*settings.settings_of(WHERE, given, n, remembers=True), zero_rows)


def _section(config: Any) -> dict[str, Any]:
    """Return the section of the configuration as plain values. Raises: InputError for anything but names with values."""
    try:
        section = config.get("reinforce_ada")
        if is_installed("omegaconf"):
            from omegaconf import OmegaConf

            if OmegaConf.is_config(section):
                section = OmegaConf.to_container(section, resolve=True, throw_on_missing=True)
    except Exception as error:  # whatever OmegaConf raises for a value that is missing or refers to nothing
        raise InputError(WHERE, f"reinforce_ada: {one_line(str(error))}", "names with values are needed") from error
    if section is None:
        return {}
    if not isinstance(section, Mapping) or not all(isinstance(name, str) for name in section):
        raise InputError(WHERE, f"reinforce_ada={one_line(repr(section))}", "names with values are needed", "+reinforce_ada.preset=grpo")
    return dict(section)


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
    if (algorithm.get("filter_groups") or {}).get("enable", False):
        raise InputError(WHERE, "algorithm.filter_groups.enable=True", "the policy decides what is kept of a prompt", "zero_rows=one")
    if policy.objective is not None:
        _check_denominator(policy.objective, config.actor_rollout_ref.actor)


def _check_denominator(objective: str, actor: Any) -> None:
    """Raise InputError for a loss that is divided by a number that depends on the outcomes.

    Without loss_scale_factor verl divides by the length of the longest answer of a micro-batch.
    """
    is_fixed = actor.loss_agg_mode == "seq-mean-token-sum"
    if not is_fixed and not (actor.loss_agg_mode == "seq-mean-token-sum-norm" and actor.get("loss_scale_factor") is not None):
        given = f"objective {objective!r} with loss_agg_mode={actor.loss_agg_mode}, whose denominator depends on the outcomes"
        raise InputError(WHERE, given, "a fixed one is needed", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum")
