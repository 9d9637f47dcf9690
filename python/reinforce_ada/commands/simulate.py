"""`reinforce-ada simulate`: compares policies, schedules and windows on a virtual clock."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command

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


# The flags of the fields of EngineModel and LengthModel, whose defaults apply.
_ENGINE_FLAGS = (
    ("slots", "slots", int, "N", "sequences decoded together (default: 256)"),
    ("engine-step-ms", "step_ms", float, "MS", "time of a decode step (default: 8)"),
    ("engine-busy-ms", "busy_ms", float, "MS", "further time for each sequence in it (default: 0.03)"),
    ("engine-prefill-ms", "prefill_ms", float, "MS", "further time for each prompt token of a request that starts (default: 0)"),
    ("prompt-tokens", "prompt_tokens", int, "N", "tokens of a prompt (default: 0)"),
    ("engine-sync-ms", "sync_ms", float, "MS", "weight synchronisation, once (default: 0)"),
)
_LENGTH_FLAGS = (
    ("median-correct", "median_correct", float, "N", "tokens of a correct answer, median (default: 430)"),
    ("median-wrong", "median_wrong", float, "N", "tokens of a wrong answer, median (default: 709)"),
    ("sigma", "sigma", float, "X", "spread of log tokens within a prompt (default: 0.8)"),
    ("sigma-prompt", "sigma_prompt", float, "X", "spread of log tokens between prompts (default: 0.55)"),
    ("max-tokens", "max_tokens", int, "N", "longest answer (default: 4096)"),
)


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
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="write wall-clock against waste, and busy slots over time")
    for title, flags in (("engine", _ENGINE_FLAGS), ("lengths", _LENGTH_FLAGS)):
        group = parser.add_argument_group(title)
        for flag, name, kind, metavar, text in flags:
            group.add_argument(f"--{flag}", dest=name, type=kind, metavar=metavar, help=text)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the study that the flags describe, print the table, and return 0."""
    from reinforce_ada.simulate import command

    engine, lengths = (
        {name: value for _, name, *_ in flags if (value := getattr(given, name)) is not None} for flags in (_ENGINE_FLAGS, _LENGTH_FLAGS)
    )
    command.run(
        given.policies, given.schedule, given.window, given.population, num_prompts=given.prompts, num_seeds=given.seeds,
        num_earlier=given.earlier, engine=engine, lengths=lengths, fit=given.fit, json_to=given.json, figure_to=given.figure,
    )  # fmt: skip
    return 0
