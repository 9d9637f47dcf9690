"""What a project has beside its code agrees with it: the workflow, the hooks, the citation."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_workflow_calls_targets_that_exist():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"lint", "test", "sdist", "wheels", "docs"} <= set(jobs)
    run = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    called = set(re.findall(r"\bmake ([\w-]+)", run))
    assert {"lint", "test", "sdist"} <= called <= TARGETS


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
