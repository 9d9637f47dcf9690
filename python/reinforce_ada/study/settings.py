"""The file of a study: its arms, seeds, learning rates and budget, checked before anything runs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.outside import one_line
from reinforce_ada.sampling import Policy, configured

WHERE = "study"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UNTRAINED = "untrained"  # the folder of the evaluation of the untrained model
_RESERVED = (
    UNTRAINED,
    "plan.json",
    "results.json",
    "page.md",
    "figure.png",
    "progress.png",
)  # in the folder of the study, beside those of the arms
_MOST = 1000  # seeds, learning rates or arms
_LARGEST = 10**15 - 1
_STEPS_LIMIT = 10_000  # of a run that another budget ends, unless [shared] sets it
_BUDGETS = ("steps", *configuration.BUDGET_UNITS)
_TABLES = {"name", "seeds", "learning_rates", "remembered", "budget", "target", "baseline", "shared", "arm"}
# The study sets these, or they name something of a single run.
_OF_THE_STUDY = {"out", "seed", "learning_rate", "budget", "preset", "profile", "push_to_hub"}
# What the held-out reward depends on must be the same for all arms.
_OF_THE_EVALUATION = {"positive_threshold", "temperature", "top_p", "top_k", "min_p", "max_tokens", "stop"}


@dataclass(frozen=True)
class Arm:
    """One way to sample and train: the keys of the configuration that it alone has, and the learning rates that it is run with."""

    name: str
    keys: Mapping[str, Any]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class Budget:
    """The cost after which every run ends, and the number of completions that each arm generates per step (None: as configured)."""

    unit: str
    amount: int
    completions_per_step: int | None

    def __str__(self) -> str:
        return f"{self.amount:,} {self.unit.replace('_', ' ')}"

    def keys(self) -> dict[str, Any]:
        """Return the keys of `train` that end a run."""
        if self.unit == "steps":
            return {"steps": self.amount}
        return {"steps": _STEPS_LIMIT, "budget": f"{self.amount} {self.unit.replace('_', ' ')}"}


@dataclass(frozen=True)
class Study:
    """A checked study."""

    name: str
    seeds: tuple[int, ...]
    budget: Budget
    target: float | None  # held-out reward
    baseline: str
    remembered: int  # earlier completions of each prompt, in the predictions for arms with baseline "memory"
    shared: Mapping[str, Any]
    arms: tuple[Arm, ...]


def read_study(path: Path) -> Study:
    """Return the study of a TOML file. Raises: InputError for a file, table, key or value that cannot be used."""
    given = _with_whole_paths(path.parent, configuration.read_toml(path))
    _known("the file", given, _TABLES)
    if missing := sorted({"name", "seeds", "budget", "baseline", "arm"} - given.keys()):
        raise InputError(WHERE, f"{one_line(str(path))} lacks {missing[0]}", "name, seeds, budget, baseline and arms", "docs/study.md")
    budget = _budget(_table("budget", given["budget"]))
    shared = _shared(_table("shared", given.get("shared", {})), budget)
    rates = _rates("learning_rates", given["learning_rates"]) if "learning_rates" in given else ()
    arms = _arms(given["arm"], rates, shared, budget)
    if given["baseline"] not in [arm.name for arm in arms]:
        raise unknown_name(WHERE, "baseline", str(given["baseline"]), [arm.name for arm in arms])
    seeds = _seeds(given["seeds"])
    remembered = _integer("remembered", given.get("remembered", 8), 0, 64)
    return Study(_name("name", given["name"]), seeds, budget, _target(given), given["baseline"], remembered, shared, arms)


def _with_whole_paths(folder: Path, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tables with the paths of questions and code made absolute: they start from the folder of the study's file."""

    def whole(table: Any) -> Any:
        return configuration.beside(folder, table) if isinstance(table, Mapping) else table

    arms = given.get("arm")
    return {
        **given,
        **({"shared": whole(given["shared"])} if "shared" in given else {}),
        **({"arm": [whole(table) for table in arms]} if isinstance(arms, list) else {}),
    }


def policy_of(shared: Mapping[str, Any], arm: Arm) -> Policy:
    """Return the sampling policy of an arm. Raises: InputError for values that the configuration or the preset refuses."""
    return configured(configuration.load(None, {**shared, **arm.keys}).sampling)


# -------------------- tables


def _budget(table: Mapping[str, Any]) -> Budget:
    _known("[budget]", table, {*_BUDGETS, "completions_per_step"})
    units = [unit for unit in _BUDGETS if unit in table]
    if len(units) != 1:
        given = f"[budget] with {' and '.join(units) if units else 'nothing that ends a run'}"
        raise InputError(WHERE, given, f"exactly one of {', '.join(_BUDGETS)}")
    amount = _integer(f"budget {units[0]}", table[units[0]], 1, 10**9 if units[0] == "steps" else _LARGEST)
    per_step = table.get("completions_per_step")
    return Budget(units[0], amount, None if per_step is None else _integer("budget completions_per_step", per_step, 1, 10**9))


