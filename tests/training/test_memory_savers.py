"""What saves memory changes no result beyond what it says: checkpointed layers, moments in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_language_model import GROUPS, SAMPLES, TEMPERATURE, assert_same_gradients, gradients, make_model
from torch import Tensor, nn
from toy_runs import Runner, pools, trained
from toy_training import saved_weights, toy_config

from reinforce_ada.engines.transformers import TransformersEngine
from reinforce_ada.errors import InputError
from reinforce_ada.training.batching import Batch, collate
from reinforce_ada.training.language_model import HuggingFaceModel, token_logprobs
from reinforce_ada.training.models import tiny_tokenizer
from reinforce_ada.training.moments import rounded
from reinforce_ada.training.optimizer import MasterAdamW
from reinforce_ada.training.trainer import compared, fingerprint
from reinforce_ada.types import CompletionId, Request

SHARED = collate(GROUPS, 0)


# -------------------- checkpointed layers


def dropping_model() -> HuggingFaceModel:
    """OPT, whose layers call dropout themselves, with a probability of one half."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "opt", vocab_size=384, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, dropout=0.5, attention_dropout=0.5, layerdrop=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return HuggingFaceModel(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval(), tiny_tokenizer())


def kept_bytes(model: HuggingFaceModel, batch: Batch) -> tuple[Tensor, int]:
    """The logprobs, and the bytes that autograd keeps for their backward beside the weights."""
    own = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logprobs = token_logprobs(model, batch, TEMPERATURE)
    return logprobs, sum(kept.values())


MODELS = {"llama": lambda: make_model("llama"), "gemma2": lambda: make_model("gemma2"), "opt": dropping_model}


@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_layers_give_the_same_gradient_from_fewer_bytes(name: str) -> None:
    model = MODELS[name]()
    model.share_prompts = name != "opt"  # it counts positions by itself
    batch = SHARED if model.share_prompts else collate([[s] for s in SAMPLES], 0)
    weights = torch.linspace(-1, 1, batch.num_written)
    plain, before = kept_bytes(model, batch)
    expected = gradients(model, (plain * weights).sum())
    model.checkpoint_layers()
    got, after = kept_bytes(model, batch)
    assert torch.equal(got, plain)
    assert_same_gradients(gradients(model, (got * weights).sum()), expected, 1e-6)
    assert after < 0.7 * before
    assert not any(m.training for m in model.module.modules())


def test_checkpointed_layers_and_adapters_on_frozen_weights() -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model("llama")
    model.module = get_peft_model(model.module, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    model.use_head = False
    weights = torch.linspace(-1, 1, SHARED.num_written)
    expected = gradients(model, (token_logprobs(model, SHARED, TEMPERATURE) * weights).sum())
    assert all("lora" in name for name in expected)
    model.checkpoint_layers()
    got = gradients(model, (token_logprobs(model, SHARED, TEMPERATURE) * weights).sum())
    assert_same_gradients(got, expected, 1e-6)


def test_an_engine_that_shares_the_module_keeps_its_cache() -> None:
    def sampled(model: HuggingFaceModel) -> list[list[int]]:
        engine = TransformersEngine(model.module, model.tokenizer, max_tokens=6)
        engine.submit([Request(CompletionId(1, s.prompt.prompt_id, i), s.prompt, i, 0) for i, s in enumerate(SAMPLES)])
        done: dict[int, list[int]] = {}
        while len(done) < len(SAMPLES):
            done |= {c.id.index: c.token_ids.tolist() for c in engine.poll()}
            cache = engine._cache
            assert cache is None or cache.get_seq_length() > 0
        return [done[i] for i in range(len(SAMPLES))]

    model = make_model("llama")
    before = sampled(model)
    model.checkpoint_layers()
    gradients(model, token_logprobs(model, SHARED, TEMPERATURE).sum())
    assert sampled(model) == before


def test_a_model_that_cannot_checkpoint_is_refused_in_one_line() -> None:
    model = make_model("llama")
    type(model.module).supports_gradient_checkpointing = False
    try:
        with pytest.raises(InputError, match=r"^train: gradient_checkpointing with LlamaForCausalLM, .*; --gradient-checkpointing false$"):
            model.checkpoint_layers()
    finally:
        type(model.module).supports_gradient_checkpointing = True


def test_a_resumed_run_may_checkpoint_layers_and_not_change_its_moments(tmp_path: Path) -> None:
    plain = fingerprint(toy_config(tmp_path))
    assert fingerprint(toy_config(tmp_path, gradient_checkpointing=True, tokens_per_pass=7)) == plain
    assert fingerprint(toy_config(tmp_path, moments="bfloat16")) != plain
    earlier = {**plain, "training": {k: v for k, v in plain["training"].items() if k not in ("moments", "kl_coef", "kl_estimator")}}
    assert compared(earlier) == plain


# -------------------- moments in bfloat16


def test_rounding_is_to_a_neighbour_and_right_in_the_mean() -> None:
    noise = torch.arange(1 << 16, dtype=torch.int32)
    for x in (1.0, 1.0 + 2**-12, -3.3e-5, 7e-39, 2.9e38, 0.0):
        value = torch.full(noise.shape, x)
        got = rounded(value, noise).double()
        assert torch.equal(got.float().bfloat16().double(), got)
        low, high = sorted({*got.tolist()})[0], sorted({*got.tolist()})[-1]
        assert low <= float(value[0]) <= high
        assert high - low <= 2**-7 * abs(float(value[0])) + 1e-40
        assert float(got.mean()) == pytest.approx(float(value[0]), rel=1e-6, abs=1e-44)


def pair(dtype: torch.dtype = torch.float32) -> tuple[tuple[nn.Parameter, MasterAdamW], ...]:
    """The same weights with moments in float32 and in bfloat16."""
    made = []
    for moments in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.zeros(64, 50, dtype=dtype))
        made.append((p, MasterAdamW([("w", p)], weight_decay=0.01, max_grad_norm=1e9, moments=moments)))
    return tuple(made)


