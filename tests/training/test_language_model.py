"""Hidden states, heads and shared rows against the model's own logits on plain padded rows, forward and backward."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reinforce_ada import config as configuration
from reinforce_ada.training.batching import Batch, Sample, collate, micro_batches
from reinforce_ada.training.language_model import HuggingFaceModel, OutputHead, check_forms, token_logprobs
from reinforce_ada.training.loss import RunLoss
from reinforce_ada.training.models import tiny_config, tiny_tokenizer
from reinforce_ada.types import Completion, CompletionId, Prompt

TEMPERATURE = 0.7
TYPES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "cohere", "granite"]


def make_model(model_type: str, **settings: Any) -> HuggingFaceModel:
    """A tiny model with logits far from uniform: several nats of logprob, and past the cap of gemma2."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    if model_type == "gemma2":
        config.final_logit_softcapping = 1.0
    if model_type == "gemma3_text":
        config.layer_types = ["sliding_attention", "full_attention"]
    if model_type == "granite":
        config.logits_scaling = 0.25
    if model_type == "cohere":
        config.logit_scale = 2.5
    for name, value in settings.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    return HuggingFaceModel(module, tiny_tokenizer())


def make_groups() -> list[list[Sample]]:
    """Three prompts of different lengths with completions of different lengths, one of a single token."""
    rng = np.random.default_rng(0)
    groups = []
    for p, (size, lengths) in enumerate([(9, (4, 1, 6)), (3, (2, 5)), (14, (3, 3, 2, 4))]):
        prompt = Prompt(f"p{p}", tuple(rng.integers(3, 384, size).tolist()))
        completions = [
            Completion(CompletionId(1, f"p{p}", k), rng.integers(3, 384, n), rng.normal(-5, 0.1, n), "", "stop", 0)
            for k, n in enumerate(lengths)
        ]
        groups.append([Sample(prompt, c, float(rng.normal())) for c in completions])
    return groups


GROUPS = make_groups()
SAMPLES = [s for group in GROUPS for s in group]
PLAIN = collate([[s] for s in SAMPLES], pad_id=0)
SHARED = collate(GROUPS, pad_id=0)


def own_logprobs(model: HuggingFaceModel, samples: list[Sample]) -> Tensor:
    """Plain PyTorch on the model's logits, one unpadded row per completion, [T]."""
    parts = []
    for s in samples:
        prompt, ids = s.prompt.token_ids, s.completion.token_ids.tolist()
        logits = model.module(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        parts.append((logits / TEMPERATURE).log_softmax(-1)[range(len(ids)), ids])
    return torch.cat(parts)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "mistral"])
def test_shared_rows_keep_a_sliding_window(model_type: str) -> None:
    """One of both layers of gemma2 and gemma3, and every one of mistral slides; some prompts are longer than the window, some shorter."""
    model = make_model(model_type, sliding_window=5)
    truth = own_logprobs(model, SAMPLES)
    assert (truth - own_logprobs(make_model(model_type, sliding_window=4096), SAMPLES)).abs().max() > 0.01
    got = token_logprobs(model, SHARED, TEMPERATURE)
    torch.testing.assert_close(got, truth, atol=1e-5, rtol=1e-5)


def gradients(model: HuggingFaceModel, value: Tensor) -> dict[str, Tensor]:
    model.module.zero_grad()
    torch.autograd.backward(value)
    return {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == truth.keys()
    scale = max(float(g.abs().max()) for g in truth.values())
    assert scale > 0
    for name, expected in truth.items():
        assert float((got[name] - expected).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("model_type", TYPES)
def test_both_forms_fit(model_type: str) -> None:
    model = make_model(model_type)
    head, rows = check_forms(model, PLAIN, SHARED, TEMPERATURE)
    assert (head.ok, rows.ok, model.use_head, model.share_prompts) == (True, True, True, True)
    assert max(head.max_diff, rows.max_diff) < 1e-4
    truth = own_logprobs(model, SAMPLES).detach()
    assert float(truth.std()) > 0.3  # or nothing is compared
    assert float((token_logprobs(model, SHARED, TEMPERATURE).detach() - truth).abs().max()) < 1e-4


def test_the_cap_and_the_scales_matter() -> None:
    """What test_both_forms_fit compares would differ by far without them."""
    for model_type, field in [("gemma2", "soft_cap"), ("cohere", "logit_scale"), ("granite", "logit_scale")]:
        model = make_model(model_type)
        head = model.head()
        assert getattr(head, field) == {"gemma2": 1.0, "cohere": 2.5, "granite": 4.0}[model_type]
        truth = own_logprobs(model, SAMPLES)
        model.head = partial(OutputHead, head.weight, None)  # type: ignore[method-assign]
        assert float((token_logprobs(model, SHARED, TEMPERATURE) - truth).detach().abs().max()) > 0.1, model_type


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_shared_rows_give_the_logprobs_and_gradients_of_separate_ones(model_type: str) -> None:
    model = make_model(model_type)
    weights = torch.linspace(-1, 1, SHARED.num_written)
    truth = own_logprobs(model, SAMPLES)
    expected = gradients(model, (truth * weights).sum())
    got = token_logprobs(model, SHARED, TEMPERATURE)
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, (got * weights).sum()), expected, 1e-5)
    model.share_prompts = False
    got = token_logprobs(model, PLAIN, TEMPERATURE)
    assert_same_gradients(gradients(model, (got * weights).sum()), expected, 1e-5)


