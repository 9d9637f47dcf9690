"""Draws docs/demo.png, the demo and GRPO beside each other, from what is kept of their runs in benchmarks/demo; `make figures` calls it.

    reinforce-ada train --dtype float32 --eval-every 5 --out runs/demo-balance
    reinforce-ada train --dtype float32 --eval-every 5 --out runs/demo-grpo --preset grpo
    python benchmarks/write_demo.py runs/demo-balance runs/demo-grpo

With folders of runs it first keeps their logs and the counts of their pools.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from reinforce_ada.run_report.figure import draw_figure
from reinforce_ada.run_report.reading import PassRates, Run, read_run

ROOT = Path(__file__).resolve().parent.parent
KEPT, FIGURE = ROOT / "benchmarks/demo", ROOT / "docs/demo.png"


def keep(folder: Path) -> None:
    """Keep a run as one file, with a step or an evaluation on each line."""
    run = asdict(read_run(folder))
    KEPT.mkdir(exist_ok=True)
    lists = {name: ",\n  ".join(map(json.dumps, run.pop(name))) for name in ("steps", "evals")}
    text = json.dumps(run).removesuffix("}")
    (KEPT / f"{folder.name}.json").write_text(text + "".join(f',\n"{name}": [\n  {lines}]' for name, lines in lists.items()) + "}\n")


def kept(path: Path) -> Run:
    """Return a run that is kept."""
    found = json.loads(path.read_text())
    rates = {name: _rates(found.pop(name)) for name in ("early", "late")}
    return Run(**found, **rates)


def _rates(found: dict | None) -> PassRates | None:
    return found and PassRates(found["first_step"], found["last_step"], tuple(map(tuple, found["counts"])))


def runs() -> list[Run]:
    """Return the runs that are kept: GRPO first, since it is what the other is compared with."""
    return [kept(path) for path in sorted(KEPT.glob("*.json"), reverse=True)]


def draw() -> None:
    """Draw the figure."""
    draw_figure(runs(), FIGURE)


if __name__ == "__main__":
    for given in sys.argv[1:]:
        keep(Path(given))
    draw()
