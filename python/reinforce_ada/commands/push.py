"""`reinforce-ada push`: uploads the trained model of a run to the Hugging Face Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command
from reinforce_ada.outside import show

_EXAMPLES = """\
examples:
  the model of a finished run, into a private repository
    reinforce-ada push runs/mine --to org/name

The token is the one of `hf auth login`, or HF_TOKEN; it must be able to write.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Upload the trained model of a run, with its model card, to the Hugging Face Hub."
    parser = add_command(commands, "push", "upload a trained model to the Hugging Face Hub", about, _EXAMPLES)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--to", required=True, metavar="ORG/NAME", help="the repository; a new one is private")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Upload the model, print where it is, and return 0."""
    from reinforce_ada.training import hub

    show(hub.push(given.run_dir, given.to))
    return 0
