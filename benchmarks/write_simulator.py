"""Runs the studies of docs/simulator.md (about five minutes), keeps their numbers, draws the figure and fills the page's tables.

`make simulate-docs` calls it. benchmarks/simulator.json has every number; a test holds the tables to it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce_ada.simulate import figure
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.population import BetaRates
from reinforce_ada.simulate.study import Setting, Study, published_settings, run_study, setting

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURE, RESULTS = ROOT / "docs/simulator.md", ROOT / "docs/simulator.png", ROOT / "benchmarks/simulator.json"
BALANCE, EACH = "reinforce-ada-balance", "reinforce-ada-balance:decide_every=1"
POPULATIONS = (BetaRates(1, 2), BetaRates(0.5, 2.5), BetaRates(2.5, 0.6))
COMPUTE_BOUND = EngineModel(step_ms=0, busy_ms=0.1)  # a sequence more costs what it costs alone

# (policy, schedule): wall s, relative, wasted, utilisation, samples per prompt
PUBLISHED = {
    (BALANCE, "rounds"): (163.8, 1.0, 0.0, 0.20, 14.5),
    (f"{BALANCE}:round_size=4,max_rounds=8", "rounds"): (274.8, 1.68, 0.0, 0.10, 13.0),
    ("grpo:group_size=8", "rounds"): (54, 0.33, 0.0, 0.37, 8),
    ("grpo:group_size=16", "rounds"): (82, 0.50, 0.0, 0.55, 16),
    ("grpo:group_size=32", "rounds"): (140, 0.85, 0.0, 0.71, 32),
    (EACH, "stream, window 4"): (204, 1.25, 0.08, 0.14, 11.7),
    (EACH, "stream, window 8"): (138, 0.84, 0.18, 0.25, 11.7),
    (EACH, "stream, window 16"): (106, 0.65, 0.30, 0.42, 11.7),
    (EACH, "stream, window 32"): (93, 0.57, 0.35, 0.57, 11.7),
    (BALANCE, "stream, window 9"): (142, 0.87, 0.14, 0.29, 14.5),
    (BALANCE, "stream, window 16"): (112, 0.68, 0.24, 0.47, 14.5),
}


def _swept() -> list[Setting]:
    """The published rows, then the posterior window from eager to patient."""
    rows = [s for s in published_settings() if not s.window_text.startswith("posterior")]
    rows += [setting(EACH, "stream", f"posterior:{tau}") for tau in (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)]
    return rows + [setting(BALANCE, "stream", f"posterior:{tau}") for tau in (0.2, 0.4, 0.6)]


def _few(*windows: str) -> list[Setting]:
    return [setting(BALANCE, "rounds"), *(setting(p, "stream", w) for p in (EACH, BALANCE) for w in windows)]


def run() -> dict[str, list[Study]]:
    """Every study of the page."""
    model, lengths = EngineModel(), LengthModel()
    full = {"num_prompts": 64, "num_seeds": 8}
    wide = {"num_prompts": 1024, "num_seeds": 2}
    return {
        "frontier": [run_study(_swept(), p, model, lengths, **full) for p in POPULATIONS],
        "goal": [run_study(_few("posterior"), p, model, lengths, num_prompts=64, num_seeds=32) for p in POPULATIONS],
        "memory": [run_study(_few("posterior"), p, model, lengths, **full, num_earlier=16) for p in POPULATIONS],
        "wide": [run_study(_few("8", "posterior"), p, model, lengths, **wide) for p in POPULATIONS],
        "compute": [run_study(_few("8", "posterior"), p, COMPUTE_BOUND, lengths, **full) for p in POPULATIONS],
    }


# -------------------- tables, from the records


def tables(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """The page's tables by name, as Markdown."""
    published = records["frontier"][0]
    return {"published": _published(published), **{name: _across(studies) for name, studies in records.items()}}


def _published(study: Mapping[str, Any]) -> str:
    rows = []
    for row in study["rows"]:
        theirs = PUBLISHED.get((row["policy"], _schedule(row)))
        if theirs is None:
            continue
        ours = [_mean(row, "wall_s"), row["relative"], *(_mean(row, n) for n in ("waste", "utilisation", "samples_per_prompt"))]
        cells = [f"{a:.{d}f} ({b:.{d}f})" for a, b, d in zip(ours, theirs, (0, 2, 2, 2, 1), strict=True)]
        rows.append([f"`{row['policy']}`", _schedule(row), *cells])
    return _markdown(("policy", "schedule", "wall s", "relative", "wasted", "utilisation", "samples/prompt"), rows)


def _across(studies: Sequence[Mapping[str, Any]]) -> str:
    """Relative wall-clock ± its spread over the seeds, and waste, for each population."""
    rows = []
    for same in zip(*(study["rows"] for study in studies), strict=True):
        cells = [f"{r['relative']:.2f} ± {_spread(s, r):.2f}, {_mean(r, 'waste'):.1%}" for s, r in zip(studies, same, strict=True)]
        rows.append([f"`{same[0]['policy']}`", _schedule(same[0]), *cells])
    return _markdown(("policy", "schedule", *(study["population"] for study in studies)), rows)


def _spread(study: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    ratios = [a / b for a, b in zip(row["wall_s"], study["rows"][0]["wall_s"], strict=True)]
    return statistics.stdev(ratios)


def _mean(row: Mapping[str, Any], name: str) -> float:
    return statistics.fmean(row[name])


def _schedule(row: Mapping[str, Any]) -> str:
    return f"{row['schedule']}, window {row['window']}" if row["window"] else row["schedule"]


def _markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return "\n".join([lines[0], "|" + "---|" * (lines[0].count("|") - 1), *lines[1:]])


def filled(page: str, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page with every table between its `<!-- name -->` and the next `<!-- end -->` written anew."""
    for name, text in tables(records).items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        if mark:
            page = f"{before}{mark}{text}\n{rest[rest.index('<!-- end -->') :]}"
    return page


def draw() -> None:
    """Draw the figure from the numbers that are kept."""
    figure.draw(json.loads(RESULTS.read_text())["frontier"], FIGURE)


if __name__ == "__main__":
    studies = run()
    found = {name: [study.record() for study in group] for name, group in studies.items()}
    RESULTS.write_text(json.dumps(found) + "\n")
    draw()
    PAGE.write_text(filled(PAGE.read_text(), found))
