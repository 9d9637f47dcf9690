"""`reinforce-ada simulate`: compares policies, schedules and windows on a virtual clock."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

from reinforce_ada.commands.flags import Typed, add_command, add_field, add_typed, flag_of
from reinforce_ada.config import PresetName
from reinforce_ada.simulate.engine_model import EngineModel, LengthModel
from reinforce_ada.simulate.sizes import Earlier, Prompts, Seeds

_EXAMPLES = """\
examples:
  the published comparison, and the posterior window
    reinforce-ada simulate
  windows side by side
    reinforce-ada simulate reinforce-ada-balance:decide_every=1 \\
      --window 8 16 posterior posterior:0.2
  two policies on hard prompts and a larger engine
    reinforce-ada simulate grpo:group_size=16 reinforce-ada-pos \\
      --population beta:0.5,2.5 --prompts 1024 --slots 512
  engine, lengths and pass rates of a finished run
    reinforce-ada simulate --fit runs/mine
  pass rates from a file, every number into another, and a figure
    reinforce-ada simulate --population rates.csv --json study.json \\
      --figure study.png

A policy is a preset, with overrides after a colon:
reinforce-ada-balance:decide_every=1,round_size=4. It runs with every
--schedule, and streams with every --window: a number, adaptive, or posterior,
which requests a completion if the prompt needs it with probability 0.4 or more
(posterior:0.3: another probability). Every row meets the same completions;
wall-clock is relative to the first row.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Compare policies, schedules and windows on a virtual clock: wall-clock, tokens, waste and signal before paying for them."
    parser = add_command(
        commands, "simulate", "wall-clock and waste of policies on a virtual clock", about, _EXAMPLES,
        usage="reinforce-ada simulate [POLICY ...] [FLAGS]",
    )  # fmt: skip
    parser.add_argument(
        "policies",
        type=Typed(PresetName | str),
        nargs="*",
        metavar="POLICY",
        help="presets, with overrides (default: the published comparison)",
    )
    add_typed(parser, "--schedule", Literal["rounds", "stream"], "for each policy", shown="both", nargs="+", default=[])
    parser.add_argument("--window", nargs="+", metavar="W", default=[], help="for streams: N, adaptive, posterior (default: posterior)")
    shown = "pass rates: beta:A,B, a file (one per line, or JSON), a run folder or its store (default: beta:1,2)"
    parser.add_argument("--population", nargs="+", metavar="P", default=[], help=shown)
    add_typed(parser, "--prompts", Prompts, "prompts", shown="64, or those of the file")
    add_typed(parser, "--seeds", Seeds, "repetitions", default=8)
    add_typed(parser, "--earlier", Earlier, "completions of earlier steps in the history of each prompt", default=0)
    parser.add_argument("--fit", type=Path, metavar="RUN", help="take engine, lengths and pass rates from a run folder or its store")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="write signal and waste against wall-clock")
    for title, model in (("engine", EngineModel), ("lengths", LengthModel)):
        group = parser.add_argument_group(title)
        for f in dataclasses.fields(model):
            flag = flag_of(f"engine_{f.name}" if f.name.endswith("_ms") else f.name)
            add_field(group, model, f.name, flag=flag, dest=f.name)
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
