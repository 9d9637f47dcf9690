"""Writes the tables and figures of docs/evidence.md from the results in this folder: `python benchmarks/evidence/write.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from reinforce_ada.study import results as result_files
from reinforce_ada.study.progress import Quotient, observed, predicted, rank_correlation
from reinforce_ada.study.results import Results
from reinforce_ada.study.statistics import mean_and_half
from reinforce_ada.study.summary import ArmResult, arms_of, common_cost, difference, difference_at_the_end

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
PAGE = DOCS / "evidence.md"
GENERATED, TRAINED = "generated_completions", "trained_completions"


def studies() -> dict[str, Results]:
    """Return the results of every task, without the studies that chose the learning rates."""
    found = {path.parent.name: result_files.read(path.parent) for path in sorted(HERE.glob("*/results.json"))}
    return {name: results for name, results in found.items() if not name.endswith("-rates")}


def tables(found: dict[str, Results]) -> dict[str, str]:
    """Return every generated part of the page by the name of its mark."""
    parts = {}
    for name, results in found.items():
        arms = arms_of(results)
        baseline = next(arm for arm in arms if arm.name == results.baseline)
        parts[f"{name}-generated"] = _generated(results, arms, baseline)
        parts[f"{name}-trained"] = _trained(results, arms, baseline)
    parts["correlations"] = "\n".join(_correlations(found))
    return parts


def _generated(results: Results, arms: Sequence[ArmResult], baseline: ArmResult) -> str:
    per_step = {p.arm: p.prompts_per_step for p in results.predictions}
    rows = []
    for arm in arms:
        mean, half = mean_and_half(list(arm.finals().values()))
        d = difference_at_the_end(arm, baseline)
        row = [arm.name, f"{arm.rate:g}", str(per_step[arm.name]), f"{mean:.3f} ± {half:.3f}"]
        rows.append([*row, *_versus(results, arm, baseline, GENERATED, (d.mean, d.low, d.high))])
    heads = [
        "arm",
        "learning rate",
        "prompts per step",
        "held-out reward",
        f"minus {baseline.name}",
        "times fewer to the same reward",
        "predicted",
    ]
    return _markdown(heads, rows)


def _trained(results: Results, arms: Sequence[ArmResult], baseline: ArmResult) -> str:
    amount = common_cost(arms, TRAINED)
    theirs = baseline.rewards_at(TRAINED, amount)
    rows = []
    for arm in arms:
        ours = arm.rewards_at(TRAINED, amount)
        d = difference(ours, theirs)
        whole = mean_and_half(arm.costs(TRAINED))[0]
        row = [arm.name, f"{whole:,.0f}", f"{mean_and_half(list(ours.values()))[0]:.3f}"]
        rows.append([*row, *_versus(results, arm, baseline, TRAINED, (d.mean, d.low, d.high))])
    heads = [
        "arm",
        "trained in all",
        f"reward after {amount:,.0f}",
        f"minus {baseline.name}",
        "times fewer to the same reward",
        "predicted",
    ]
    return _markdown(heads, rows)


def _versus(results: Results, arm: ArmResult, baseline: ArmResult, axis: str, d: tuple[float, float, float]) -> list[str]:
    if arm is baseline:
        return ["–", "1", "1"]
    expected = predicted(results, axis)[arm.name]
    return [f"{d[0]:+.3f} ({d[1]:+.3f} to {d[2]:+.3f})", _quotient(observed(arm, baseline, axis, results.target)), f"{expected:.2f}"]


def _quotient(found: Quotient) -> str:
    return "not reached" if found.mean == 0 else f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


def _correlations(found: dict[str, Results]) -> Iterator[str]:
    for axis, words in ((GENERATED, "generated"), (TRAINED, "trained")):
        for name, results in found.items():
            arms = arms_of(results)
            baseline = next(arm for arm in arms if arm.name == results.baseline)
            expected = predicted(results, axis)
            pairs = [(expected[arm.name], observed(arm, baseline, axis, results.target).mean) for arm in arms]
            pairs = [pair for pair in pairs if not math.isnan(pair[0])]
            yield f"- {name}, per {words} completion: {rank_correlation(pairs):.2f} over {len(pairs)} arms"


def _markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, parts: dict[str, str]) -> str:
    """Return the page with every part between its `<!-- name -->` and the next `<!-- end -->` written anew."""
    for name, text in parts.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        if mark:
            page = f"{before}{mark}{text}\n{rest[rest.index('<!-- end -->') :]}"
    return page


def main() -> None:
    """Write the page and its figures."""
    from reinforce_ada.study import figure

    found = studies()
    PAGE.write_text(filled(PAGE.read_text(), tables(found)))
    for name, results in found.items():
        figure.draw(results, DOCS / f"evidence-{name}.png")
        figure.draw_progress(results, DOCS / f"evidence-{name}-progress.png")


if __name__ == "__main__":
    main()
