"""`reinforce-ada explain`: prints the exact properties of a sampling policy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.commands.flags import Typed, add_command, add_field, add_key_flags, overrides
from reinforce_ada.explain.costs import Costs

_EXAMPLES = """\
examples:
  all presets side by side
    reinforce-ada explain
  one of them: its parts in words, its numbers over the pass rate
    reinforce-ada explain reinforce-ada-balance
    reinforce-ada explain reinforce-ada-pos --decide-every 1 --min-pool 4
  another objective, averaged over two populations of prompts
    reinforce-ada explain reinforce-ada-balance --objective mean \\
      --population 1,2 2.5,0.6
  the policy of a run, as a figure
    reinforce-ada explain runs/mine --figure curves.png
  which preset is best where training costs three times what generating does,
  and which one for the costs and pass rates that a run measured
    reinforce-ada explain --cost-ratio 3
    reinforce-ada explain --of runs/mine

The numbers are exact for rewards of 0 and 1: each is a sum over all states in
which the stopping rule can end. w(p) says which prompts a policy learns from.
With a mean baseline and a fixed size it is the same for all. With adaptive
rules hard prompts (and with balance easy ones) count several times as much, so
the policy does not ascend the pass rate. --objective mean makes w(p) = 1.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Explain a sampling policy: its parts in words, and its cost and implied objective in exact numbers."
    parser = add_command(
        commands, "explain", "the exact cost and objective of a policy", about, _EXAMPLES,
        usage="reinforce-ada explain [PRESET|CONFIG.toml|RUN] [FLAGS]",
    )  # fmt: skip
    shown = "a preset, a configuration file or a run folder (default: every preset)"
    parser.add_argument("what", type=Typed(configuration.PresetName | str), nargs="?", metavar="PRESET|CONFIG.toml|RUN", help=shown)
    parser.add_argument(
        "--population", nargs="+", default=[], metavar="A,B", help="prompts with Beta(A, B) pass rates (default: 0.5,2.5 1,2 2.5,0.6)"
    )
    shown = "factors of the advantages of wrong and of correct completions (default: 1,1)"
    parser.add_argument("--class-weights", metavar="W,C", help=shown)
    add_field(parser, Costs, "cost_ratio", shown="that of the run of --of, else no ranking")
    parser.add_argument("--of", type=Path, metavar="RUN", help="the same, with the cost and the held-out pass rates that this run measured")
    add_field(parser, Costs, "remembered")
    add_field(parser, Costs, "score_variance")
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
