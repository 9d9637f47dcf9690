"""The report of a run, from log.jsonl and rollouts.sqlite: its figure, its page, the Parquet export and the closing table.

Imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path

from reinforce_ada.errors import InputError, needs
from reinforce_ada.outside import one_line
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.run_report.reading import STORE, WHERE, read_run
from reinforce_ada.run_report.table import summary_rows

__all__ = ["draw", "report", "summary_table", "write_page"]


def report(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Redraw the figure and export the rollouts of a folder with log.jsonl and rollouts.sqlite; may be called while the run goes on.

    Returns: the paths of figure.png and rollouts.parquet.
    Raises: InputError when there is no run, or matplotlib or pyarrow is missing.
    """
    figure = draw(run_dir)
    with RolloutStore(Path(run_dir) / STORE, read_only=True) as store:
        return [figure, store.export_parquet(Path(run_dir) / "rollouts.parquet")]


def draw(run_dir: str | os.PathLike[str]) -> Path:
    """Draw figure.png: reward, share of prompts with signal, samples per prompt, and the pools' pass rates.

    Returns: its path. Raises: InputError when there is no run, or matplotlib is missing.
    """
    needs(WHERE, "matplotlib")
    from reinforce_ada.run_report import figure

    path = Path(run_dir) / "figure.png"
    figure.draw_figure([read_run(run_dir)], path)
    return path


def write_page(run_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run: one HTML file that loads nothing, with its numbers, plots, configuration and a sample of its answers.

    The page holds at most 192 completions and 4000 characters of each, however large the run; it may be written while the run goes on.

    Args:
        path: a file whose name ends with .html; by default report.html in the folder.
    Returns: its path. Raises: InputError when there is no run, for another name, or when matplotlib is missing.
    """
    target = Path(run_dir) / "report.html" if path is None else Path(path)
    if target.suffix != ".html":
        raise InputError(WHERE, f"--html {one_line(str(target))}", "a file name that ends with .html")
    needs(WHERE, "matplotlib")
    from reinforce_ada.run_report import page

    page.write(Path(run_dir), target)
    return target


def summary_table(run_dir: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Return the closing table of a run as (name, value) rows: held-out before and after, samples, waste, voids, tokens, time.

    Raises: InputError when there is no run.
    """
    return summary_rows(read_run(run_dir))
