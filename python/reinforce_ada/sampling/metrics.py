"""The metrics of one step's sampling; docs/metrics.md defines each number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reinforce_ada.sampling.policies.policy import Policy
from reinforce_ada.sampling.rules import CORRECT, unit_of
from reinforce_ada.sampling.statistics import terminals_of
from reinforce_ada.types import Aborted, Failed, Group, Lost, Outcome, Pool, Scored


class Progress(NamedTuple):
    """Running counts of one step, cheap enough to be read after every poll."""

    num_prompts: int  # those that have entered so far
    num_active: int
    num_satisfied: int
    num_dropped: int
    num_issued: int
    num_committed: int
    num_correct: int  # among the committed
    num_with_signal: int  # prompts whose committed rewards differ so far
    num_tokens: int  # those of the committed completions
    num_tokens_wasted: int  # those of answers that are never committed


@dataclass
class Tally:
    """The counters that the sampler updates with each event."""

    num_issued: int = 0
    num_committed: int = 0
    num_correct: int = 0
    num_with_signal: int = 0
    num_satisfied: int = 0
    num_dropped: int = 0
    num_skipped: int = 0
    num_lost: int = 0
    num_aborted: int = 0
    num_duplicates: int = 0
    num_rejected: int = 0
    num_tokens: int = 0
    num_tokens_wasted: int = 0
    num_ended: int = 0  # scored ones among the committed of which the end is known
    num_written: int = 0  # tokens of these that the policy wrote
    num_truncated: int = 0  # of these, completions that ended at the engine's limit of tokens

    def commit(self, outcome: Outcome, positive_threshold: float) -> None:
        self.num_committed += 1
        self.num_correct += unit_of(outcome, positive_threshold) is CORRECT
        if isinstance(outcome, Scored):
            self.num_tokens += len(outcome.completion.token_ids)
            self.num_ended += outcome.completion.finish_reason != ""  # where only rewards are kept, completions have none
            self.num_written += outcome.completion.num_written
            self.num_truncated += outcome.completion.finish_reason == "length"

    def lose(self, event: Aborted | Lost) -> None:
        """Count a request of an active prompt that is to be issued again."""
        if isinstance(event, Aborted):
            self.num_aborted += 1
            self.num_tokens_wasted += event.num_tokens
        else:
            self.num_lost += 1

    def waste(self, event: Scored | Failed | Aborted) -> None:
        """Count the tokens of an answer that is never committed."""
        if isinstance(event, Scored):
            self.num_tokens_wasted += len(event.completion.token_ids)
        elif isinstance(event, Aborted):
            self.num_tokens_wasted += event.num_tokens

    def progress(self, num_prompts: int, num_active: int) -> Progress:
        return Progress(num_prompts, num_active, *(getattr(self, name) for name in Progress._fields[2:]))


def sampling_metrics(pools: Sequence[Pool], groups: Sequence[Group], policy: Policy, num_wanted: int, tally: Tally) -> dict[str, float]:
    """Return the metrics of one step by name. A mean over nothing is nan."""
    num_prompts = len(pools)
    correct, wrong = policy.needs
    missing = [(pool.num_correct < correct, pool.num_wrong < wrong) for pool in pools if pool.exit == "exhausted"]
    metrics = {
        # Only the first num_wanted prompts: a later prompt enters because others were dropped, which biases the mean.
        "first_round_reward": _mean(m for pool in pools[:num_wanted] if (m := _first_reward(pool, policy)) is not None),
        "pool_reward": _mean(pool.mean for pool in pools if pool.count),
        "pass_rate": _mean(t.pass_rate for t in terminals_of(pools[:num_wanted], policy) if t.count),
        "kept_reward": _mean(s.reward for group in groups for s in group.kept),
        "signal_fraction": sum(pool.has_signal for pool in pools) / num_prompts,
        "samples_per_prompt": tally.num_committed / num_prompts,
        "issued_per_prompt": tally.num_issued / num_prompts,
        "waste_fraction": (tally.num_issued - tally.num_committed) / tally.num_issued,
        "completion_length_mean": tally.num_written / tally.num_ended if tally.num_ended else math.nan,
        "truncated_fraction": tally.num_truncated / tally.num_ended if tally.num_ended else math.nan,
        "num_prompts": num_prompts,
        "num_groups": len(groups),
        "num_satisfied": tally.num_satisfied,
        "num_dropped": tally.num_dropped,
        "num_skipped": tally.num_skipped,
        "num_exhausted": len(missing),
        "open_missing_correct": missing.count((True, False)),
        "open_missing_wrong": missing.count((False, True)),
        "open_missing_both": missing.count((True, True)),
        "refill_exhausted": num_prompts - tally.num_dropped < num_wanted,
        "num_completions_issued": tally.num_issued,
        "num_completions_committed": tally.num_committed,
        "num_completions_kept": sum(len(group.kept) for group in groups),
        "num_voids": sum(pool.num_void for pool in pools),
        "num_lost": tally.num_lost,
        "num_aborted": tally.num_aborted,
        "num_duplicates": tally.num_duplicates,
        "num_rejected": tally.num_rejected,
        "tokens_committed": tally.num_tokens,
        "tokens_wasted": tally.num_tokens_wasted,
    }
    return {name: float(value) for name, value in metrics.items()}


def joined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of a step from those of its prompts, if each was sampled alone: counts add up, and means are over the prompts."""
    values = {name: [part[name] for part in parts] for name in parts[0]}
    sums = {name: math.fsum(given) for name, given in values.items() if name.startswith(("num_", "open_", "tokens_"))}
    means = {name: _mean(v for v in given if not math.isnan(v)) for name, given in values.items() if name not in sums}
    kept = [part["num_completions_kept"] for part in parts]
    scored = [part["num_completions_committed"] - part["num_voids"] for part in parts]
    issued = sums["num_completions_issued"]
    return {
        **sums,
        **means,
        "kept_reward": _weighted(values["kept_reward"], kept),
        "completion_length_mean": _weighted(values["completion_length_mean"], scored),
        "truncated_fraction": _weighted(values["truncated_fraction"], scored),
        "waste_fraction": (issued - sums["num_completions_committed"]) / issued,
    }


def _weighted(values: Sequence[float], counts: Sequence[float]) -> float:
    """Return the mean over all completions, from the means and the counts of their parts."""
    total = math.fsum(counts)
    return math.fsum(value * count for value, count in zip(values, counts, strict=True) if count) / total if total else math.nan


def _first_reward(pool: Pool, policy: Policy) -> float | None:
    """Return the mean reward of the completions that are drawn whatever the outcomes; None without a scored one."""
    rewards = [o.reward for o in pool.outcomes[: min(policy.num_always_drawn, pool.cap)] if isinstance(o, Scored)]
    return math.fsum(rewards) / len(rewards) if rewards else None


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return math.fsum(items) / len(items) if items else math.nan