def test_moments_in_bfloat16_follow_those_in_float32() -> None:
    """Over 1500 steps, the last 500 of them with gradients of a tenth: to the nearest, the second moment would stay where it was."""
    (_, exact), (_, compact) = optimizers = pair()
    generator = torch.Generator().manual_seed(0)
    for step in range(1500):
        grad = torch.randn(64, 50, generator=generator) * (1.0 if step < 1000 else 0.1)
        for p, optimizer in optimizers:
            p.grad = grad.clone()
            optimizer.step(1e-3)
        if step in (999, 1499):
            ratio = compact.tensors()["exp_avg_sq/w"].double() / exact.tensors()["exp_avg_sq/w"].double()
            assert float(ratio.mean()) == pytest.approx(1, abs=0.005)
            assert 0.01 < float(ratio.std()) < 0.07
    moved = [optimizer.tensors()["master/w"].double() for _, optimizer in optimizers]
    assert float((moved[1] - moved[0]).norm() / moved[0].norm()) < 0.02


def test_they_resume_to_the_bit_and_no_others_are_taken() -> None:
    (p, exact), (q, compact) = pair(torch.bfloat16)
    for step in range(3):
        for parameter, optimizer in ((p, exact), (q, compact)):
            parameter.grad = torch.full((64, 50), 0.1 * (step + 1), dtype=torch.bfloat16)
            optimizer.accumulate()
            optimizer.step(1e-3)
    saved = {name: x.clone() for name, x in compact.tensors().items()}
    assert {str(saved[f"{key}/w"].dtype) for key in ("exp_avg", "exp_avg_sq")} == {"torch.bfloat16"}
    (_, other), (r, again) = pair(torch.bfloat16)
    assert again.misfit(saved) == ""
    assert other.misfit(saved) == "exp_avg/w is [64, 50] bfloat16, not [64, 50] float32"
    assert again.misfit(exact.tensors()) == "exp_avg/w is [64, 50] float32, not [64, 50] bfloat16"
    again.load(saved)
    for parameter, optimizer in ((q, compact), (r, again)):
        parameter.grad = torch.full((64, 50), 0.3, dtype=torch.bfloat16)
        optimizer.accumulate()
        optimizer.step(1e-3)
    assert all(torch.equal(x, again.tensors()[name]) for name, x in compact.tensors().items())


def test_a_run_with_compact_moments_is_killed_and_resumed(toy_run: Runner, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert toy_run(whole, moments="bfloat16") == 0
    assert toy_run(out, kill=("between two minibatches", 7), moments="bfloat16") == -9
    assert toy_run(out, resume=True, moments="bfloat16") == 0
    assert (pools(out), trained(out)) == (pools(whole), trained(whole))
    assert all(torch.equal(x, saved_weights(out)[name]) for name, x in saved_weights(whole).items())
