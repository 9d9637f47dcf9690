"""The vLLM engine against the model it serves, in fp32: logprobs, seeds, aborts, weight syncs, and the whole way through `train`."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import engine_conformance
import pytest
import torch
from engine_scenes import MAX_TOKENS, TRUNCATIONS, refusal

from reinforce_ada import config as configuration
from reinforce_ada.engines.base import too_old
from reinforce_ada.engines.vllm import VllmEngine
from reinforce_ada.training import launch_eval, models
from reinforce_ada.training.log import read_log

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


class FakeLLM:
    """Says what it was asked for."""

    asked: dict[str, Any]

    def __init__(self, model: str, **asked: Any) -> None:
        FakeLLM.asked = asked
        self.llm_engine = None
        self.model_config = types.SimpleNamespace(get_vocab_size=lambda: 384)
        self.calls: list[str] = []

    def get_tokenizer(self) -> None: ...

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.calls.append("wake")


def test_a_vllm_that_is_too_old(fake_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.21.3", raising=False)
    said = refusal(lambda: VllmEngine("m", dtype="bfloat16", max_tokens=4))
    assert said.startswith('vllm: vLLM 0.21.3; at least 0.22 is needed; pip install -U "reinforce-ada[vllm]"')


@pytest.mark.parametrize("version", ["0.22.0", "0.32.0+cpu", "1.0", "dev", ""])
def test_a_vllm_that_will_do(version: str) -> None:
    assert too_old(version) == ""


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU is needed for, up to the call of vLLM."""
    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = FakeLLM, None  # type: ignore[attr-defined]
    parameters = types.ModuleType("vllm.sampling_params")
    parameters.RequestOutputKind = types.SimpleNamespace(FINAL_ONLY=None)  # type: ignore[attr-defined]
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "0")  # the engine sets them; servers that other tests start must not inherit that
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)


def nap(**options: Any) -> tuple[dict[str, Any], list[str]]:
    engine = VllmEngine("m", dtype="bfloat16", max_tokens=4, **options)
    for call in (engine.wake, engine.sleep, engine.sleep, engine.wake, engine.wake):
        call()
    return FakeLLM.asked, engine._llm.calls


def test_memory_of_a_gpu(fake_vllm: None) -> None:
    asked, calls = nap(device="cuda", memory_fraction=0.3, tensor_parallel=2)
    assert (asked["gpu_memory_utilization"], asked["tensor_parallel_size"], asked["enable_sleep_mode"]) == (0.3, 2, True)
    assert asked["enable_chunked_prefill"]
    assert calls == ["sleep 1", "wake"]


def test_an_engine_that_keeps_its_memory(fake_vllm: None) -> None:
    asked, calls = nap(device="cuda", sleeps=False)
    assert not asked["enable_sleep_mode"]
    assert calls == []


def test_nothing_sleeps_on_a_cpu(fake_vllm: None) -> None:
    asked, calls = nap(device="cpu", kv_cache_bytes=1 << 20)
    assert (asked["kv_cache_memory_bytes"], asked["block_size"]) == (1 << 20, 32)
    assert "enable_sleep_mode" not in asked
    assert calls == []


def test_an_llm_of_somebody_else(fake_vllm: None) -> None:
    """What a real one makes of it, the scenes at other temperatures, slots and stops say."""
    llm = FakeLLM("m")
    settings = types.SimpleNamespace(logprobs_mode="raw_logprobs", max_model_len=64)
    llm.llm_engine = types.SimpleNamespace(vllm_config=types.SimpleNamespace(model_config=settings))
    line = "vllm: an LLM with logprobs_mode 'raw_logprobs'; 'processed_logprobs' is needed"
    assert refusal(lambda: VllmEngine.around(llm, max_tokens=4, max_num_seqs=8)) == line
    settings.logprobs_mode = "processed_logprobs"
    engine = VllmEngine.around(llm, max_tokens=4, max_num_seqs=8)
    assert engine.free_slots == 8
    engine.sleep()
    assert llm.calls == []  # its owner says when


