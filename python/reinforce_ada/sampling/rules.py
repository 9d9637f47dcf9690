"""The rules of the sampler as functions of counts: when a prompt exits, how far ahead it may be issued, and when its end is settled.

A prompt has committed its completions 0, .., n-1 and was issued 0, .., k-1. A decision point is a multiple of `decide_every`, or the cap.
"""

from __future__ import annotations

from collections.abc import Sequence

from reinforce_ada.sampling.policies.contracts import Counts, Verdict
from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.types import ExitReason, Outcome, Scored

CORRECT, WRONG, VOID = Counts(1, 0), Counts(0, 1), Counts(0, 0, 1)  # what one answer adds
_REASON_OF: dict[Verdict, ExitReason | None] = {Verdict.STOP: "satisfied", Verdict.DROP: "dropped", Verdict.CONTINUE: None}


def unit_of(outcome: Outcome, positive_threshold: float) -> Counts:
    """Return what an answer adds to the counts: CORRECT for a reward strictly above the threshold, WRONG for another, VOID for none."""
    if isinstance(outcome, Scored):
        return CORRECT if outcome.reward > positive_threshold else WRONG
    return VOID


# -------------------- the exit rule


def exit_reason(policy: Policy, counts: Counts, cap: int) -> ExitReason | None:
    """Return why a prompt with these committed counts exits, or None if it goes on. At the cap it is exhausted unless the rule ends it."""
    reason = _REASON_OF[policy.verdict(counts, cap)]
    return "exhausted" if reason is None and counts.committed == cap else reason


# -------------------- windows


def next_decision(committed: int, decide_every: int) -> int:
    """Return the first decision point past a committed prefix, ignoring the cap: (floor(n / decide_every) + 1) * decide_every."""
    return (committed // decide_every + 1) * decide_every


def window_needed(num_issued: int, committed: int, decide_every: int) -> int:
    """Return the smallest window at which the next request may go out: k - n + 1, and past the next decision at least decide_every + 1."""
    needed = num_issued - committed + 1
    return max(needed, decide_every + 1) if num_issued >= next_decision(committed, decide_every) else needed


def shared_window(capacity: int, num_active: int, round_size: int, cap: int) -> int:
    """Return the common window that fills an engine of `capacity` slots: ceil(capacity / num_active), from `round_size` to the cap."""
    return min(max(-(-capacity // max(num_active, 1)), round_size), cap)


def has_room(window: int, num_issued: int, num_answered: int) -> bool:
    """Return whether a prompt may be issued another request under a window on its unanswered ones; with none out it always may."""
    return num_issued - num_answered < max(window, 1)


# -------------------- settling


def settled_end(policy: Policy, counts: Counts, later: Sequence[Counts | None], cap: int) -> int:
    """Return the first decision point where the rule ends a prompt however its unanswered completions turn out; the cap at the latest.

    Args:
        policy: supplies the rule, `verdict`.
        counts: those of the committed completions.
        later: the outcomes past them, in request order: CORRECT, WRONG, VOID, or None for an unanswered request.
        cap: the prompt's budget.
    """
    known, num_open, every = counts, 0, policy.decide_every
    up_to_decision = [None] * (-(counts.committed + len(later)) % every)
    for end, unit in enumerate([*later, *up_to_decision], counts.committed + 1):
        if unit is None:
            num_open += 1
        else:
            known = Counts(known.correct + unit.correct, known.wrong + unit.wrong, known.void + unit.void)
        if end < cap and end % every == 0 and always_exits(policy, known, num_open, cap):
            return end
    return cap


def always_exits(policy: Policy, counts: Counts, num_open: int, cap: int) -> bool:
    """Return whether the rule ends the prompt however `num_open` more completions turn out (correct, wrong or void)."""
    correct, wrong, void = counts
    return all(
        policy.verdict(Counts(correct + x, wrong + y, void + num_open - x - y), cap) is not Verdict.CONTINUE
        for x in range(num_open + 1)
        for y in range(num_open + 1 - x)
    )
