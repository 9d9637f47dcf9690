"""A million simulated prompts: `make simulate-scale`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETTINGS = ["reinforce-ada-balance:decide_every=1", "--schedule", "stream", "--window", "posterior", "--seeds", "1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_million_prompts_on_ten_thousand_slots_within_five_minutes_and_4_gb(tmp_path: Path, capsys) -> None:
    """The cap is 32, for some 12 million completions. Peak memory is that of the process."""
    to = tmp_path / "study.json"
    size = ["--prompts", "1000000", "--slots", "10000", "--json", str(to)]
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "reinforce_ada", "simulate", *SETTINGS, *size], check=True, capture_output=True)
    seconds = time.monotonic() - started
    gigabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    ((row,),) = [study["rows"] for study in json.loads(to.read_text())]
    num_completions = 1e6 * row["samples_per_prompt"][0]
    with capsys.disabled():
        per_completion = f"{1e6 * seconds / num_completions:.1f} µs a completion"
        print(f"\n{num_completions:.0f} completions in {seconds:.0f} s ({per_completion}), {gigabytes:.2f} GB; {row}")
    assert row["samples_per_prompt"][0] == pytest.approx(11.9, abs=0.05)  # exact: 11.9
    assert row["waste"][0] < 0.01
    assert seconds < 300
    assert gigabytes < 4
