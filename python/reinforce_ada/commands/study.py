"""`reinforce-ada study`: compares ways of sampling at the same cost, over learning rates and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command, add_typed
from reinforce_ada.config.values import Processes

_EXAMPLES = """\
examples:
  every run, then results.json, page.md and figures in studies/<name>; the same
  command goes on after a kill, or with more seeds, rates or arms
    reinforce-ada study sums.toml
  every second run; another machine that shares the folder takes --shard 2/2
    reinforce-ada study sums.toml --shard 1/2
  two runs at a time, which suits small models
    reinforce-ada study sums.toml --jobs 2
  only the page and the figures, from results.json
    reinforce-ada study sums.toml --report

a study file:
  name = "sums"
  baseline = "grpo-8"            # the other arms are compared with it
  seeds = [0, 1, 2]              # of the training; the questions are the same
  learning_rates = [1e-5, 3e-5]  # of every arm; an arm may have its own

  [budget]
  steps = 60                     # or generated_completions, generated_tokens,
                                 # trained_completions, trained_tokens
  completions_per_step = 96      # optional: sets the prompts per step of each
                                 # arm so that it generates about as many

  [target]                       # optional: what each arm pays until this
  reward = 0.5                   # held-out reward

  [shared]                       # any keys of `reinforce-ada train --help`
  model = "tiny"                 # except those that the study sets
  eval_every = 10

  [[arm]]                        # name, preset, and any keys of the tables
  name = "grpo-8"                # [sampling] and [training]
  preset = "grpo"

  [[arm]]
  name = "balance"
  preset = "reinforce-ada-balance"

Everything is checked before anything runs. First the untrained model is
evaluated: from its pass rates follow the completions per prompt that each arm
is expected to use. A run that fails is reported in one line, and the others go
on; the exit status is then 1. docs/study.md says how to read the page, and what
else a study file may set.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Compare ways of sampling at the same cost, over learning rates and seeds."
    parser = add_command(commands, "study", "compare presets at the same cost, over seeds", about, _EXAMPLES)
    parser.add_argument("study", type=Path, metavar="STUDY.toml", help="the file of the study")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study (default: studies/<name>)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="train only every N-th run, from the I-th on (default: 1/1)")
    add_typed(parser, "--jobs", Processes, "runs at the same time, which share the CPU's threads", default=1)
    parser.add_argument("--report", action="store_true", help="train nothing: write the page and the figures again, from results.json")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run or report the study, and return the exit status."""
    from reinforce_ada.study import command

    return command.run(given.study, out=given.out, shard=given.shard, num_jobs=given.jobs, report=given.report)
