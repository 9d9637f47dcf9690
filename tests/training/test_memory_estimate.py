"""The estimate of a run's memory, and what is said when memory runs out: with an allocator that fails for real."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_language_model import GROUPS, make_model
from test_memory_savers import kept_bytes
from toy_runs import pools, submitted, trained
from toy_training import saved_weights, toy_config, toy_trainer

from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.training import adapters, models
from reinforce_ada.training.batching import collate
from reinforce_ada.training.memory_estimate import Shapes, estimate
from reinforce_ada.training.optimizer import MasterAdamW
from reinforce_ada.training.out_of_memory import is_out_of_memory, remedies

SHAPES = Shapes(1000, 1000, 100, num_layers=2, width=8, query_width=8, key_width=4, mlp_width=16)


# -------------------- the estimate


def parts(**overrides: Any) -> dict[str, int]:
    return dict(estimate(SHAPES, configuration.load(None, {"dtype": "float32", **overrides}), "cpu").trainer)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {"weights": 4000, "float32 masters": 0, "gradients": 4000, "moments": 8000, "reference": 0}),
        ({"dtype": "bfloat16"}, {"weights": 2000, "float32 masters": 4000, "gradients": 6000, "moments": 8000, "reference": 0}),
        ({"moments": "bfloat16"}, {"weights": 4000, "float32 masters": 0, "gradients": 4000, "moments": 4000, "reference": 0}),
        ({"kl_coef": 0.1}, {"weights": 4000, "float32 masters": 0, "gradients": 4000, "moments": 8000, "reference": 4000}),
    ],
)
def test_bytes_of_weights_and_optimizer(overrides: dict[str, Any], expected: dict[str, int]) -> None:
    found = parts(**overrides)
    assert {name: found[name] for name in expected} == expected


def test_adapters_are_float32_without_masters_and_their_reference_takes_nothing() -> None:
    config = configuration.load(None, {"dtype": "bfloat16", "kl_coef": 0.1, "lora_rank": 1})
    found = estimate(SHAPES._replace(num_trained=10), config, "cpu").trainer
    assert [found[name] for name in ("weights", "float32 masters", "gradients", "moments", "reference")] == [2020, 0, 40, 80, 0]
    assert found["loss"] == 62_000_000  # the head is frozen


def test_the_weights_of_adapters_are_those_that_peft_makes() -> None:
    settings = configuration.load(None, {"lora_rank": 3}).model
    module = adapters.adapted(models.without_weights("tiny"), settings)
    assert Shapes.of(module).num_trained == Shapes.of(module).adapter_weights(3) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(dtype: str, checkpointing: bool) -> None:
    """Of four layers: the difference of six and two. Attention also keeps a normalizer for each head."""
    few, many = (make_model("llama", num_hidden_layers=n) for n in (2, 6))
    batch = collate(GROUPS, 0)
    for model in (few, many):
        model.module.to(getattr(torch, dtype))
        if checkpointing:
            model.checkpoint_layers()
    kept = (kept_bytes(many, batch)[1] - kept_bytes(few, batch)[1]) / 4 / batch.input_ids.numel()
    shapes = Shapes.of(many.module)
    expected = shapes.width * (4 if dtype == "float32" else 2) if checkpointing else shapes.layer_bytes(dtype)
    assert kept == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 8, "vocab_size": 10, "num_hidden_layers": 2}, (80, 2, 8, 0, 0, 32)),
        (
            {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10, "num_hidden_layers": 2, "intermediate_size": [5, 7]},
            (80, 2, 8, 8, 8, 7),
        ),
        ({"n_embd": 8}, (0, 0, 0, 0, 0, 0)),
    ],
    ids=["no heads", "layers that differ", "other names"],
)
def test_any_configuration_has_shapes(config: dict[str, Any], expected: tuple[int, ...]) -> None:
    module: Any = torch.nn.Linear(2, 3, bias=False)
    module.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))
    assert Shapes.of(module) == Shapes(6, 6, *expected)
    assert estimate(Shapes.of(module), configuration.load(None, {"dtype": "float32"}), "cpu").total > 0


def test_each_saver_saves() -> None:
    plain, shorter, checkpointed = (parts(**o)["activations"] for o in ({}, {"tokens_per_pass": 1024}, {"gradient_checkpointing": True}))
    assert shorter < 0.6 * plain
    assert checkpointed < plain


def test_the_engine_counts_where_it_shares_the_memory() -> None:
    config = configuration.load(None, {"dtype": "bfloat16", "max_num_seqs": 10, "max_model_len": 100, "memory_fraction": 0.5})
    engines = {name: estimate(SHAPES, config, "cpu", engine=name).engine for name in ("transformers", "vllm", "openai", "ray")}
    assert [*engines["transformers"].values()] == [10 * 100 * 2 * 2 * 4 * 2]
    assert [*engines["vllm"].values()] == [2000 + (512 << 20)]
    assert engines["openai"] == engines["ray"] == {}
    assert [*estimate(SHAPES, config, "cuda", engine="vllm", gpu_bytes=1000).engine.values()] == [500]


def test_the_command_line_prints_it_without_loading_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "load", None)
    assert cli.main(["train", "--model", "tiny", "--dtype", "float32", "--device", "cpu", "--engine", "transformers", "--estimate"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"memory: the trainer takes about [\d.]+ GB \(.*activations [\d.]+ · loss .*\); the engine's cache takes.* GB", line
    )


# -------------------- no memory


def allocate_too_much(*_: Any) -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def test_what_is_a_failed_allocation() -> None:
    with pytest.raises(RuntimeError) as error:
        allocate_too_much()
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_pass_that_does_not_fit_ends_in_one_line_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(name: str, *, resume: bool, **overrides: Any) -> Path:
        trainer = toy_trainer(toy_config(tmp_path / name, dtype="float32", **overrides), tmp_path / name, resume=resume)
        try:
            trainer.run()
        finally:
            trainer.parts.store.close()
        return tmp_path / name

    whole = finished("whole", resume=False)
    calls: list[int] = []
    accumulate = MasterAdamW.accumulate

    def failing(self: MasterAdamW) -> None:
        calls.append(1)
        if len(calls) == 12:
            allocate_too_much()
        accumulate(self)

    monkeypatch.setattr(MasterAdamW, "accumulate", failing)
    with pytest.raises(InputError) as error:
        finished("run", resume=False)
    said = str(error.value)
    assert said.startswith("memory: a training pass does not fit (another 1152921504.61 GB could not be had); memory: the trainer takes ")
    assert "; less memory; what is scored is kept: resume with --tokens-per-pass 12 (" in said
    assert "begin a new run with --moments bfloat16 (" in said
    assert "\n" not in said
    monkeypatch.undo()
    before = submitted(tmp_path / "run")
    out = finished("run", resume=True, tokens_per_pass=12)
    assert pools(out) == pools(whole)
    for mine, other in zip(trained(out), trained(whole), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    for name, x in saved_weights(whole).items():
        torch.testing.assert_close(saved_weights(out)[name], x, rtol=0, atol=1e-5)
    steps = [line.split()[0] for line in submitted(out)[len(before) :]]
    assert not {"1", before[-1].split()[0]} & set(steps)  # the step that failed had been sampled and journaled


def test_other_errors_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(toy_config(tmp_path / "run"), tmp_path / "run", resume=False)

    def wrong(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(MasterAdamW, "accumulate", wrong)
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        trainer.run()
    trainer.parts.store.close()


def test_the_remedies_are_those_that_save_most() -> None:
    module, cpu = make_model("llama").module, torch.device("cpu")

    def said(**overrides: Any) -> list[str]:
        config = configuration.load(None, {"dtype": "float32", **overrides})
        return remedies(module, config, cpu, estimate(Shapes.of(module), config, "cpu"))

    free, new = said()
    assert re.match(r"resume with --(tokens-per-pass 1024|gradient-checkpointing true) \([\d.]+ GB less\) or --", free)
    assert re.match(r"begin a new run with --(moments bfloat16|lora-rank 16) \([\d.]+ GB less\)", new)
    adapted = {"gradient_checkpointing": True, "moments": "bfloat16", "lora_rank": 4}
    assert said(**adapted) == [f"resume with --tokens-per-pass 1024 ({_half(module)} GB less)"]
    assert said(**adapted, tokens_per_pass=1) == []


def _half(module: Any) -> str:
    def total(tokens: int) -> int:
        values = {"dtype": "float32", "gradient_checkpointing": True, "moments": "bfloat16", "lora_rank": 4, "tokens_per_pass": tokens}
        return estimate(Shapes.of(module), configuration.load(None, values), "cpu").total

    return f"{(total(2048) - total(1024)) / 1e9:.2f}"


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: allocate_too_much())
    message = r"^memory: the weights of large in float32 do not fit into the memory of the cpu; more memory; .*train --estimate says"
    with pytest.raises(InputError, match=message):
        models.load("large", "float32", torch.device("cpu"))
