"""`reinforce-ada study`: compares ways of sampling at the same cost, over learning rates and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command

_EXAMPLES = """\
examples:
  reinforce-ada study sums.toml                            every run, then results.json, page.md and figures in studies/<name>
  reinforce-ada study sums.toml                            the same command goes on after a kill, or with more seeds, rates or arms
  reinforce-ada study sums.toml --shard 1/2                every second run; another machine that shares the folder takes --shard 2/2
  reinforce-ada study sums.toml --jobs 2                   two runs at a time, which suits small models
  reinforce-ada study sums.toml --report                   only the page and the figures, from results.json

a study file:
  name = "sums"
  baseline = "grpo-8"            # the arm that the others are compared with, seed by seed
  seeds = [0, 1, 2]              # of the training; base model, questions and split are the same for all
  learning_rates = [1e-5, 3e-5]  # every arm is run with each; an arm may have a list of its own

  remembered = 8                 # optional: earlier completions of each prompt that predictions for baseline memory assume

  [budget]                       # one of steps, generated_completions, generated_tokens, trained_completions, trained_tokens
  steps = 60
  completions_per_step = 96      # optional: sets the prompts per step of each arm so that it generates about as many

  [target]                       # optional: what each arm pays until this held-out reward
  reward = 0.5

  [shared]                       # any keys of `reinforce-ada train --help` except those that the study sets
  model = "tiny"
  eval_every = 10

  [[arm]]                        # name, preset, and any keys of its tables [sampling] and [training]
  name = "grpo-8"
  preset = "grpo"

  [[arm]]
  name = "balance"
  preset = "reinforce-ada-balance"

Everything is checked before anything runs. First the untrained model is evaluated: from its pass rates follow the completions per prompt
that each arm is expected to use. A run that fails is reported in one line, and the others go on; the exit status is then 1.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "study", "Compare ways of sampling at the same cost, over learning rates and seeds.", _EXAMPLES)
    parser.add_argument("study", type=Path, metavar="STUDY.toml", help="the file of the study")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the study (default: studies/<name>)")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="train only every N-th run, from the I-th on (default: 1/1)")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at the same time, which share the CPU's threads (default: 1)"
    )
    parser.add_argument("--report", action="store_true", help="train nothing: write the page and the figures again, from results.json")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run or report the study, and return the exit status."""
    from reinforce_ada.study import command

    return command.run(given.study, out=given.out, shard=given.shard, num_jobs=given.jobs, report=given.report)
