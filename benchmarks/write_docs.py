"""Writes docs/benchmarks.md and its figure from benchmarks/results/*.json; `make bench-docs` calls it."""

from __future__ import annotations

from pathlib import Path

from reinforce_ada.bench import figure, page
from reinforce_ada.bench.record import Results

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "benchmarks/results/cpu.json"


def texts() -> dict[Path, str]:
    """What every generated file must hold."""
    main = Results.load(MAIN)
    others = [Results.load(path) for path in sorted(MAIN.parent.glob("*.json")) if path != MAIN]
    return {ROOT / "docs/benchmarks.md": page.render((ROOT / "benchmarks/page.md").read_text(), main, others)}


def draw() -> None:
    """Draw docs/benchmarks.png."""
    figure.draw(Results.load(MAIN), ROOT / "docs/benchmarks.png")


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
    draw()