def _target(given: Mapping[str, Any]) -> float | None:
    if "target" not in given:
        return None
    table = _table("target", given["target"])
    _known("[target]", table, {"reward"})
    if "reward" not in table:
        raise InputError(WHERE, "[target] without reward", "the held-out reward to reach, such as reward = 0.5")
    reward = table["reward"]
    if isinstance(reward, bool) or not isinstance(reward, (int, float)) or not 0 < reward <= 1:
        raise InputError(WHERE, f"target reward = {_shown(reward)}", "a number above 0 and up to 1: the share of correct completions")
    return float(reward)


def _shared(table: Mapping[str, Any], budget: Budget) -> Mapping[str, Any]:
    _refuse("[shared]", table, _set_by(budget))
    _known("[shared]", table, configuration.section_of())
    if table.get("eval_prompts", 1) == 0:
        raise InputError(WHERE, "[shared] eval_prompts = 0", "held-out prompts, whose reward is compared")
    if table.get("eval_k", 2) == 1:
        raise InputError(WHERE, "[shared] eval_k = 1", "at least 2, without which the spread of the pass rates is unknown")
    return table


def _arms(given: Any, rates: tuple[float, ...], shared: Mapping[str, Any], budget: Budget) -> tuple[Arm, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(table, Mapping) for table in given) or len(given) > _MOST:
        raise InputError(WHERE, f"arm = {_shown(given)}", "one table [[arm]] for each arm")
    arms = [_arm(table, rates, budget) for table in given]
    _distinct("arm", [arm.name for arm in arms])
    for arm in arms:
        policy_of({**budget.keys(), **shared}, arm)  # raises for what the configuration or the preset refuses
    return tuple(arms)


def _arm(table: Mapping[str, Any], rates: tuple[float, ...], budget: Budget) -> Arm:
    if "name" not in table:
        raise InputError(WHERE, "an [[arm]] without name", 'name = "..."')
    name = _name("arm name", table["name"])
    if name in _RESERVED:
        raise InputError(WHERE, f"arm {name!r}", "another name: the study has a file or folder of this one")
    where = f"arm {name!r}"
    keys = {key: value for key, value in table.items() if key not in ("name", "learning_rates")}
    _refuse(where, keys, _set_by(budget) - {"preset"})
    homes = configuration.section_of()
    may = {key for key, section in homes.items() if section in ("sampling", "training")} - _OF_THE_EVALUATION
    _refuse(where, keys, {key for key in homes if key not in may}, "[shared]: an arm differs from the others in sampling and training only")
    _known(where, keys, may)
    if "preset" not in keys:
        raise InputError(WHERE, f"{where} without preset", 'preset = "..."', "docs/policies.md has the presets")
    own = _rates(f"{where}: learning_rates", table["learning_rates"]) if "learning_rates" in table else rates
    if not own:
        raise InputError(WHERE, f"{where} without learning rates", "learning_rates = [...], in the arm or for all")
    return Arm(name, keys, own)


def _set_by(budget: Budget) -> set[str]:
    """Return the keys of `train` that the study sets."""
    per_step = set() if budget.completions_per_step is None else {"prompts_per_step"}
    return _OF_THE_STUDY | per_step | ({"steps"} if budget.unit == "steps" else set())


# -------------------- values


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(WHERE, f"{name} = {_shown(value)}", f"a table [{name}]")
    return value


def _known(where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
    for key in table:
        if key not in known:
            raise unknown_name(f"{WHERE}, {where}", "key", key, known)


def _refuse(where: str, table: Mapping[str, Any], keys: Collection[str], instead: str = "what the study sets is not among them") -> None:
    for key in table:
        if key in keys:
            raise InputError(WHERE, f"{where} sets {key}", instead)


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InputError(
            WHERE, f"{what} = {_shown(value)}", "a name of letters, digits, dots, hyphens and underscores, since it names a folder"
        )
    return value


def _seeds(value: Any) -> tuple[int, ...]:
    seeds = tuple(_integer("seeds", seed, 0, 2**63 - 1) for seed in _list("seeds", value, "a list of integers, such as [0, 1, 2]"))
    _distinct("seed", seeds)
    return seeds


def _rates(what: str, value: Any) -> tuple[float, ...]:
    rates = _list(what, value, "a list of numbers, such as [1e-5, 3e-5]")
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1 or not math.isfinite(rate):
            raise InputError(WHERE, f"{what} with {_shown(rate)}", "numbers above 0 and up to 1")
    _distinct("learning rate", [float(rate) for rate in rates])
    return tuple(sorted(float(rate) for rate in rates))


def _list(what: str, value: Any, needed: str) -> Sequence[Any]:
    if not isinstance(value, list) or not 0 < len(value) <= _MOST:
        raise InputError(WHERE, f"{what} = {_shown(value)}", needed)
    return value


def _integer(what: str, value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise InputError(WHERE, f"{what} = {_shown(value)}", f"an integer from {least} to {most}")
    return value


def _distinct(what: str, values: Sequence[Any]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise InputError(WHERE, f"{what} {value!r} is there twice", "each once")


def _shown(value: Any) -> str:
    return one_line(repr(value), 80)
