"""Avg@k with its standard error, unbiased pass@k, and the paired comparison of two evaluations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reinforce_ada.driver import run
from reinforce_ada.engines.base import Engine
from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.rewards.protocol import Diagnosed, RewardRunner
from reinforce_ada.sampling import AdaptiveSampler, Progress, preset
from reinforce_ada.types import Failed, Prompt, SamplingResult

_STEP = -1  # an evaluation is not a training step; the number is always the same, so that before and after draw from the same seeds


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of k completions for each of P prompts."""

    k: int
    avg_at_k: float  # mean over prompts of the share of correct completions
    stderr: float  # of avg_at_k, over prompts
    pass_at_k: Mapping[str, float]  # "1", "2", "4", .. k
    per_prompt: tuple[float, ...]  # [P], share of correct completions; nan if every reward failed
    num_tokens: int
    num_voids: int
    completion_length_mean: float = math.nan  # tokens per scored completion
    truncated_fraction: float = math.nan  # share of these that were cut at max_tokens

    def record(self) -> dict[str, Any]:
        return {"kind": "eval", **asdict(self), "per_prompt": list(self.per_prompt)}


def evaluate(
    engine: Engine,
    rewards: RewardRunner,
    prompts: Sequence[Prompt],
    *,
    k: int,
    seed: int,
    policy_version: int,
    positive_threshold: float,
    request_timeout_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Evaluation:
    """Sample k completions of every prompt and count the correct ones (reward > positive_threshold).

    Raises: InputError without prompts, and if no completion could be scored.
    """
    if not prompts:
        raise InputError("evaluate", "no prompts", "at least one", "raise --eval-prompts")
    policy = preset("grpo", group_size=k, positive_threshold=positive_threshold)
    sampler = AdaptiveSampler(prompts, policy, step=_STEP, policy_version=policy_version, seed=seed)
    result = run(sampler, engine, rewards, request_timeout_s=request_timeout_s, on_progress=on_progress)
    refuse_only_voids(result, rewards, "the evaluation")
    counts = [(pool.count, pool.num_correct) for pool in result.pools]
    shares = tuple(c / n if n else math.nan for n, c in counts)
    powers = sorted({1 << i for i in range(k.bit_length())} | {k})
    known = [s for s in shares if not math.isnan(s)]
    return Evaluation(
        k=k,
        avg_at_k=_mean(known),
        stderr=standard_error(known),
        pass_at_k={str(j): _mean([pass_at_k(n, c, j) for n, c in counts if n >= j]) for j in powers},
        per_prompt=shares,
        num_tokens=int(result.metrics["tokens_committed"]),
        num_voids=int(result.metrics["num_voids"]),
        completion_length_mean=result.metrics["completion_length_mean"],
        truncated_fraction=result.metrics["truncated_fraction"],
    )


def refuse_only_voids(result: SamplingResult, rewards: RewardRunner, what: str) -> None:
    """Raise InputError if every completion of `what` is a void, with the most common reason and the end of the last traceback."""
    reasons = [outcome.reason for pool in result.pools for outcome in pool.outcomes if isinstance(outcome, Failed)]
    if not reasons or any(pool.count for pool in result.pools):
        return
    trace = rewards.last_traceback if isinstance(rewards, Diagnosed) else ""
    ends = " | ".join(line.strip() for line in trace.strip().split("\n")[-4:])
    hint = "mend what fails, then train --resume goes on" + (f"; its traceback ends: {one_line(ends, 600)}" if ends else "")
    given = f"none of the {len(reasons)} completions of {what} could be scored: {one_line(Counter(reasons).most_common(1)[0][0])}"
    raise InputError("reward", given, "a reward that gives a number for at least one", hint)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of P(at least one of k is correct) from c correct of n >= k: 1 - C(n-c, k) / C(n, k).

    Source: Chen et al. 2021, arXiv 2107.03374.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise InputError("pass_at_k", f"n={n}, c={c}, k={k}", "0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def paired_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the mean of after - before over the prompts, and its standard error (prompts without a share in both are left out)."""
    differences = [b - a for a, b in zip(before, after, strict=True) if not (math.isnan(a) or math.isnan(b))]
    return _mean(differences), standard_error(differences)


def standard_error(values: Sequence[float]) -> float:
    """Return the sample standard deviation (ddof 1) / sqrt(n); nan below two values."""
    n = len(values)
    if n < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
