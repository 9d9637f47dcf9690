"""The exact numbers of a policy, and the printouts made from them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reinforce_ada.errors import InputError
from reinforce_ada.explain.effective import EffectiveWeight, effective_weight
from reinforce_ada.sampling import PRESETS, All, Balanced, Centered, History, Never, Policy, preset, stopping_table
from reinforce_ada.sampling.statistics import pool_mean, samples, signal

WEIGHT_RATES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
RATES = (0.02, 0.1, 0.3, 0.5, 0.8, 0.95)
ALL_RATES = tuple(sorted({*WEIGHT_RATES, *RATES}))
POPULATIONS = ((0.5, 2.5), (1.0, 2.0), (2.5, 0.6))

# Variants in the comparison beside the unchanged presets: preset, overrides.
_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("grpo", {"group_size": 4, "scale": "none"}),
    ("grpo", {"group_size": 16}),
    ("grpo", {"group_size": 32}),
    ("reinforce-ada-memory", {"group_size": 2}),
    ("reinforce-ada-pos", {"decide_every": 1}),
    ("reinforce-ada-pos", {"decide_every": 1, "min_pool": 0}),
    ("reinforce-ada-pos", {"objective": "mean"}),
    ("reinforce-ada-balance", {"decide_every": 1}),
    ("reinforce-ada-balance", {"scale": "pool"}),
)


@dataclass(frozen=True)
class Explanation:
    """A policy and its exact numbers for rewards of 0 and 1. If there is no w(p), `weight` is None and a note says why."""

    label: str
    policy: Policy
    cap: int  # the budget of a prompt not seen before
    weight: EffectiveWeight | None
    notes: tuple[str, ...]

    def at(self, rates: Sequence[float]) -> dict[str, list[float]]:
        """Return the numbers of a prompt at each pass rate, by name.

        They are samples E[N], signal P(both classes in the pool), and the bias of the pool mean and of the metric pass_rate (which is only
        rounding). If there is a weight w(p): also w(p), the implied objective f(p), and the variance and noise of the gradient (see
        `EffectiveWeight`).
        """
        table, p = stopping_table(self.policy, self.cap), np.array(rates, dtype=np.float64)
        found = {name: [table.expect(value, x) for x in rates] for name, value in (("samples", samples), ("signal", signal))}
        found["bias"] = [table.expect(pool_mean, x) - x for x in rates]
        found["pass_rate_bias"] = [table.expect(lambda t: t.pass_rate, x) - x for x in rates]
        if self.weight is not None:
            w = self.weight
            found |= {"w": w(p).tolist(), "f": w.objective(p).tolist(), "variance": w.variance(p).tolist(), "noise": w.noise(p).tolist()}
        return found

    def population(self, a: float, b: float) -> dict[str, float]:
        """Return the mean samples and the fraction with signal over prompts whose pass rates are Beta(a, b)."""
        table = stopping_table(self.policy, self.cap)
        return {"a": a, "b": b, "signal": table.expect_beta(signal, a, b), "samples": table.expect_beta(samples, a, b)}

    def record(self, populations: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """Return all numbers, including those that are not printed, for JSON."""
        return {
            "policy": self.label,
            "cap": self.cap,
            "parts": dict(words(self.policy)),
            "notes": list(self.notes),
            "simulated": self.weight is not None and self.weight.simulated,
            "p": list(ALL_RATES),
            **self.at(ALL_RATES),
            "populations": [self.population(a, b) for a, b in populations],
        }


_LARGEST_CAP = 1000  # 2^1000 draw sequences still fit float64 (up to 1.8e308)


def explain(policy: Policy, label: str | None = None) -> Explanation:
    """Return the numbers of one policy. Raises: InputError for a cap past 1000 completions."""
    cap = policy.allocate.budgets([History()])[0]
    if cap > _LARGEST_CAP:
        given = f"a cap of {cap} completions per prompt"
        raise InputError(f"explain {policy.name!r}", given, f"at most {_LARGEST_CAP}, whose number of draw sequences float64 can hold")
    notes = list(_notes(policy, cap))
    try:
        weight = effective_weight(policy, cap)
    except InputError as e:
        return Explanation(label or policy.name, policy, cap, None, (*notes, f"no w(p): {e}"))
    if weight.simulated:
        notes.append("simulated: the selection depends on the order of the draws, so w, f, variance and noise are means over drawn orders")
    return Explanation(label or policy.name, policy, cap, weight, tuple(notes))


def comparison() -> list[Explanation]:
    """Return every preset, each followed by the variants that show the effect of one setting."""
    rows = []
    for name in PRESETS:
        rows.append(explain(preset(name)))
        for variant, overrides in _VARIANTS:
            if variant == name:
                label = ", ".join([name, *(f"{key} {value}" for key, value in overrides.items())])
                rows.append(explain(preset(name, **overrides), label))
    return rows


def _notes(policy: Policy, cap: int) -> Iterator[str]:
    weight = policy.weight
    if policy.refills:
        yield "refill: w is per prompt that enters; per group that is trained on it is larger by one factor, 1 / fraction kept"
    if policy.needs_prediction:
        yield "a predicted pass rate counts as 1/2 in these numbers, as if nothing were known: they are those of baseline memory"
    if policy.weight_needs_memory:
        yield "the baseline depends on earlier steps: variance and noise are those of a prompt not seen before, w(p) is the same for all"
    elif policy.needs_memory:
        yield f"budgets or prompts depend on earlier steps; these numbers are for a prompt not seen before, up to {cap} completions"
    if policy.objective is not None:
        yield "w holds with loss_agg seq-mean-token-sum or -norm, one minibatch, and rewards that count as 0 or 1 by the threshold"
    if isinstance(weight, Centered) and weight.scale == "pool" and isinstance(policy.select, Balanced):
        yield "the std is the pool's and the group is balanced: prompts far from 1/2 are multiplied by 1 / sqrt(p (1 - p)) once more"


# -------------------- words


def words(policy: Policy) -> Iterator[tuple[str, str]]:
    """Yield each hook with its part and the first line of the part's docstring, then the numbers they share."""
    for hook in ("propose", "allocate", "decide", "select", "weight"):
        part = getattr(policy, hook)
        about = inspect.getdoc(part) or ""
        yield hook, f"{_name(part)}: {about.splitlines()[0]}" if about else _name(part)
    if not isinstance(policy.decide, Never):
        each = "every completion" if policy.decide_every == 1 else f"every {policy.decide_every} completions"
        floor = f", once {policy.min_pool} have a score" if policy.min_pool else ""
        yield "asked", f"decide is asked after {each} and at the cap of {policy.cap}{floor}"
    kept = "every scored completion" if isinstance(policy.select, All) else f"{policy.group_size} completions per prompt"
    yield "keeps", f"{kept}; one is correct when its reward exceeds {policy.positive_threshold:g}"


