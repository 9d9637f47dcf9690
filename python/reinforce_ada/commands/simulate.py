"""`reinforce-ada simulate`: compares policies, schedules and windows on a virtual clock."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel

_EXAMPLES = """\
examples:
  reinforce-ada simulate                                   the published comparison, and the posterior window
  reinforce-ada simulate reinforce-ada-balance:decide_every=1 --window 8 16 posterior posterior:0.2
  reinforce-ada simulate grpo:group_size=16 reinforce-ada-pos --population beta:0.5,2.5 --prompts 1024 --slots 512
  reinforce-ada simulate --fit runs/mine                   engine, lengths and pass rates of a finished run
  reinforce-ada simulate --population rates.csv --json study.json --figure study.png

A policy is a preset, with overrides after a colon: reinforce-ada-balance:decide_every=1,round_size=4. It runs with every --schedule, and
streams with every --window: a number, adaptive, or posterior, which requests a completion if the prompt needs it with probability 0.4 or
more (posterior:0.3: another probability). Every row meets the same completions; wall-clock is relative to the first row.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Compare policies, schedules and windows on a virtual clock: wall-clock, tokens, waste and signal before paying for them."
    parser = add_command(commands, "simulate", about, _EXAMPLES)
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="presets (default: the published comparison)")
    parser.add_argument("--schedule", nargs="+", choices=("rounds", "stream"), default=[], help="for each policy (default: both)")
    parser.add_argument("--window", nargs="+", metavar="W", default=[], help="for streams: N, adaptive, posterior (default: posterior)")
    shown = "pass rates: beta:A,B, a file (one per line, or JSON), a run folder or its store (default: beta:1,2)"
    parser.add_argument("--population", nargs="+", metavar="P", default=[], help=shown)
    parser.add_argument("--prompts", type=int, metavar="N", help="prompts (default: 64, or those of the file)")
    parser.add_argument("--seeds", type=int, default=8, metavar="K", help="repetitions (default: 8)")
    shown = "completions of earlier steps in the history of each prompt (default: 0)"
    parser.add_argument("--earlier", type=int, default=0, metavar="N", help=shown)
    parser.add_argument("--fit", type=Path, metavar="RUN", help="take engine, lengths and pass rates from a run folder or its store")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="write signal and waste against wall-clock")
    for title, model in (("engine", EngineModel), ("lengths", LengthModel)):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(model):
            flag = ("--engine-" if f.name.endswith("_ms") else "--") + f.name.replace("_", "-")
            metavar = "MS" if f.name.endswith("_ms") else "N" if isinstance(f.default, int) else "X"
            shown = f"{f.metadata['about']} (default: {f.default:g})"
            group.add_argument(flag, dest=f.name, type=type(f.default), metavar=metavar, help=shown)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the study that the flags describe, print the table, and return 0."""
    from reinforce_ada.simulate import command

    engine, lengths = (
        {f.name: value for f in dataclasses.fields(model) if (value := getattr(given, f.name)) is not None}
        for model in (EngineModel, LengthModel)
    )
    command.run(
        given.policies, given.schedule, given.window, given.population, num_prompts=given.prompts, num_seeds=given.seeds,
        num_earlier=given.earlier, engine=engine, lengths=lengths, fit=given.fit, json_to=given.json, figure_to=given.figure,
    )  # fmt: skip
    return 0
