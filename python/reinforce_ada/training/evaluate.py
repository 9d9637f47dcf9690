"""Avg@k, unbiased pass@k and maj@k with their standard errors over prompts, and the paired comparison of two evaluations.

docs/evaluation.md has the formulas.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reinforce_ada.driver import run
from reinforce_ada.engines.base import Engine
from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.rewards.protocol import Answer, Diagnosed, RewardRunner
from reinforce_ada.sampling import AdaptiveSampler, Progress, preset
from reinforce_ada.types import Failed, Pool, Prompt, SamplingResult, Scored

_STEP = -1  # an evaluation is not a training step; the number is always the same, so that before and after draw from the same seeds


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """The result of k completions for each of P prompts."""

    k: int
    avg_at_k: float  # mean over prompts of the share of correct completions
    stderr: float  # of avg_at_k, over prompts
    pass_at_k: Mapping[str, float]  # "1", "2", "4", .. k
    pass_at_k_stderr: Mapping[str, float]  # of each, over prompts
    maj_at_k: float | None  # mean over prompts of P(the majority answer is correct); None if no answers were read
    maj_at_k_stderr: float | None  # of maj_at_k, over prompts
    per_prompt: tuple[float, ...]  # [P], share of correct completions; nan if every reward failed
    num_tokens: int
    num_voids: int
    completion_length_mean: float = math.nan  # tokens per scored completion
    truncated_fraction: float = math.nan  # share of these that were cut at max_tokens

    def __repr__(self) -> str:
        return f"<Evaluation: Avg@{self.k} {self.avg_at_k:.3f} ± {self.stderr:.3f} on {len(self.per_prompt)} prompts>"

    def record(self) -> dict[str, Any]:
        """Return the evaluation as a line of the log; what was not measured is left out."""
        return {"kind": "eval", **{k: v for k, v in asdict(self).items() if v is not None}, "per_prompt": list(self.per_prompt)}


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
    answer: Answer | None = None,
    on_result: Callable[[SamplingResult], None] | None = None,
) -> Evaluation:
    """Sample k completions of every prompt and count the correct ones (reward > positive_threshold).

    Args:
        answer: what a completion answers, for maj@k; None measures no maj@k.
        on_result: called with the completions.
    Raises: InputError without prompts, and if no completion could be scored.
    """
    if not prompts:
        raise InputError("evaluate", "no prompts", "at least one", "raise --eval-prompts")
    policy = preset("grpo", group_size=k, positive_threshold=positive_threshold)
    sampler = AdaptiveSampler(prompts, policy, step=_STEP, policy_version=policy_version, seed=seed)
    result = run(sampler, engine, rewards, request_timeout_s=request_timeout_s, on_progress=on_progress)
    refuse_only_voids(result, rewards, "the evaluation")
    if on_result is not None:
        on_result(result)
    counts = [(pool.count, pool.num_correct) for pool in result.pools]
    shares = tuple(c / n if n else math.nan for n, c in counts)
    powers = sorted({1 << i for i in range(k.bit_length())} | {k})
    known = [s for s in shares if not math.isnan(s)]
    passed = {str(j): [pass_at_k(n, c, j) for n, c in counts if n >= j] for j in powers}
    voted = None if answer is None else [_vote(pool, answer, positive_threshold) for pool in result.pools if pool.count == k]
    return Evaluation(
        k=k,
        avg_at_k=_mean(known),
        stderr=standard_error(known),
        pass_at_k={j: _mean(values) for j, values in passed.items()},
        pass_at_k_stderr={j: standard_error(values) for j, values in passed.items()},
        maj_at_k=None if voted is None else _mean(voted),
        maj_at_k_stderr=None if voted is None else standard_error(voted),
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


def majority(votes: Sequence[tuple[Hashable | None, bool]]) -> float:
    """Return the probability that the majority answer is correct, for one prompt.

    The answer with the most votes wins; between answers with equally many the winner is drawn uniformly, and its expectation is returned.
    None is no answer: it is no vote. If nobody votes, the result is 0. Where completions with the same answer were scored differently, the
    winner counts as the share of them that are correct.

    Args:
        votes: (answer, whether its completion is correct) of every completion of the prompt. Equal answers are one answer.
    Source: self-consistency, Wang et al. 2022, arXiv 2203.11171, whose ties are unstated.
    """
    given = [(answer, is_correct) for answer, is_correct in votes if answer is not None]
    if not given:
        return 0.0
    counts = Counter(answer for answer, _ in given)
    most = max(counts.values())
    winners = {answer for answer, count in counts.items() if count == most}
    return sum(is_correct for answer, is_correct in given if answer in winners) / (most * len(winners))


def _vote(pool: Pool, answer: Answer, positive_threshold: float) -> float:
    scored = [outcome for outcome in pool.outcomes if isinstance(outcome, Scored)]
    return majority([(_read(answer, s.completion.text), s.reward > positive_threshold) for s in scored])


def _read(answer: Answer, text: str) -> Hashable | None:
    try:
        given = answer(text)
        hash(given)
    except Exception:  # somebody else's code, after hours of sampling: a completion that it cannot read gives no vote
        return None
    return given


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
