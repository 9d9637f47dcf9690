"""Writes the tables and figures of docs/evidence.md from the results in this folder: `python benchmarks/evidence/write.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from reinforce_ada import plots
from reinforce_ada.study import results as result_files
from reinforce_ada.study.progress import Progress, progress_of, rank_correlation
from reinforce_ada.study.results import Results
from reinforce_ada.study.statistics import mean_and_half
from reinforce_ada.study.summary import ArmResult, Difference, arms_of, common_cost, difference, difference_at_the_end, mean_cost

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
    parts, correlations = {}, []
    for name, results in found.items():
        arms = arms_of(results)
        progress = progress_of(results, arms)
        for axis, mark, table in ((GENERATED, "generated", _generated), (TRAINED, "trained", _trained)):
            on_axis = [p for p in progress if p.axis == axis]
            parts[f"{name}-{mark}"] = table(results, arms, {p.arm: p for p in on_axis})
            known = sum(not math.isnan(p.predicted) for p in on_axis)
            correlations.append(f"- {name}, per {mark} completion: {rank_correlation(on_axis):.2f} over {known} arms")
    return {**parts, "correlations": "\n".join(correlations)}


def _generated(results: Results, arms: Sequence[ArmResult], progress: Mapping[str, Progress]) -> str:
    per_step = {p.arm: p.prompts_per_step for p in results.predictions}
    baseline = next(arm for arm in arms if arm.name == results.baseline)
    rows = []
    for arm in arms:
        mean, half = mean_and_half(list(arm.finals().values()))
        row = [arm.name, f"{arm.rate:g}", str(per_step[arm.name]), f"{mean:.3f} ± {half:.3f}"]
        rows.append([*row, *_versus(difference_at_the_end(arm, baseline), progress[arm.name], is_baseline=arm is baseline)])
    return _markdown(["arm", "learning rate", "prompts per step", "held-out reward", *_heads(baseline)], rows)


def _trained(results: Results, arms: Sequence[ArmResult], progress: Mapping[str, Progress]) -> str:
    amount = common_cost(arms, TRAINED)
    baseline = next(arm for arm in arms if arm.name == results.baseline)
    rows = []
    for arm in arms:
        ours = arm.rewards_at(TRAINED, amount)
        row = [arm.name, f"{mean_cost(arm, TRAINED):,.0f}", f"{mean_and_half(list(ours.values()))[0]:.3f}"]
        d = difference(ours, baseline.rewards_at(TRAINED, amount))
        rows.append([*row, *_versus(d, progress[arm.name], is_baseline=arm is baseline)])
    return _markdown(["arm", "trained in all", f"reward after {amount:,.0f}", *_heads(baseline)], rows)


def _heads(baseline: ArmResult) -> list[str]:
    return [f"minus {baseline.name}", "times fewer to the same reward", "predicted"]


def _versus(d: Difference, progress: Progress, *, is_baseline: bool) -> list[str]:
    if is_baseline:
        return ["–", "1", "1"]
    found = progress.observed
    quotient = f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"
    return [f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})", quotient, f"{progress.predicted:.2f}"]


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


def compared(results: Results) -> dict[str, str]:
    """Return the arms of the first picture in words: the baseline, the best arm of GRPO, and the best of all others, the leader, last."""
    finals = {arm.name: mean_and_half(list(arm.finals().values()))[0] for arm in arms_of(results)}
    fixed = [name for name in finals if plots.family_of(name) == "grpo"]
    leader = max(finals.keys() - set(fixed), key=finals.__getitem__)
    return {arm: _in_words(arm) for arm in (results.baseline, max(fixed, key=finals.__getitem__), leader)}


def _in_words(arm: str) -> str:
    family, number = plots.family_of(arm), arm.rpartition("-")[2]
    return f"GRPO, groups of {number}" if family == "grpo" else f"reinforce-ada-{family},\ngroups of {number}"


def draw() -> None:
    """Draw every figure of the studies, and of the first of them that of the project's first page."""
    from reinforce_ada.study import figure

    found = studies()
    name, results = next(iter(found.items()))
    about = f"task {name}, a model of 100 000 weights, {len(results.seeds)} seeds"
    figure.draw_against(results, compared(results), DOCS / "first.png", title="Held-out accuracy against the tokens generated", about=about)
    for name, results in found.items():
        figure.draw(results, DOCS / f"evidence-{name}.png")
        figure.draw_progress(results, DOCS / f"evidence-{name}-progress.png")


def main() -> None:
    """Write the page and its figures."""
    PAGE.write_text(filled(PAGE.read_text(), tables(studies())))
    draw()


if __name__ == "__main__":
    main()
