"""Several processes in lock-step are one process with all of their rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

import trl_ranks


@pytest.fixture(scope="module")
def two(model_folder, tmp_path_factory):
    """What both of two processes have after three steps of each run."""
    folder = tmp_path_factory.mktemp("ranks")
    child = [str(Path(trl_ranks.__file__)), str(model_folder), str(folder)]
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *child]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_are_one(two, model_folder, tmp_path):
    one = trl_ranks.run(model_folder, tmp_path, rows=12, adaptive=trl_ranks.balance(8))
    for rank in range(2):
        assert two[rank]["of 8"]["pools"] == one["pools"]
        assert (two[rank]["of 8"]["weights"] - one["weights"]).abs().max() <= 1e-6
    assert max(len(pools) for pools in one["pools"]) > 24  # some pools have two rounds


def test_preset_grpo_is_trl_itself_in_two_processes_too(two):
    for rank in range(2):
        assert torch.equal(two[rank]["grpo"]["weights"], two[rank]["TRL"]["weights"])
    assert not torch.equal(two[0]["grpo"]["weights"], two[0]["of 8"]["weights"])


def test_processes_with_a_row_too_many_stay_in_step(two):
    """Fifteen requests are eight for each: the sixteenth answer is thrown away, on both."""
    a, b = two[0]["of 5"], two[1]["of 5"]
    assert a["pools"] == b["pools"]
    assert torch.equal(a["weights"], b["weights"])
    indices = {prompt: [i for _, p, i, *_ in a["pools"][0] if p == prompt] for prompt in ("0", "1", "2")}
    assert all(found == list(range(len(found))) for found in indices.values())
    assert {len(found) % 5 for found in indices.values()} == {0}
