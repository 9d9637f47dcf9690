"""`reinforce-ada eval`: scores a model on held-out prompts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.commands.flags import add_command, add_config_flags, import_from_here, overrides
from reinforce_ada.outside import finite, show

# The keys about model, task and engine that an evaluation does not read, and the keys of other tables that it reads.
_NOT_OF_EVAL = {"model", "eval_every"}
_OF_EVAL = {"temperature", "max_tokens", "stop", "positive_threshold", "preset", "seed", "data_seed"}


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = add_command(commands, "eval", "Measure a model on held-out prompts: Avg@k with its standard error, and unbiased pass@k.")
    parser.add_argument("model", metavar="MODEL", help="smollm2, gemma3-270m, a model folder (such as RUN/model) or a hub id")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    homes = configuration.section_of()
    whole = {key for key, section in homes.items() if section in ("model", "task", "engine")}
    add_config_flags(parser, [key for key in homes if key in whole - _NOT_OF_EVAL | _OF_EVAL])
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Evaluate the model, print Avg@k and pass@k, and return 0."""
    beside = Path(given.model).parent / "config.toml"
    if given.config is None and Path(given.model).is_dir() and beside.is_file():
        show(f"task and engine as in {beside}", file=sys.stderr)
        given.config = beside
    load = configuration.load_saved if given.config == beside else configuration.load
    config = load(given.config, overrides(given))
    import_from_here()
    with _prints_aside() if given.json else nullcontext():
        from reinforce_ada.training import launch

        e = launch.evaluate_model(config, given.model)
    if given.json:
        show(json.dumps(finite({**e.record(), "model": given.model}), allow_nan=False))
        return 0
    show(f"Avg@{e.k} {e.avg_at_k:.4f} ± {e.stderr:.4f} (standard error over {len(e.per_prompt)} prompts)")
    show("   ".join(f"pass@{k} {value:.4f}" for k, value in e.pass_at_k.items()))
    if e.num_voids:
        show(f"{e.num_voids} completions could not be scored and are left out")
    return 0


@contextmanager
def _prints_aside() -> Iterator[None]:
    """Send all that libraries, rewards and their processes print to standard error, so that the output is only the result."""
    sys.stdout.flush()
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(output, 1)
        os.close(output)
