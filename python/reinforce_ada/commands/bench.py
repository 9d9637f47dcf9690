"""`reinforce-ada bench`: times the operators against PyTorch and other libraries."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

from reinforce_ada.commands.flags import add_command, add_typed

_EXAMPLES = """\
examples:
  a first look at small shapes, in a minute
    reinforce-ada bench --quick
  everything, about 25 minutes on one core
    reinforce-ada bench
  some operators, some cases, a GPU
    reinforce-ada bench policy_loss group_advantages --json mine.json
    reinforce-ada bench token_logprobs --case forward/bf16
    reinforce-ada bench --device cuda --json gpu.json

Every case is checked before it is timed. Run nothing else meanwhile: other
programs take memory bandwidth.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Time the operators against PyTorch and other libraries, results checked first; write JSON and a figure."
    parser = add_command(commands, "bench", "time the operators against PyTorch", about, _EXAMPLES)
    parser.add_argument("ops", nargs="*", metavar="OP", help="operators, such as policy_loss (default: all five)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with this in their names")
    add_typed(parser, "--device", Literal["cpu", "cuda"], "where to run; cpu: on one thread", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), metavar="FILE", help="the results (default: bench.json)")
    parser.add_argument("--quick", action="store_true", help="fewer cases at smaller shapes")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Check and time the chosen cases, and return the exit status."""
    from reinforce_ada.bench import command

    if given.list:
        command.listing(given.ops, given.case, given.quick)
        return 0
    return command.run(given.ops, given.case, device=given.device, quick=given.quick, to=given.json)