def _name(part: Any) -> str:
    return getattr(part, "__name__", None) or repr(part)


# -------------------- text


def page(e: Explanation, populations: Sequence[tuple[float, float]]) -> str:
    """Return the printout of one policy."""
    lines = [e.label, ""]
    lines += [f"  {hook:<9} {text}" for hook, text in words(e.policy)]
    lines += ["", *_LEGEND, ""]
    found = e.at(ALL_RATES)
    columns = [name for name in _FORMAT if name in found]
    lines.append("     p" + "".join(f"{_TITLE[name]:>11}" for name in columns))
    for i, p in enumerate(ALL_RATES):
        lines.append(f"  {p:>4.2f}" + "".join(f"{_FORMAT[name](found[name][i]):>11}" for name in columns))
    lines += ["", "  population      P(signal)       E[N]"]
    for a, b in populations:
        row = e.population(a, b)
        lines.append(f"  {beta_name(a, b):<14} {_FORMAT['signal'](row['signal']):>10} {_FORMAT['samples'](row['samples']):>10}")
    lines += ["", *(f"  note: {note}" for note in e.notes)] if e.notes else []
    return "\n".join(lines) + "\n"


def comparison_page(rows: Sequence[Explanation], populations: Sequence[tuple[float, float]]) -> str:
    """Return the printout of all presets side by side."""
    width = max(len(e.label) for e in rows) + 2
    # f(p) is left out: the shape of w(p) determines it up to a constant.
    lines = ["Every preset, exactly, for rewards of 0 and 1. `reinforce-ada explain PRESET` shows more of one preset.", *_LEGEND[:-1]]
    for name, rates in (("w", WEIGHT_RATES), ("samples", RATES), ("signal", RATES), ("bias", RATES)):
        lines += ["", f"{_TITLE[name]:<{width}}" + "".join(f"{f'p={p:g}':>8}" for p in rates)]
        for e in rows:
            values = e.at(rates).get(name)
            cells = ["-"] * len(rates) if values is None else [_FORMAT[name](v) for v in values]
            mark = "*" if name == "w" and e.notes else " "
            lines.append(f"{e.label + mark:<{width}}" + "".join(f"{cell:>8}" for cell in cells))
    lines += ["", f"{'P(signal), E[N]':<{width}}" + "".join(f"{beta_name(a, b):>16}" for a, b in populations)]
    for e in rows:
        found = [e.population(a, b) for a, b in populations]
        cells = [f"{_FORMAT['signal'](r['signal'])}, {_FORMAT['samples'](r['samples'])}" for r in found]
        lines.append(f"{e.label:<{width}}" + "".join(f"{cell:>16}" for cell in cells))
    lines += ["", *(f"* {e.label}: {note}" for e in rows for note in e.notes)]
    return "\n".join(lines) + "\n"


_LEGEND = (
    "  p          pass rate of a prompt",
    "  E[N]       expected number of completions that it uses",
    "  P(signal)  probability that both classes are in its pool",
    "  bias       bias of the pool mean as an estimate of p, from optional stopping (the metric pass_rate has none)",
    "  w(p)       the expected gradient of a prompt is w(p) times the gradient of its pass rate",
    "  f(p)       integral of w: the implied objective, which is summed over prompts",
)
_TITLE = {"samples": "E[N]", "signal": "P(signal)", "bias": "bias", "w": "w(p)", "f": "f(p)"}


def _significant(x: float) -> str:
    return f"{x:.1f}" if abs(x) >= 9.995 else f"{x:.2f}"


_FORMAT = {
    "samples": "{:.1f}".format,
    "signal": "{:.3f}".format,
    "bias": lambda x: f"{x + 0.0 if abs(x) >= 0.0005 else 0.0:+.3f}",
    "w": _significant,
    "f": _significant,
}


def beta_name(a: float, b: float) -> str:
    """Return the name of a population."""
    return f"Beta({a:g}, {b:g})"
