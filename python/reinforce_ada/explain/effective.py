"""The objective that a policy ascends: its effective weight w(p), exact over the states in which its stopping rule can end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdvantageSpec, Counts, Policy, Verdict, stopping_table
from reinforce_ada.sampling.pool import only_reward
from reinforce_ada.sampling.statistics import Terminal, live_sequences
from reinforce_ada.types import Group, Pool, Prompt

Array = NDArray[np.float64]

_NUM_SEQUENCES = 16_384  # drawn for all terminal states together, if the selection depends on the order of the draws


@dataclass(frozen=True)
class EffectiveWeight:
    """E[gradient of a prompt] = w(p) * grad p, for rewards of 0 and 1.

        w(p) = sum over terminals of paths p^k (1-p)^l * (plus / p + minus / (1-p)),   f(p) = integral of w from 0 to p
        plus = a A+ / d,  minus = -b A- / d

    for k correct and l wrong in the pool, a correct and b wrong kept with advantages A+ and A-, and the denominator d = a + b, or
    group_size for a policy with an objective. It holds because the policy sees only the class of a completion: the expected score of a
    correct one is grad p / p, and that of a wrong one is -grad p / (1-p).

    Each field is [S] float64, one value per terminal state.
    """

    correct: Array
    wrong: Array
    paths: Array
    plus: Array
    minus: Array
    noise_terms: Array  # (a A+^2 + b A-^2) / d^2
    kept: Array  # a + b
    simulated: bool  # plus and minus are means over drawn sequences, since the selection depends on their order

    def __call__(self, p: Array) -> Array:
        """Return w at pass rates `p` in [0, 1], in the same shape."""
        p = np.asarray(p, dtype=np.float64)[..., None]
        # One power less instead of a division, which would be 0 / 0 at p = 0 and p = 1.
        return self._sum(p, self.correct - 1, self.wrong, self.plus) + self._sum(p, self.correct, self.wrong - 1, self.minus)

    def objective(self, p: Array) -> Array:
        """Return f at pass rates `p`, with f(0) = 0, by Gauss-Legendre with enough nodes to be exact, but for rounding, for w's degree."""
        p = np.asarray(p, dtype=np.float64)
        nodes, weights = np.polynomial.legendre.leggauss(int((self.correct + self.wrong).max()) // 2 + 1)
        return np.asarray((self(p[..., None] * (nodes + 1) / 2) * weights).sum(-1) * p / 2)

    def variance(self, p: Array) -> Array:
        """Return the variance of the factor of grad p, due to the pool's random size and composition, for 0 < p < 1."""
        p = np.asarray(p, dtype=np.float64)
        factor = self.plus / p[..., None] + self.minus / (1 - p[..., None])
        second = self._sum(p[..., None], self.correct, self.wrong, factor**2)
        return np.asarray(second - self(p) ** 2)

    def noise(self, p: Array) -> Array:
        """Return the variance of a prompt's gradient due to differences within a class, for scores of variance 1 there."""
        p = np.asarray(p, dtype=np.float64)
        return self._sum(p[..., None], self.correct, self.wrong, self.noise_terms)

    def _sum(self, p: Array, k: Array, w: Array, value: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(value == 0, 0.0, self.paths * p**k * (1 - p) ** w * value)
        return np.asarray(terms.sum(-1))


def effective_weight(policy: Policy, cap: int | None = None, prior: tuple[float, float] = (1.0, 1.0)) -> EffectiveWeight:
    """Return the effective weight of a policy. It is exact if the selection depends only on the counts of the pool, else marked simulated.

    Args:
        policy: any policy; a prompt that it drops contributes nothing, and w is per prompt that enters.
        cap: the prompt's budget; None means the policy's cap.
        prior: Beta(a, b) of the prompt's pass rate, for a weight that reads it.
    Raises: InputError for a scale over the batch, which couples prompts, and for a threshold that is not between rewards of 0 and 1.
    """
    where = f"explain {policy.name!r}"
    if not 0 <= policy.positive_threshold < 1:
        given = f"positive_threshold {policy.positive_threshold}"
        raise InputError(where, given, "one in [0, 1) is needed: the exact program is for rewards of 0 and 1")
    cap = policy.cap if cap is None else cap
    table = stopping_table(policy, cap)
    terminals = [t for t in table.terminals if t.verdict is not Verdict.DROP]
    simulated = any(_depends_on_order(policy, t) for t in terminals)
    rng = np.random.default_rng(0)
    num = _NUM_SEQUENCES // len(terminals) + 1
    live = live_sequences(policy, cap) if simulated else {}
    sequences = [_sequences(live, t, num, rng) if simulated else [_canonical(t)] for t in terminals]
    terms = _terms(policy, [(t, s) for t, drawn in zip(terminals, sequences, strict=True) for s in drawn], cap, prior)
    starts = np.cumsum([0, *map(len, sequences)])[:-1]
    plus, minus, noise, kept = (np.add.reduceat(x, starts) / np.diff([*starts, len(x)]) if len(x) else x for x in terms)
    k, w, paths = (np.array([float(getattr(t, name)) for t in terminals]) for name in ("correct", "wrong", "num_paths"))
    return EffectiveWeight(k, w, paths, plus, minus, noise, kept, simulated)


def binary_advantages(spec: AdvantageSpec, correct: Array, wrong: Array, kept_correct: Array, kept_wrong: Array) -> tuple[Array, Array]:
    """Return the advantages of `ops.group_advantages` for correct (reward 1) and wrong (reward 0) completions, each [G] float64.

    A predicted pass rate counts as 1/2, which is what a prediction says that knows nothing.

    Args:
        spec: the result of a weight hook.
        correct, wrong: [G] counts of the pools.
        kept_correct, kept_wrong: [G] counts of the groups.
    Raises: InputError for scale "batch".
    """
    if spec.scale == "batch":
        raise InputError("explain", 'scale "batch", which couples prompts', "a weight that looks at one prompt at a time")
    pool, group = (correct, wrong), (kept_correct, kept_wrong)
    advantages = np.stack([0.0 - _baseline(spec, 0.0, pool, group), 1.0 - _baseline(spec, 1.0, pool, group)], axis=1)
    if spec.scale != "none":
        advantages = advantages / _divisor(spec, *(pool if spec.scale == "pool" else group))[:, None]
    if spec.class_weights is not None:
        advantages = advantages * np.take_along_axis(spec.class_weights, (advantages >= 0).astype(int), axis=1)
    if spec.prediction_weights is not None:
        advantages -= 0.5 * spec.prediction_weights[:, None]
    if isinstance(spec.baseline, str):
        k, w = group if spec.baseline == "group" else pool
        advantages[(k == 0) | (w == 0)] = 0.0
    return advantages[:, 1], advantages[:, 0]


def _baseline(spec: AdvantageSpec, reward: float, pool: tuple[Array, Array], group: tuple[Array, Array]) -> Array:
    if not isinstance(spec.baseline, str):
        return spec.baseline
    k, w = group if spec.baseline == "group" else pool
    if spec.baseline == "leave-one-out":
        return np.asarray((k - reward) / np.maximum(k + w - 1, 1))
    return np.asarray(k / np.maximum(k + w, 1))


def _divisor(spec: AdvantageSpec, k: Array, w: Array) -> Array:
    n = k + w
    std = np.sqrt(k * w / np.maximum(n, 1) / np.maximum(n - spec.ddof, 1))
    return np.where((n > spec.ddof) & (k > 0) & (w > 0), std + spec.eps, 1.0)


# -------------------- the hooks at a terminal state


def _terms(
    policy: Policy, drawn: Sequence[tuple[Terminal, str]], cap: int, prior: tuple[float, float]
) -> tuple[Array, Array, Array, Array]:
    """Return `plus`, `minus`, the noise term and the number kept of each draw sequence."""
    groups = [_group(policy, terminal, chars, cap, prior) for terminal, chars in drawn]
    if not groups:
        return np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0)
    a = np.array([sum(s.reward for s in g.kept) for g in groups])
    b = np.array([float(len(g.kept)) for g in groups]) - a
    k, w = (np.array([float(n) for n in counts]) for counts in zip(*((t.correct, t.wrong) for t, _ in drawn), strict=True))
    up, down = binary_advantages(policy.weight(groups, policy), k, w, a, b)
    d = np.full(len(a), float(policy.group_size)) if policy.objective is not None else np.maximum(a + b, 1)
    return a * up / d, -b * down / d, (a * up**2 + b * down**2) / d**2, a + b


def _group(policy: Policy, terminal: Terminal, chars: str, cap: int, prior: tuple[float, float]) -> Group:
    """Return the group that a policy keeps of a pool with these outcomes."""
    outcomes = tuple(only_reward(float(c == "+")) for c in chars)
    k, n = terminal.correct, len(chars)
    exit_ = "exhausted" if terminal.verdict is Verdict.CONTINUE else "satisfied"
    low, high = float(k == n), float(k > 0)
    pool = Pool(Prompt("p"), outcomes, k, n - k, 0, k / n, k * (n - k) / n, low, high, n, exit_, cap, prior)  # type: ignore[arg-type]
    return Group(pool, tuple(outcomes[i] for i in _kept(policy, chars)))


def _kept(policy: Policy, chars: str) -> list[int]:
    correct = np.array([c == "+" for c in chars], dtype=bool)
    return policy.select(correct.astype(np.float64), correct, policy.group_size)


# -------------------- the order of the draws


def _canonical(t: Terminal) -> str:
    return "+" * t.correct + "-" * t.wrong


def _depends_on_order(policy: Policy, t: Terminal) -> bool:
    """Return whether the numbers of kept completions per class depend on the order of the draws, by a test of six orders."""
    chars = np.array(list(_canonical(t)))
    rng = np.random.default_rng(t.count)
    orders = ["".join(chars), "".join(chars[::-1]), *("".join(rng.permutation(chars)) for _ in range(4))]
    return len({(len(kept), sum(order[i] == "+" for i in kept)) for order in orders for kept in [_kept(policy, order)]}) > 1


def _sequences(live: Mapping[Counts, int], t: Terminal, num: int, rng: np.random.Generator) -> list[str]:
    """Sample sequences that end in this terminal. All are equally likely, whatever p, so one sample serves every pass rate."""
    return ["".join(_backwards(live, t, rng))[::-1] for _ in range(num)]


def _backwards(live: Mapping[Counts, int], t: Terminal, rng: np.random.Generator) -> Iterator[str]:
    k, w = t.correct, t.wrong
    while k + w:
        by_correct, by_wrong = (live.get(Counts(*counts), 0) for counts in ((k - 1, w), (k, w - 1)))
        is_correct = rng.random() < by_correct / (by_correct + by_wrong)
        yield "+" if is_correct else "-"
        k, w = (k - 1, w) if is_correct else (k, w - 1)
