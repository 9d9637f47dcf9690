"""`reinforce-ada report`: the figure and the Parquet export of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command
from reinforce_ada.outside import show

_EXAMPLES = """\
examples:
  the figure, the rollouts as Parquet and the summary, also while the run goes
    reinforce-ada report runs/mine
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Redraw the figure of a run, export its rollouts to Parquet, and print its summary. The run may be going on."
    parser = add_command(commands, "report", "figure, Parquet and summary of a run", about, _EXAMPLES)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder that `reinforce-ada train` wrote")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Write the figure and the export, print the summary, and return 0."""
    from reinforce_ada import report

    for path in report.report(given.run_dir):
        show(str(path))
    for name, value in report.summary_table(given.run_dir):
        show(f"{name:<28} {value}")
    return 0
