"""Where TRL has a vLLM in its process nothing waits for a round: a real vLLM, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="TRL is not installed")

from reinforce_ada.integrations.trl.stream import Stream, can_stream

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def facts(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "trl_stream.py"), str(model_folder), str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_trls_own_vllm_is_driven_without_rounds(facts):
    assert facts["loaded"] == [0, 1, 2]
    assert len(facts["steps"]) == 3
    for step in facts["steps"]:
        assert step["trained"] == step["kept"]
        assert step["advantages"] == pytest.approx(step["expected"], abs=1e-6)
        assert [[row[0] for row in pool] for pool in step["pools"]] == [list(range(len(pool))) for pool in step["pools"]]
        assert step["diff"] < 1e-3  # float32, the weights of this step
    sizes = {len(pool) for step in facts["steps"] for pool in step["pools"]}
    assert len(sizes) > 1
    first = facts["log"][0]
    assert first["sampling/generate_calls"] > 2
    assert first["sampling/samples_per_prompt"] == sum(map(len, facts["steps"][0]["pools"])) / 4


def test_what_streams():
    vllm = SimpleNamespace(enable_sleep_mode=False, generation_kwargs={}, structured_outputs_regex=None)
    one = {"vllm_generation": vllm, "vllm_mode": "colocate", "accelerator": SimpleNamespace(num_processes=1), "rollout_func": None}
    sampling = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    assert can_stream(SimpleNamespace(**one, **sampling))
    assert Stream.schedule == "stream"
    others = {
        "vllm_mode": "server",
        "accelerator": SimpleNamespace(num_processes=2),
        "rollout_func": print,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
    }
    for name, value in others.items():
        assert not can_stream(SimpleNamespace(**{**one, **sampling, name: value})), name
    for name, value in {"enable_sleep_mode": True, "generation_kwargs": {"seed": 1}, "structured_outputs_regex": "a"}.items():
        assert not can_stream(SimpleNamespace(**{**one, **sampling, "vllm_generation": SimpleNamespace(**{**vars(vllm), name: value})})), (
            name
        )
    assert not can_stream(SimpleNamespace())
