"""`reinforce-ada doctor`: shows what works on this machine and what does not."""

from __future__ import annotations

import argparse
from typing import Any

from reinforce_ada.commands.flags import add_command

_EXAMPLES = """\
examples:
  what is installed, which operators and engines work, and why others do not
    reinforce-ada doctor
  the same, with every usable form of every operator held to the reference; the
  exit status is 1 if one of them is wrong
    reinforce-ada doctor --check
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Show which operators, engines and packages work here, and why the others do not."
    parser = add_command(commands, "doctor", "what works on this machine, and what does not", about, _EXAMPLES)
    parser.add_argument("--check", action="store_true", help="run every usable form of every operator against the reference")
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print the findings and return the exit status."""
    from reinforce_ada import doctor

    return doctor.main(check=given.check, as_json=given.json)
