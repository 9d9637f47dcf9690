"""The fit of the models to a finished run: lengths, pass rates and the engine's speed, from its store and its log."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import PoolCounts, RolloutStore
from reinforce_ada.sampling import Policy, configured
from reinforce_ada.sampling.policies.contracts import Window
from reinforce_ada.sampling.sampler import Schedule
from reinforce_ada.sampling.statistics import log_beta
from reinforce_ada.sampling.windows import window_of
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.population import BetaRates, World
from reinforce_ada.simulate.run import simulate
from reinforce_ada.training.log import read_log
from reinforce_ada.types import Scored

_WHERE = "simulate --fit"


@dataclass(frozen=True)
class Fit:
    """The models of one run, and how well the engine model explains it."""

    engine: EngineModel
    lengths: LengthModel
    population: BetaRates
    num_completions: int
    num_steps: int
    r2: float  # share of the variance of sampling_s over the steps that the engine model explains

    def __str__(self) -> str:
        e, n = self.engine, self.lengths
        return (
            f"fitted to {self.num_completions} completions of {self.num_steps} steps: decode step {e.step_ms:.3g} ms "
            f"+ {e.busy_ms:.3g} ms a sequence (R² {self.r2:.3f}), {e.slots} slots; "
            f"lengths: median {n.median_correct:.0f} correct, {n.median_wrong:.0f} wrong, "
            f"sigma {n.sigma:.2f}, of the prompt {n.sigma_prompt:.2f}; pass rates {self.population}"
        )


@dataclass(frozen=True)
class _Answers:
    """The scored completions of one step, in arrays [N]; prompts are positions in the step."""

    prompt_of: NDArray[np.int64]
    index: NDArray[np.int64]
    correct: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    committed: NDArray[np.bool_]
    num_prompts: int


class _RecordedWorld(World):
    """The completions that a step had; those for which it did not wait are drawn from the models."""

    def __init__(self, answers: _Answers, lengths: LengthModel, population: BetaRates, cap: int, seed: int) -> None:
        super().__init__(population.draw(answers.num_prompts, seed), lengths, seed)
        self._correct = np.zeros((answers.num_prompts, cap), np.bool_)
        self._tokens = np.zeros((answers.num_prompts, cap), np.int64)
        self._correct[answers.prompt_of, answers.index] = answers.correct
        self._tokens[answers.prompt_of, answers.index] = np.maximum(answers.tokens, 1)

    def draw(self, prompt_of: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        correct, tokens = super().draw(prompt_of, index)
        known = self._tokens[prompt_of, index]
        return np.where(known > 0, self._correct[prompt_of, index], correct), np.where(known > 0, known, tokens)


def fit_run(path: Path) -> Fit:
    """Return the models of a finished run.

    Lengths and pass rates are fitted to committed completions, which come in request order and so are not selected by length. step_ms and
    busy_ms minimise sum over steps of (sampling_s - step_ms * decode steps - busy_ms * tokens)^2, neither below 0; the decode steps are
    counted by sampling each step again, with its own completions, policy, schedule and window, on the virtual clock.

    Args:
        path: the run's folder, or its rollouts.sqlite.
    Raises: InputError if there is no such run, or if it has too few steps.
    """
    folder = path.parent if path.name == "rollouts.sqlite" else path
    log = read_log(folder / "log.jsonl")
    try:
        return _fit(folder, log)
    except (KeyError, TypeError) as e:
        given = f"the first record of {folder / 'log.jsonl'} is not that of a run: {type(e).__name__} {e}"
        raise InputError(_WHERE, given, "a folder that `reinforce-ada train` wrote is needed") from e


def _fit(folder: Path, log: Sequence[Mapping[str, Any]]) -> Fit:
    header = next((r for r in log if r["kind"] == "run" and r.get("config")), None)
    seconds = {r["step"]: float(r["sampling_s"]) for r in log if r["kind"] == "step" and isinstance(r.get("sampling_s"), (int, float))}
    if header is None or len(seconds) < 2:
        raise InputError(_WHERE, f"{folder} holds no run with two finished steps", "a folder that `reinforce-ada train` wrote is needed")
    run = _Run.of(folder, header)
    with RolloutStore(folder / "rollouts.sqlite", read_only=True) as store:
        pools = store.pool_counts()
        steps = {s: _answers(store, s, pools, run.policy.positive_threshold) for s in store.finished_steps() if s in seconds}
    lengths = fit_lengths(list(steps.values()), run.max_tokens)
    population = fit_beta((pool.num_correct, pool.num_wrong) for pool in pools)
    counted = [_replay(steps[s], lengths, population, run, seed=s) for s in steps]
    step_ms, busy_ms, r2 = _fit_speed(np.array(counted, float), np.array([seconds[s] for s in steps]))
    num_completions = sum(int(answers.committed.sum()) for answers in steps.values())
    return Fit(EngineModel(run.slots, step_ms, busy_ms), lengths, population, num_completions, len(steps), r2)


@dataclass(frozen=True)
class _Run:
    """The sampling settings of a run, from the header of its log."""

    policy: Policy
    schedule: Schedule
    window: int | Window | None
    slots: int
    max_tokens: int

    @classmethod
    def of(cls, folder: Path, header: Mapping[str, Any]) -> _Run:
        """Read the settings. Raises: InputError for a header that lacks a setting or has an invalid one."""
        try:
            sampling, engine = (SimpleNamespace(**header["config"][section]) for section in ("sampling", "engine"))
            policy = configured(sampling)
            window = window_of(sampling, policy, latency_bound=header["device"] != "cpu")
            return cls(policy, sampling.schedule, window, int(engine.max_num_seqs), int(sampling.max_tokens))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            given = f"the first record of {folder / 'log.jsonl'} does not say how the run sampled ({type(e).__name__}: {e})"
            raise InputError(_WHERE, given, "a run of this program is needed") from e


def fit_store(path: Path) -> BetaRates:
    """Fit the pass rates of a finished run, given its store or its folder. Raises: InputError if there is no store."""
    with RolloutStore(path / "rollouts.sqlite" if path.is_dir() else path, read_only=True) as store:
        return fit_beta((pool.num_correct, pool.num_wrong) for pool in store.pool_counts())


def _answers(store: RolloutStore, step: int, pools: Iterable[PoolCounts], positive_threshold: float) -> _Answers:
    sizes = {p.prompt_id: p.num_correct + p.num_wrong + p.num_void for p in pools if p.step == step}
    position = {prompt_id: i for i, prompt_id in enumerate(sizes)}
    scored = {e.id: e for e in store.events(step) if isinstance(e, Scored) and e.id.prompt_id in position}
    ids = list(scored)
    return _Answers(
        prompt_of=np.array([position[i.prompt_id] for i in ids], np.int64),
        index=np.array([i.index for i in ids], np.int64),
        correct=np.array([scored[i].reward > positive_threshold for i in ids], np.bool_),
        tokens=np.array([len(scored[i].completion.token_ids) for i in ids], np.int64),
        committed=np.array([i.index < sizes[i.prompt_id] for i in ids], np.bool_),
        num_prompts=len(sizes),
    )


def _replay(answers: _Answers, lengths: LengthModel, population: BetaRates, run: _Run, *, seed: int) -> tuple[float, float]:
    """Return (decode steps, tokens) of one step of the run."""
    world = _RecordedWorld(answers, lengths, population, run.policy.cap, seed)
    done = simulate(world, run.policy, EngineModel(run.slots), schedule=run.schedule, window=run.window)
    return done.num_steps, done.tokens


def _fit_speed(counted: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return (step_ms, busy_ms, R²) by least squares, neither time negative; `counted` [S, 2] has decode steps and tokens."""
    found = np.linalg.lstsq(counted, seconds, rcond=None)[0]
    if found.min() < 0:
        alone = counted.T @ seconds / (counted**2).sum(axis=0)
        errors = ((seconds[:, None] - counted * alone) ** 2).sum(axis=0)
        found = np.where(np.arange(2) == errors.argmin(), alone, 0.0)
    residual, total = ((seconds - counted @ found) ** 2).sum(), ((seconds - seconds.mean()) ** 2).sum()
    return float(found[0]) * 1e3, float(found[1]) * 1e3, float(1 - residual / total) if total else 1.0


