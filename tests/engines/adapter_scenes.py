"""Do adapters arrive? What every engine samples after each sync, beside the trained model with its adapters on: played, then judged.

The trained model is float32 and decodes greedily, so that an engine must say the same tokens, and their logprobs to 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import engine_scenes as scenes
import torch
from torch import Tensor

from reinforce_ada.config import ModelConfig
from reinforce_ada.training import adapters, models
from reinforce_ada.types import Completion, CompletionId, Request

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_SYNCS = 20
LARGE, SMALL = 0.15, 0.05  # of the numbers in A and B
REQUESTS = scenes.make_requests(scenes.make_prompts())[::8]  # three prompts; the last two share a prefix that is cached


def adapted(model: str, dtype: str = "float32") -> adapters.AdaptedModel:
    loaded = models.load(model, dtype, torch.device("cpu"))
    scenes.spread(loaded.module)
    return adapters.add(loaded, ModelConfig(lora_rank=4), seed=0)


@torch.no_grad()
def draw(model: adapters.AdaptedModel, seed: int, scale: float, only: Sequence[str] = MODULES) -> None:
    """Random adapters in these modules, in every layer; nothing in the others."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.causal_lm.named_parameters():
        if p.requires_grad:
            p.copy_(scale * torch.randn(p.shape, generator=generator) * (module_of(name) in only))


def module_of(name: str) -> str:
    """q_proj of model.layers.0.self_attn.q_proj.lora_A.default.weight, and of its weight."""
    return next((module for module in MODULES if f".{module}." in name), "")


def forgetful(model: adapters.AdaptedModel, forgotten: str) -> Iterator[tuple[str, Tensor]]:
    """What a sync sends that leaves out the adapters of one module."""
    loaded = {name.replace(".base_layer.", "."): tensor for name, tensor in model.causal_lm.state_dict().items()}
    return ((name, loaded[name] if module_of(name) == forgotten else tensor) for name, tensor in model.named_tensors())


def sampled(
    engine: Any, model: adapters.AdaptedModel, version: int, tensors: Any = None, settle: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """A sync, and how far what the engine then samples is from the trained model; and that from the model without adapters."""
    engine.sync_weights(model.named_tensors() if tensors is None else tensors, version)
    settle()
    requests: list[Request] = [replace(r, policy_version=version) for r in REQUESTS]
    done = scenes.sample(engine, requests)
    wrong, diff = compared(model, requests, done)
    with model.module.disable_adapter():
        _, effect = compared(model, requests, done)
    return {
        "wrong": wrong,
        "diff": diff,
        "effect": effect,
        "tokens": scenes.tokens(done),
        "versions": sorted({c.policy_version for c in done.values()}),
    }


def compared(model: adapters.AdaptedModel, requests: Sequence[Request], done: dict[CompletionId, Completion]) -> tuple[int, float]:
    """How many tokens are not the model's argmax, and the largest difference of a logprob from the model's."""
    wrong, diff = 0, 0.0
    for r in requests:
        ids, logprobs = (torch.from_numpy(x) for x in (done[r.id].token_ids, done[r.id].rollout_logprobs))
        truth = scenes.logits_of(model.causal_lm, r.prompt.token_ids, ids.tolist()).float().log_softmax(-1)
        wrong += int((truth.argmax(-1) != ids).sum())
        diff = max(diff, float((truth[range(len(ids)), ids.long()] - logprobs).abs().max()))
    return wrong, diff


def play(engine: Any, model: adapters.AdaptedModel, *, can_forget: bool = True, settle: Callable[[], Any] = lambda: None) -> dict[str, Any]:
    """Facts about a greedy engine: many syncs, each module's adapters alone, and syncs that forget one module.

    `settle` waits until every replica has the weights, so that all of them take part.
    """
    facts: dict[str, Any] = {"syncs": [], "alone": {}, "forgotten": {}}
    version = 0
    for version in range(1, NUM_SYNCS + 1):
        draw(model, version, LARGE if version % 2 else SMALL)
        facts["syncs"].append(sampled(engine, model, version, settle=settle))
    for module in MODULES:
        version += 1
        draw(model, version, LARGE, only=[module])
        facts["alone"][module] = sampled(engine, model, version, settle=settle)
    draw(model, version, LARGE)
    for module in MODULES if can_forget else ():
        version += 1
        facts["forgotten"][module] = sampled(engine, model, version, forgetful(model, module), settle)
    return facts


def arrived(sync: dict[str, Any]) -> bool:
    """The engine samples what the trained model would, and that is not what the model without adapters would."""
    return sync["wrong"] == 0 and sync["diff"] < 1e-4 and sync["effect"] > 1e-2


def check(facts: dict[str, Any]) -> None:
    """Holds the facts to the claim, and the claim to its mutants: the same judgement must refuse a sync that forgets a module."""
    assert len(facts["syncs"]) == NUM_SYNCS
    assert [v for sync in facts["syncs"] for v in sync["versions"]] == list(range(1, NUM_SYNCS + 1))
    assert [sync for sync in facts["syncs"] if not arrived(sync)] == []
    assert len({str(sync["tokens"]) for sync in facts["syncs"]}) > NUM_SYNCS // 2  # small adapters may say the same
    assert {module: sync for module, sync in facts["alone"].items() if not arrived(sync)} == {}
    assert list(facts["alone"]) == list(MODULES)
    assert [module for module, sync in facts["forgotten"].items() if arrived(sync)] == []
