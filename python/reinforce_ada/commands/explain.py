"""`reinforce-ada explain`: prints the exact properties of a sampling policy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.commands.flags import add_command, add_key_flags, overrides

_EXAMPLES = """\
examples:
  reinforce-ada explain                                    all presets side by side
  reinforce-ada explain reinforce-ada-balance              one of them: its parts in words, its numbers over the pass rate
  reinforce-ada explain reinforce-ada-pos --decide-every 1 --min-pool 4
  reinforce-ada explain reinforce-ada-balance --objective mean --population 1,2 2.5,0.6
  reinforce-ada explain runs/mine --figure curves.png
  reinforce-ada explain --cost-ratio 3                     which preset is best where training costs three times what generating does
  reinforce-ada explain --of runs/mine                     which preset is best for what this run has measured

The numbers are exact for rewards of 0 and 1: each is a sum over all states in which the stopping rule can end.
w(p) says which prompts a policy learns from. With a mean baseline and a fixed size it is the same for all. With adaptive rules hard
prompts (and with balance easy ones) count several times as much, so the policy does not ascend the pass rate. --objective mean makes
w(p) = 1.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Explain a sampling policy: its parts in words, and its cost and implied objective in exact numbers."
    parser = add_command(commands, "explain", about, _EXAMPLES)
    parser.add_argument(
        "what", nargs="?", metavar="PRESET|CONFIG.toml|RUN", help="a preset, a configuration file or a run folder (default: every preset)"
    )
    parser.add_argument("--population", nargs="+", default=[], metavar="A,B", help="prompts with Beta(A, B) pass rates (default: three)")
    parser.add_argument("--class-weights", metavar="W,C", help="factors of the advantages of wrong and of correct completions")
    parser.add_argument(
        "--cost-ratio", type=float, metavar="X",
        help="rank policies by their progress for the cost, if training on a completion costs X times as much as generating one",
    )  # fmt: skip
    parser.add_argument("--of", type=Path, metavar="RUN", help="the same, with the cost and the held-out pass rates that this run measured")
    parser.add_argument(
        "--remembered", type=int, metavar="N", help="of a ranking: earlier completions of a prompt in the memory (default: 8)"
    )
    parser.add_argument(
        "--score-variance", type=float, metavar="V",
        help="of a ranking: variance of the scores of completions within a class (default: 1)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the unrounded numbers as JSON, one object per policy")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw w(p), f(p), E[N] and P(signal) into this PNG")
    add_key_flags(parser, configuration.POLICY_KEYS)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print the policy's cost and implied objective, and return the exit status."""
    from reinforce_ada.explain import command

    costs = {name: value for name in ("cost_ratio", "remembered", "score_variance") if (value := getattr(given, name)) is not None}
    return command.run(
        given.what, overrides(given), class_weights=given.class_weights, populations=given.population, costs=costs, of=given.of,
        as_json=given.json, figure=given.figure,
    )  # fmt: skip