def fit_lengths(steps: Iterable[_Answers], max_tokens: int) -> LengthModel:
    """Fit the length model to committed completions.

    The median of a class is that of its lengths. With r = log L - log median: sigma_prompt^2 is the mean product r_i r_j over the pairs of
    a pool, and sigma^2 + sigma_prompt^2 is the mean r^2 over r < 0, which the cut at max_tokens does not affect.

    Raises: InputError without a completion.
    """
    parts = [(a.prompt_of[a.committed], a.correct[a.committed], a.tokens[a.committed]) for a in steps]
    owner = [prompt_of + i * 2**32 for i, (prompt_of, _, _) in enumerate(parts)]
    pool_of = np.unique(np.concatenate(owner), return_inverse=True)[1] if parts else np.empty(0, np.int64)
    if not len(pool_of):
        raise InputError(_WHERE, "no committed completion", "a run with some is needed")
    correct, tokens = np.concatenate([c for _, c, _ in parts]), np.concatenate([t for _, _, t in parts])
    log_tokens = np.log(np.maximum(tokens, 1))
    centre = np.median(log_tokens)
    wrong_median, right_median = (np.median(log_tokens[correct == c]) if (correct == c).any() else centre for c in (False, True))
    residual = log_tokens - np.where(correct, right_median, wrong_median)
    low = residual[residual < 0]
    total = float((low**2).mean()) if len(low) else 0.0
    count, sums, squares = (np.bincount(pool_of, weights=w) for w in (np.ones(len(residual)), residual, residual**2))
    num_pairs = float((count * (count - 1)).sum())
    shared = min(max(float((sums**2 - squares).sum()) / num_pairs, 0.0), total) if num_pairs else 0.0
    return LengthModel(math.exp(right_median), math.exp(wrong_median), math.sqrt(total - shared), math.sqrt(shared), max_tokens)


def fit_beta(counts: Iterable[tuple[int, int]]) -> BetaRates:
    """Return the Beta(a, b) of maximum likelihood for pools of (correct, wrong) completions.

        log likelihood = sum over pools of log B(a + correct, b + wrong) - log B(a, b)
    A stopping rule on the counts multiplies the likelihood by a factor without a and b, so the pools may come from any rule.

    Raises: InputError without a scored completion.
    """
    pools = Counter((k, w) for k, w in counts if k + w)
    if not pools:
        raise InputError(_WHERE, "no pool with a scored completion", "a finished step is needed")

    def likelihood(log_a: float, log_b: float) -> float:
        a, b = math.exp(log_a), math.exp(log_b)
        return math.fsum(n * (log_beta(a + k, b + w) - log_beta(a, b)) for (k, w), n in pools.items())

    at, step = (0.0, 0.0), 1.0
    best = likelihood(*at)
    while step > 1e-3:  # to 0.1 %; the steps keep both inside (0.01, 100)
        near = [
            (x, y)
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
            if max(abs(x := at[0] + dx * step), abs(y := at[1] + dy * step)) <= math.log(100)
        ]
        top, point = max((likelihood(*p), p) for p in near)
        if top > best:
            best, at = top, point
        else:
            step /= 2
    return BetaRates(math.exp(at[0]), math.exp(at[1]))
