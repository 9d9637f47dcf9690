"""The settings of an adapter for a trainer that samples each prompt in a coroutine of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from reinforce_ada.async_driver import check_alone
from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.sampling import Centered, Policy, preset, sized_preset
from reinforce_ada.sampling.policies.contracts import at_least


class Settings(NamedTuple):
    """What the user chose.

    policy: a preset, "reinforce-ada-balance" by default.
    window: how many completions of a prompt may run ahead of those already counted; by default as many as are needed for certain.
    """

    policy: Policy
    window: int | None


def settings_of(where: str, options: Mapping[str, Any], group_size: int | None = None, *, remembers: bool = False) -> Settings:
    """Return the settings; every option beside `preset` and `window` is a keyword of the preset.

    Args:
        group_size: how many rows of a prompt the trainer takes; None if it takes any number.
        remembers: whether the adapter keeps a memory.
    Raises: InputError for unknown names, values that cannot be used, and what `check_policy` refuses.
    """
    given = dict(options)
    name, window = given.pop("preset", "reinforce-ada-balance"), given.pop("window", None)
    if window is not None:
        at_least(1, where, window=window)
    if not isinstance(name, str):
        raise InputError(where, f"preset {one_line(repr(name))}", "the name of a preset is needed", "preset=reinforce-ada-balance")
    try:
        policy = preset(name, **given) if group_size is None else sized_preset(name, group_size, **given)
    except TypeError as error:  # a text where a number is needed
        raise InputError(f"{where}: preset {name!r}", one_line(str(error)), "values of the keywords' types are needed") from error
    where = f"{where}: policy {policy.name!r}"
    check_policy(where, policy, remembers=remembers)
    if group_size is not None and policy.group_size != group_size:
        raise InputError(where, f"group_size {policy.group_size}", f"that of the trainer, {group_size}, is needed", "leave group_size out")
    return Settings(policy, window)


def check_policy(where: str, policy: Policy, *, remembers: bool = False) -> None:
    """Raise InputError for a policy that needs other prompts, predictions or, where the adapter keeps no memory, earlier steps."""
    check_alone(where, policy)
    if policy.needs_prediction:
        raise InputError(where, "a baseline that is predicted", "this trainer's loss does not give the states it needs")
    if policy.needs_memory and not remembers:
        raise InputError(where, "a policy that remembers earlier steps", "this trainer has no place for a memory", "baseline=pool")
    if isinstance(policy.weight, Centered) and policy.weight.scale == "batch":
        raise InputError(where, "scale 'batch'", "each prompt is sampled alone", "scale=none, pool or group")


def check_values(where: str, given: Mapping[str, Any], needed: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raise InputError for the first setting of a trainer that has none of its usable values; `needed` has these, and why."""
    for name, (usable, reason) in needed.items():
        if given[name] not in usable:
            raise InputError(where, f"{name}={given[name]}", reason, f"{name}={usable[0]}")
