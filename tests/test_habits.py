"""What a project has beside its code agrees with it: the workflow, the hooks, the citation."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_workflow_calls_targets_that_exist():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"lint", "test", "sdist", "site", "wheels", "docs"} <= set(jobs)
    run = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    called = set(re.findall(r"\bmake ([\w-]+)", run))
    assert {"lint", "test", "sdist", "site"} <= called <= TARGETS


def test_the_hooks_run_what_lint_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    tools = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint))
    assert {Path(hook["entry"].split()[0]).name for hook in local["hooks"]} == tools


def test_every_phony_target_exists():
    phony = (ROOT / "Makefile").read_text().partition(".PHONY:")[2].partition("\n\n")[0].replace("\\\n", " ").split()
    assert set(phony) <= TARGETS


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION
    assert citation["license"] == "Apache-2.0"


def test_issue_forms_can_be_read():
    for form in ("bug_report", "feature_request"):
        body = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())["body"]
        assert all(part["id"] and part["attributes"]["label"] for part in body)


def additions(heading: str) -> dict[str, str]:
    """The lines that a section of CONTRIBUTING.md adds, by the file that it adds them to."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition(f"### {heading}\n")[2].partition("\n### ")[0]
    found: dict[str, str] = {}
    for name, lines in re.findall(r"^(?:\+\+\+|---) (\S+)\n((?:[+ -](?!\+\+ |-- ).*\n|\+\n)+)", section, re.MULTILINE):
        found[name] = "".join(line[1:] + "\n" for line in lines.splitlines() if line.startswith("+"))
    return found


def test_the_loss_of_contributing_trains(tmp_path):
    from reinforce_ada import ops

    ((name, text),) = additions("A loss").items()
    (tmp_path / name).write_text(text)
    logprobs = torch.tensor([-1.2, -0.4, -2.3], requires_grad=True)
    loss, metrics = ops.policy_loss(
        logprobs, torch.tensor([1.0, -1.0]), torch.ones(3, dtype=torch.bool), old_logprobs=torch.tensor([-1.0, -0.5, -2.0]),
        cu_seqlens=torch.tensor([0, 2, 3]), loss=f"{tmp_path / name}:smooth",
    )  # fmt: skip
    loss.backward()
    assert logprobs.grad.abs().min() > 0
    assert metrics["num_tokens"] == 3


def test_the_exit_rule_of_contributing_runs():
    from reinforce_ada.sampling import policies, presets

    rule, row = additions("An exit rule and its preset").values()
    names = {**vars(policies.contracts), **vars(policies.decide), **vars(presets)}
    exec(compile(rule, "decide.py", "exec", dont_inherit=True), names)
    policy = eval(row.strip().rstrip(","), names)(num_scored=4)
    assert [policy.decide(policies.contracts.Counts(c, w)).name for c, w in ((0, 5), (1, 2), (1, 3))] == ["CONTINUE", "CONTINUE", "STOP"]