def with_strange_head(model: HuggingFaceModel) -> None:
    """Logits of the module are transformed in a way no configuration key tells of."""
    forward = model.module.forward

    def strange(self: Any, **kwargs: Any) -> Any:
        out = forward(**kwargs)
        out.logits = out.logits + 0.5 * torch.sin(out.logits)
        return out

    model.module.forward = types.MethodType(strange, model.module)


def with_deaf_attention(model: HuggingFaceModel) -> None:
    """The decoder reads a 4D mask as if it only said which tokens are padding."""
    forward = model.module.base_model.forward

    def deaf(self: Any, **kwargs: Any) -> Any:
        if kwargs["attention_mask"] is not None and kwargs["attention_mask"].ndim == 4:
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        return forward(**kwargs)

    model.module.base_model.forward = types.MethodType(deaf, model.module.base_model)


@pytest.mark.parametrize(("spoil", "use_head", "share_prompts"), [(with_strange_head, False, True), (with_deaf_attention, True, False)])
def test_a_form_that_does_not_fit_is_not_used(spoil: Callable[[HuggingFaceModel], None], use_head: bool, share_prompts: bool) -> None:
    model = make_model("llama")
    spoil(model)
    head, rows = check_forms(model, PLAIN, SHARED, TEMPERATURE)
    assert (model.use_head, model.share_prompts) == (head.ok, rows.ok) == (use_head, share_prompts)
    assert (head.max_diff if not use_head else rows.max_diff) > 0.1
    batch = SHARED if share_prompts else PLAIN
    torch.testing.assert_close(token_logprobs(model, batch, TEMPERATURE), own_logprobs(model, SAMPLES), rtol=0, atol=1e-4)


def reinforce_loss(model: HuggingFaceModel, samples: list[Sample]) -> Tensor:
    """-sum A log pi / T over the T tokens that the policy wrote, one row for each completion."""
    masks = [np.ones(s.completion.token_ids.size) if s.completion.token_mask is None else s.completion.token_mask for s in samples]
    factors = torch.cat([torch.as_tensor(mask * s.advantage) for mask, s in zip(masks, samples, strict=True)]).float()
    return -(factors * own_logprobs(model, samples)).sum() / sum(mask.sum() for mask in masks)


def loss_value(model: HuggingFaceModel, batches: list[Batch]) -> Tensor:
    num_written, num_seqs = sum(b.num_written for b in batches), sum(b.num_seqs for b in batches)
    config = configuration.load(None, {"temperature": TEMPERATURE, "loss": "reinforce"})
    loss = RunLoss.from_config(config)
    values = [loss(model, b, None, num_written, num_seqs)[0] for b in batches]
    return torch.stack(values).sum()


@pytest.mark.parametrize("tokens_per_pass", [1, 40, 10_000])
@pytest.mark.parametrize("spoil", [None, with_strange_head, with_deaf_attention])
def test_the_loss_has_the_gradient_of_the_plain_loss(spoil: Callable[[HuggingFaceModel], None] | None, tokens_per_pass: int) -> None:
    model = make_model("llama")
    if spoil is not None:
        spoil(model)
    check_forms(model, PLAIN, SHARED, TEMPERATURE)
    truth = reinforce_loss(model, SAMPLES)
    expected = gradients(model, truth)
    batches = list(micro_batches(SAMPLES, tokens_per_pass, share_prompts=model.share_prompts, pad_id=0))
    value = loss_value(model, batches)
    assert float(value.detach()) == pytest.approx(float(truth.detach()), abs=1e-4)
    assert_same_gradients(gradients(model, value), expected, 2e-5)


def with_tools(sample: Sample, rng: np.random.Generator) -> Sample:
    """Some tokens are a tool's, for which the engine gave no logprob; at least one is the policy's."""
    ids = sample.completion.token_ids
    mask = rng.random(ids.size) < 0.5
    mask[rng.integers(ids.size)] = True
    logprobs = np.where(mask, sample.completion.rollout_logprobs, np.nan)
    return sample._replace(completion=replace(sample.completion, rollout_logprobs=logprobs, token_mask=mask))


@pytest.mark.parametrize("use_head", [True, False])
def test_tokens_that_the_policy_did_not_write_are_context_and_train_nothing(use_head: bool) -> None:
    model, rng = make_model("llama"), np.random.default_rng(1)
    if not use_head:
        with_strange_head(model)
    check_forms(model, PLAIN, SHARED, TEMPERATURE)
    samples = [with_tools(s, rng) for s in SAMPLES]
    truth = reinforce_loss(model, samples)
    expected = gradients(model, truth)
    value = loss_value(model, list(micro_batches(samples, 40, share_prompts=True, pad_id=0)))
    assert float(value.detach()) == pytest.approx(float(truth.detach()), abs=1e-4)
    assert_same_gradients(gradients(model, value), expected, 2e-5)
