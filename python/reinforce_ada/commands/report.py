"""`reinforce-ada report`: the figure and the Parquet export of a run, or its page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command
from reinforce_ada.outside import show

PAGE = Path()  # `--html` without a file
_EXAMPLES = """\
examples:
  the figure, the rollouts as Parquet and the summary, also while the run goes
    reinforce-ada report runs/mine
  one page to look at or to send, in runs/mine/report.html
    reinforce-ada report runs/mine --html
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Redraw the figure of a run, export its rollouts to Parquet, and print its summary; or write its page. The run may be going on."
    parser = add_command(commands, "report", "figure, page, Parquet and summary of a run", about, _EXAMPLES)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder that `reinforce-ada train` wrote")
    parser.add_argument(
        "--html", type=Path, nargs="?", const=PAGE, metavar="FILE",
        help="write one HTML page with numbers, plots, a sample of the completions and the configuration (default: RUN/report.html)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Write the page, or the figure and the export; print the summary, and return 0."""
    from reinforce_ada import report

    if given.html is None:
        written = report.report(given.run_dir)
    else:
        written = [report.write_page(given.run_dir, None if given.html is PAGE else given.html)]
    for path in written:
        show(str(path))
    for name, value in report.summary_table(given.run_dir):
        show(f"{name:<28} {value}")
    return 0
