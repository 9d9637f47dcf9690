"""`reinforce-ada train`: trains a model by adaptive sampling."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.commands.flags import add_command, add_config_flags, import_from_here, overrides
from reinforce_ada.errors import InputError
from reinforce_ada.outside import show

_EXAMPLES = """\
examples:
  reinforce-ada train                                      SmolLM2-135M learns one-digit sums (minutes on two cores)
  reinforce-ada train --model tiny --steps 4               a complete run in seconds
  reinforce-ada train --model Qwen/Qwen3-0.6B --task gcd --preset reinforce-ada-pos --max-tokens 64
  reinforce-ada train --task problems.jsonl --max-tokens 400
  reinforce-ada train --task openai/gsm8k:main --eval-split test --reward number --max-model-len 768
  reinforce-ada train --config run.toml --seed 1           a file, with one key overridden
  reinforce-ada train --resume runs/smollm2-chain_sum-reinforce-ada-balance-seed0
  torchrun --nproc-per-node 2 -m reinforce_ada train       the same run, its gradients computed by two processes

The TOML file of --config may set every key below, in the table that its heading names.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "train", "Train a model by adaptive sampling.", _EXAMPLES)
    parser.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR with its own configuration")
    parser.add_argument("--estimate", action="store_true", help="print the memory that the run would take, and end; no weights are loaded")
    add_config_flags(parser)
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
