"""`reinforce-ada export`: writes the whole model of a run that trained LoRA adapters."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command, add_typed
from reinforce_ada.config.values import Dtype
from reinforce_ada.outside import show

_BESIDE = Path()  # of --merge without a folder
_EXAMPLES = """\
examples:
  the whole model of a run that trained adapters, in runs/mine/merged
    reinforce-ada export runs/mine --merge
  a checkpoint, in another folder and dtype
    reinforce-ada export runs/mine/checkpoints/step-000030/model \\
      --merge merged-30 --dtype bfloat16
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Write a whole model: LoRA adapters merged into the model that they were trained on. transformers and vLLM load it."
    parser = add_command(commands, "export", "merge trained adapters into a whole model", about, _EXAMPLES)
    parser.add_argument("source", type=Path, metavar="RUN", help="run folder, or a folder of adapters such as RUN/checkpoints/.../model")
    shown = "folder to write, which must be empty or not there yet (default: merged, beside the adapters)"
    parser.add_argument("--merge", type=Path, nargs="?", const=_BESIDE, required=True, metavar="FOLDER", help=shown)
    shown = "dtype of the weights; auto: that of the run, or of the base model's files if there is no run"
    add_typed(parser, "--dtype", Dtype, shown, default="auto")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Write the model, print its folder, and return 0."""
    from reinforce_ada.training import launch

    show(str(launch.export(given.source, None if given.merge is _BESIDE else given.merge, given.dtype)))
    return 0
