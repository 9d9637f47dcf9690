"""`reinforce-ada explain`: turns its arguments into a printout, JSON and a figure."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.config.values import check_fields
from reinforce_ada.errors import InputError, needs
from reinforce_ada.explain.costs import Costs
from reinforce_ada.explain.measured import Measured, measured
from reinforce_ada.explain.page import POPULATIONS, Explanation, beta_name, comparison, comparison_page, explain, page
from reinforce_ada.explain.ranking import Populations, ranking_page, ranking_record
from reinforce_ada.outside import literal_names, one_line, show
from reinforce_ada.sampling import PRESETS, Centered, Policy, configured

_LARGEST = 1e6  # limit on Beta parameters and class weights


def run(
    what: str | None,
    overrides: Mapping[str, str],
    *,
    class_weights: str | None = None,
    populations: Sequence[str] = (),
    costs: Mapping[str, float] = MappingProxyType({}),
    of: Path | None = None,
    as_json: bool = False,
    figure: Path | None = None,
) -> int:
    """Explain a preset, the policy of a configuration file or of a run's folder, or (None) every preset.

    Args:
        costs: fields of `Costs`; with a cost ratio, or with a run `of` which measured one, policies are ranked.
    Raises: InputError for a policy, argument or file that cannot be read, combined or drawn.
    """
    over = [_pair("--population", text, least=1e-6) for text in populations] or list(POPULATIONS)
    explanations = _explanations(what, overrides, class_weights)
    if figure is not None:
        _draw(explanations, figure)
    if of is not None or costs:
        ranked, prompts, about = _ranking(over, costs, of, has_populations=bool(populations))
        if as_json:
            show(json.dumps([_record(e, over, prompts, ranked) for e in explanations], allow_nan=False))
        else:
            show(about + ranking_page(explanations, prompts, ranked), end="")
    elif as_json:
        show(json.dumps([e.record(over) for e in explanations], allow_nan=False))
    else:
        show(comparison_page(explanations, over) if what is None else page(explanations[0], over), end="")
    return 0


def _ranking(
    over: Sequence[tuple[float, float]], given: Mapping[str, float], of: Path | None, *, has_populations: bool
) -> tuple[Costs, Populations, str]:
    """Return what policies are ranked by, over which prompts, and the lines that say where a run's numbers come from."""
    if of is not None and has_populations:
        raise InputError("explain", "--population with --of", "one of the two: the run has pass rates of its own")
    found = None if of is None else measured(of)
    if found is None and "cost_ratio" not in given:
        raise InputError("explain", f"--{next(iter(given)).replace('_', '-')} without --cost-ratio", "it belongs to the ranking by cost")
    costs = Costs(**{**({} if found is None else {"cost_ratio": found.cost_ratio}), **given})  # type: ignore[arg-type]
    check_fields("explain", costs)
    if of is None or found is None:
        return costs, {beta_name(a, b): {(a, b): 1.0} for a, b in over}, ""
    return costs, {"this run": found.rates}, _about(of, found)


def _about(run: Path, found: Measured) -> str:
    mean = math.fsum(share * a / (a + b) for (a, b), share in found.rates.items())
    return (
        f"{run}\n"
        f"  Training on a completion took {found.cost_ratio:.3g} times as long as generating one.\n"
        f"  The held-out pass rate after step {found.step} was {mean:.3f}; each prompt has its posterior.\n\n"
    )


def _record(e: Explanation, over: Sequence[tuple[float, float]], prompts: Populations, costs: Costs) -> dict[str, Any]:
    return {**e.record(over), "efficiency": None if e.weight is None else ranking_record(e, prompts, costs)}


def _explanations(what: str | None, overrides: Mapping[str, str], class_weights: str | None) -> list[Explanation]:
    if what is not None:
        return [explain(_weighted(_policy(what, overrides), class_weights))]
    if overrides or class_weights:
        given = " ".join(f"--{key.replace('_', '-')}" for key in [*overrides, *(["class_weights"] if class_weights else [])])
        raise InputError("explain", f"{given} without a policy", "a preset or a configuration file is needed", "explain PRESET ...")
    return comparison()


def _policy(what: str, overrides: Mapping[str, str]) -> Policy:
    path = Path(what) / "config.toml" if Path(what).is_dir() and what not in PRESETS else Path(what)
    is_file = path.suffix == ".toml" or path.is_file()
    chosen = {} if is_file else {"preset": what}
    return configured(configuration.load(path if is_file else None, {**chosen, **overrides}).sampling)


def _weighted(policy: Policy, class_weights: str | None) -> Policy:
    if class_weights is None:
        return policy
    if not isinstance(policy.weight, Centered):
        given = f"--class-weights with {type(policy.weight).__name__}"
        raise InputError("explain", given, "a policy whose advantages are reward - baseline", "--objective as-published")
    pair = _pair("--class-weights", class_weights, least=0)
    return dataclasses.replace(policy, weight=dataclasses.replace(policy.weight, class_weights=pair))


def _pair(flag: str, text: str, *, least: float) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = math.nan
    if not all(least <= v <= _LARGEST for v in (x, y)):
        needed = f"two finite numbers of at least {least:g} and at most {_LARGEST:g} with a comma between them, such as 1,2"
        raise InputError("explain", f"{flag} {one_line(text)}", needed)
    return x, y


def _draw(explanations: Sequence[Explanation], path: Path) -> None:
    if path.suffix != ".png" or not path.parent.is_dir():
        raise InputError("explain", f"--figure {path}", "a file name that ends with .png, in a folder that exists")
    needs("explain", "matplotlib")
    from reinforce_ada.explain import figure

    with literal_names():
        figure.draw([e for e in explanations if len(explanations) == 1 or e.label == e.policy.name], path)
