"""All cases of the benchmarks, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reinforce_ada.bench import groups, linear, logits, policy
from reinforce_ada.bench.case import Case
from reinforce_ada.errors import InputError, unknown_name

OPS = ("token_logprobs", "linear_token_logprobs", "group_advantages", "policy_loss", "linear_policy_loss")


def all_cases() -> list[Case]:
    """Return every case, operator by operator."""
    found = [case for module in (logits, linear, groups, policy) for case in module.cases()]
    return sorted(found, key=lambda case: OPS.index(case.op))


def choose(ops: Sequence[str], pattern: str = "", *, quick: bool = False) -> list[Case]:
    """Return the cases of the given operators (of all if empty) with `pattern` in their names, if `quick` at their quick shapes.

    Raises: InputError for an unknown operator, or if no case is left.
    """
    for op in ops:
        if op not in OPS:
            raise unknown_name("bench", "operator", op, OPS)
    found = [case for case in all_cases() if not ops or case.op in ops]
    if quick:
        found = [replace(case, shape=case.quick_shape) for case in found if case.quick_shape is not None]
    found = [case for case in found if pattern in str(case)]
    if not found:
        raise InputError("bench", f"no case has {pattern!r} in its name", "part of a name", "reinforce-ada bench --list has them all")
    return found