def test_conformance(in_process: dict[str, Any]) -> None:
    engine_conformance.check(in_process, in_process)


def test_logprobs_at_another_temperature(vllm_facts: dict[str, Any]) -> None:
    assert vllm_facts["diff_07"] < 1e-4


def test_truncated_distributions_have_the_support_and_the_logprobs_of_the_definition(vllm_facts: dict[str, Any]) -> None:
    """The transformers engine is held to the same truth: the two sample from one distribution."""
    assert vllm_facts["truncated"].keys() == TRUNCATIONS.keys()
    assert max(vllm_facts["truncated"].values()) < 1e-4
    assert vllm_facts["greedy_whatever_is_left"] == 0


def test_tokens_do_not_depend_on_the_number_of_slots(vllm_facts: dict[str, Any]) -> None:
    assert len({tuple(t) for t in vllm_facts["tokens"].values()}) > 12  # 24 requests
    assert vllm_facts["few_slots"] == vllm_facts["tokens"]


def test_finish_reasons(vllm_facts: dict[str, Any]) -> None:
    for name, ids in vllm_facts["tokens"].items():
        assert vllm_facts["finish_reasons"][name] == ("stop" if ids[-1] == 1 else "length")
        assert 1 not in ids[:-1]
        assert len(ids) == MAX_TOKENS or ids[-1] == 1
    assert set(vllm_facts["finish_reasons"].values()) == {"stop", "length"}


def test_stop_strings_end_completions_and_are_not_in_their_text(vllm_facts: dict[str, Any]) -> None:
    assert vllm_facts["num_stopped"] > 4  # of 24; the scene compares each with what was sampled without them


def test_all_slots_are_free_in_the_end(vllm_facts: dict[str, Any]) -> None:
    assert vllm_facts["free_slots"] == 32


def test_greedy_output_is_the_trained_models_after_every_sync(vllm_facts: dict[str, Any]) -> None:
    for sync in vllm_facts["syncs"]:
        assert sync["wrong"] == 0
        assert sync["diff"] < 1e-4  # a prefix cached under the old weights would show here
    outputs = [json.dumps(sync["tokens"]) for sync in vllm_facts["syncs"]]
    assert len(set(outputs)) == len(outputs) == 4  # or there was nothing to tell apart


def test_refusals_are_one_line(vllm_facts: dict[str, Any], in_process: dict[str, Any]) -> None:
    said = in_process["refusals"]
    assert said["empty"] == "vllm: prompt 'empty' is empty; at least one token"
    assert said["long"].startswith("vllm: prompt 'long' has 55 tokens; at most max_model_len - max_tokens = 64 - 10")
    assert in_process["sync_in_flight"] == "vllm: sync_weights with 3 requests in flight; none"
    assert vllm_facts["too_long_for_the_model"].startswith("vllm: ")
    assert "\n" not in vllm_facts["too_long_for_the_model"]


def test_the_whole_way(vllm_folder: Path, tiny_model: Path) -> None:
    run = vllm_folder / "run"
    records = read_log(run / "log.jsonl")
    assert [(r["kind"], r.get("step")) for r in records] == [("run", None), ("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]
    assert records[0]["engine"] == "VllmEngine"
    before = models.load(str(tiny_model), "float32", torch.device("cpu")).module.state_dict()
    after = models.load(str(run / "model"), "float32", torch.device("cpu")).module.state_dict()
    assert before.keys() == after.keys()
    moved = any(r["grad_norm"] > 0 for r in records if r["kind"] == "step")
    assert any(not torch.equal(before[k], after[k]) for k in before) == moved
    config = configuration.load(run / "config.toml", {"engine": "transformers"})
    (result,) = launch_eval.evaluate_model({"task": config}, str(run / "model"))
    assert len(result.evaluation.per_prompt) == 4
