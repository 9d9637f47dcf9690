"""`reinforce-ada train`: trains a model by adaptive sampling."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.commands.flags import add_command, add_config_flag, add_key_flag, add_key_flags, import_from_here, overrides
from reinforce_ada.errors import InputError
from reinforce_ada.outside import show

_FIRST = ("model", "task", "reward", "preset", "steps", "out")  # what most runs set; the other keys follow by table
_USAGE = """\
reinforce-ada train [FLAGS]
       reinforce-ada train --config FILE [FLAGS]
       reinforce-ada train --resume DIR [FLAGS]"""
_EXAMPLES = """\
examples:
  a complete run in seconds, with a model that is made on the spot
    reinforce-ada train --model tiny --steps 4
  SmolLM2-135M learns one-digit sums, in minutes on two cores
    reinforce-ada train
  questions of your own: {"prompt": ..., "answer": ...} on each line
    reinforce-ada train --task problems.jsonl --max-tokens 200 --out runs/mine
  a dataset of the Hugging Face hub
    reinforce-ada train --model Qwen/Qwen2.5-1.5B-Instruct \\
      --task openai/gsm8k:main --eval-split test --reward number \\
      --max-model-len 768
  the memory that a run will take
    reinforce-ada train --config run.toml --estimate
  a file, with one key overridden
    reinforce-ada train --config run.toml --seed 1
  a run that was interrupted or killed goes on
    reinforce-ada train --resume runs/mine
  the gradients are computed by two processes
    torchrun --nproc-per-node 2 -m reinforce_ada train --config run.toml

A flag below a [table], or with one in brackets, is a key of that table in the
TOML file, there with underscores: --max-tokens 200 is max_tokens = 200 below
[sampling]. Times are in seconds and lengths in tokens. docs/training.md says
what a run does.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(
        commands, "train", "train a model by adaptive sampling", "Train a model by adaptive sampling.", _EXAMPLES,
        usage=_USAGE, add_help=False,
    )  # fmt: skip
    first = parser.add_argument_group("what most runs set")
    for key in _FIRST:
        add_key_flag(first, key, note=f"[{configuration.section_of()[key]}]")
    whole = parser.add_argument_group("the run as a whole")
    add_config_flag(whole)
    whole.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder, with its own configuration")
    whole.add_argument("--estimate", action="store_true", help="print the memory that the run would take, and end; no weights are loaded")
    whole.add_argument("-h", "--help", action="help", help="show this help message and exit")
    add_key_flags(parser, configuration.section_of().keys() - set(_FIRST))
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the training that the flags describe, and return 0."""
    keys = overrides(given)
    if given.resume is None:
        config = configuration.load(given.config, keys)
    else:
        if given.config is not None:
            raise InputError("train", "--resume and --config", "one of them is needed: a resumed run keeps its configuration")
        saved = given.resume / "config.toml"
        if not os.path.isfile(saved):
            raise InputError("train", f"{given.resume} holds no run", "a folder that `reinforce-ada train` wrote")
        config = configuration.load_saved(saved, keys)
    import_from_here()
    from reinforce_ada.training import launch

    if given.estimate:
        show(launch.estimate_memory(config))
        return 0
    launch.train(config, given.resume)
    return 0
