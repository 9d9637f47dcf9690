"""The comparison of policies, schedules and windows; every setting meets the same completions, seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from reinforce_ada.config.values import check
from reinforce_ada.errors import InputError
from reinforce_ada.outside import GarbageError, one_line, parse_json
from reinforce_ada.sampling import Policy, preset
from reinforce_ada.sampling.policies.contracts import Window
from reinforce_ada.sampling.sampler import Schedule
from reinforce_ada.sampling.windows import PosteriorWindow
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.population import Population, World
from reinforce_ada.simulate.run import SimulationResult, simulate
from reinforce_ada.simulate.sizes import Earlier, Prompts, Seeds

HEADINGS = ("policy", "schedule", "wall s", "relative", "Mtok", "wasted", "signal", "samples/prompt", "utilisation")
_WHERE = "simulate"
_MOST_COMPLETIONS = 1 << 28


@dataclass(frozen=True)
class Setting:
    """One way to sample: a policy, a schedule, a window. `window_text` is "8", "posterior:0.3" or "adaptive", and "" in rounds."""

    policy_text: str
    policy: Policy
    schedule: Schedule
    window_text: str
    window: int | Window | None

    @property
    def schedule_label(self) -> str:
        return f"{self.schedule}, window {self.window_text}" if self.window_text else self.schedule


def setting(policy_text: str, schedule: Schedule, window_text: str = "") -> Setting:
    """Return the setting that these texts describe.

    Args:
        policy_text: a preset's name, with overrides after a colon: "reinforce-ada-balance:decide_every=1,round_size=4".
        schedule: "rounds" or "stream".
        window_text: for "stream" only: a number, "adaptive", "posterior", or "posterior:0.3" with its `min_survival`.
    Raises: InputError for a text that cannot be read.
    """
    policy = _policy(policy_text)
    return Setting(policy_text, policy, schedule, window_text, _window(window_text, policy) if window_text else None)


def _policy(text: str) -> Policy:
    name, _, rest = text.partition(":")
    overrides = {}
    for item in rest.split(",") if rest else []:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(_WHERE, f"policy {one_line(repr(text))}", "PRESET or PRESET:KEY=VALUE,KEY=VALUE is needed")
        overrides[key] = _value(value)
    try:
        return preset(name, **overrides)
    except (TypeError, OverflowError) as e:  # a text in place of a number; an integer too large for a float
        raise InputError(_WHERE, f"policy {one_line(repr(text))}: {e}", "values of the right kind are needed") from e


def _value(text: str) -> Any:
    """Return the number, boolean or null that the text denotes, or else the text itself."""
    try:
        value = parse_json(text)
    except GarbageError:
        return text
    return text if isinstance(value, (list, dict)) else value


def _window(text: str, policy: Policy) -> int | Window | None:
    name, _, survival = text.partition(":")
    try:
        if name == "posterior":
            return PosteriorWindow(policy, float(survival)) if survival else PosteriorWindow(policy)
        number = None if text == "adaptive" else int(text)
    except InputError:
        raise
    except ValueError as e:
        raise InputError(_WHERE, f"window {text!r}", "a number, adaptive, posterior or posterior:SURVIVAL is needed") from e
    if number is not None and number < 1:
        raise InputError(_WHERE, f"window {text}", "at least 1 is needed")
    return number


def published_settings() -> list[Setting]:
    """Return the settings of the published comparison and those with the posterior window; 4 rounds of 8 come first."""
    balance, each = "reinforce-ada-balance", "reinforce-ada-balance:decide_every=1"
    rounds = [setting(balance, "rounds"), setting(f"{balance}:round_size=4,max_rounds=8", "rounds")]
    fixed = [setting(f"grpo:group_size={n}", "rounds") for n in (8, 16, 32)]
    stream = [setting(each, "stream", window) for window in ("4", "8", "16", "32", "adaptive", "posterior")]
    return [*rounds, *fixed, *stream, *(setting(balance, "stream", window) for window in ("8", "9", "16", "adaptive", "posterior"))]


@dataclass(frozen=True)
class Row:
    """The outcomes of one setting, one per seed."""

    setting: Setting
    outcomes: tuple[SimulationResult, ...]

    def values(self, name: str) -> list[float]:
        """Return one number of every outcome, in the order of the seeds."""
        return [float(getattr(outcome, name)) for outcome in self.outcomes]

    def mean(self, name: str) -> float:
        return statistics.fmean(self.values(name))

    def relative(self, base: Row) -> tuple[float, float]:
        """Return the mean wall-clock divided by that of `base`, and the standard deviation of the ratio over their common seeds."""
        ratios = [a / b for a, b in zip(self.values("wall_s"), base.values("wall_s"), strict=True)]
        return self.mean("wall_s") / base.mean("wall_s"), _spread(ratios)


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 for one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Study:
    """The settings compared on one population and engine; wall-clock is relative to the first row."""

    population: str
    engine: EngineModel
    lengths: LengthModel
    num_prompts: int
    num_seeds: int
    rows: tuple[Row, ...]

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Yield the rows of the table as texts, one per setting, under HEADINGS."""
        for row in self.rows:
            relative, spread = row.relative(self.rows[0])
            yield (
                row.setting.policy_text,
                row.setting.schedule_label,
                f"{row.mean('wall_s'):.1f} ± {_spread(row.values('wall_s')):.1f}",
                f"{relative:.3f} ± {spread:.3f}",
                f"{row.mean('tokens') / 1e6:.3g}",
                f"{row.mean('waste'):.3f}",
                f"{row.mean('signal_fraction'):.3f}",
                f"{row.mean('samples_per_prompt'):.2f}",
                f"{row.mean('utilisation'):.3f}",
            )

    def record(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        names = ("wall_s", "num_steps", "tokens", "tokens_committed", "waste", "signal_fraction", "samples_per_prompt", "utilisation")
        rows = [
            {
                "policy": row.setting.policy_text,
                "schedule": row.setting.schedule,
                "window": row.setting.window_text,
                "relative": row.relative(self.rows[0])[0],
                **{name: row.values(name) for name in names},
            }
            for row in self.rows
        ]
        return {
            "population": self.population,
            "num_prompts": self.num_prompts,
            "num_seeds": self.num_seeds,
            "engine": asdict(self.engine),
            "lengths": asdict(self.lengths),
            "rows": rows,
        }


def run_study(
    settings: Sequence[Setting],
    population: Population,
    engine: EngineModel,
    lengths: LengthModel,
    *,
    num_prompts: int,
    num_seeds: int,
    num_earlier: int = 0,
    on_poll: Callable[[Setting, int, int], None] | None = None,
) -> Study:
    """Run every setting on the prompts and completions of seeds 0, 1, .., num_seeds - 1.

    Args:
        settings: one per row; wall-clock is relative to the first.
        population: pass rates of the prompts.
        engine, lengths: the models of the engine and of its completions.
        num_prompts, num_seeds: at least 1.
        num_earlier: see `simulate`.
        on_poll: called after every poll with the setting, the seed and the number of completions that have ended.
    Raises: InputError for numbers out of range.
    """
    check(_WHERE, "prompts", num_prompts, Prompts)
    check(_WHERE, "seeds", num_seeds, Seeds)
    check(_WHERE, "earlier", num_earlier, Earlier)
    for s in settings:
        if num_prompts * s.policy.cap > _MOST_COMPLETIONS:
            given = f"{num_prompts} prompts with a cap of {s.policy.cap}"
            raise InputError(_WHERE, given, f"at most {_MOST_COMPLETIONS} completions in all, which take 8 GB")
    outcomes: list[list[SimulationResult]] = [[] for _ in settings]
    for seed in range(num_seeds):
        world = World(population.draw(num_prompts, seed), lengths, seed)
        for s, found in zip(settings, outcomes, strict=True):
            tell = None if on_poll is None else partial(on_poll, s, seed)
            found.append(simulate(world, s.policy, engine, schedule=s.schedule, window=s.window, num_earlier=num_earlier, on_poll=tell))
    rows = tuple(Row(s, tuple(found)) for s, found in zip(settings, outcomes, strict=True))
    return Study(str(population), engine, lengths, num_prompts, num_seeds, rows)
