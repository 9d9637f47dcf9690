"""docs/metrics.md names every number that is logged, and no other."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest
from toy_training import toy_config, toy_trainer

import reinforce_ada.engines
from reinforce_ada.engines.fleet import FleetCounts
from reinforce_ada.ops.policy_loss import METRICS
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.training.evaluate import Evaluation
from reinforce_ada.training.log import read_log
from reinforce_ada.types import Failed, Prompt

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
ENGINES = Path(reinforce_ada.engines.__file__).parent
RUNS = {
    "one minibatch": {"minibatches": 1},
    "two minibatches, a correction, a KL and an entropy bonus": {
        "rollout_correction": "token-truncate", "kl_coef": 0.1, "entropy_coef": 0.01,
    },
    "a predicted baseline": {
        "preset": "reinforce-ada-memory", "baseline": "predicted", "group_size": 2, "round_size": None, "max_rounds": None,
    },
}  # fmt: skip


def documented(*sections: str) -> set[str]:
    """The names in the first column of the tables of these sections."""
    found: set[str] = set()
    for section in sections:
        text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        assert text, section
        for row in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE):
            found |= set(re.findall(r"`(\w+)`", row))
    return found


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> dict[str, set[str]]:
    """The names that tiny runs log, by the kind of the record."""
    found: dict[str, set[str]] = {"step": set(), "eval": set()}
    for name, settings in RUNS.items():
        out = tmp_path_factory.mktemp(name.replace(" ", "-")) / "run"
        toy_trainer(toy_config(out, steps=1, **settings), out, resume=False).run()
        for record in read_log(out / "log.jsonl"):
            found[record["kind"]] |= set(record) - {"kind", "step"}
    return found


def test_every_number_of_a_step_is_documented_and_no_other(logged):
    only_the_operator = {"clip_fraction_dual"}  # train has no key for a dual clip
    assert documented("Sampling", "Loss", "Time") == logged["step"] | only_the_operator


def test_each_part_has_its_section():
    sampler = AdaptiveSampler([Prompt("a")], preset("grpo", group_size=2))
    for request in sampler.next_requests(2):
        sampler.receive(Failed(request.id, 0, "no reward"))
    assert documented("Sampling") == set(sampler.result().metrics)
    assert documented("Loss") >= set(METRICS)


def test_every_number_of_an_evaluation_is_documented_and_no_other(logged):
    votes = {"maj_at_k", "maj_at_k_stderr"}  # train measures none
    assert votes <= {field.name for field in fields(Evaluation)}
    assert documented("Evaluation") == logged["eval"] | votes


def test_every_number_of_an_engine_is_documented_and_no_other():
    """The literals of the engines, since most engines need a server or a GPU to report."""
    trees = [ast.parse(path.read_text()) for path in ENGINES.glob("*.py")]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    reported = {value for value in constants if re.fullmatch(r"engine_\w*[a-z]", value)}
    assert {"engine_busy_slots", "engine_prefix_hit_rate"} <= reported
    assert documented("Engine") == reported | {f"engine_{field.name}" for field in fields(FleetCounts)}
