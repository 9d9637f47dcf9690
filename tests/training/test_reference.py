"""The KL to the model before the first step: its loss and gradient, its place in a run, and what it costs when it is off."""

from __future__ import annotations

import copy
import dataclasses
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_language_model import GROUPS, SAMPLES, TEMPERATURE, assert_same_gradients, gradients, make_model, with_tools
from toy_runs import Runner, evaluations, pools, trained
from toy_training import ToyModel, saved_weights, toy_config, toy_trainer

from reinforce_ada import config as configuration
from reinforce_ada.config import TrainingConfig
from reinforce_ada.ops.policy_loss.settings import KL_ESTIMATORS
from reinforce_ada.sampling import configured
from reinforce_ada.training.batching import Sample, collate, micro_batches
from reinforce_ada.training.distributed import Ranks
from reinforce_ada.training.language_model import HuggingFaceModel, token_logprobs
from reinforce_ada.training.learner import Learner
from reinforce_ada.training.log import read_log
from reinforce_ada.training.loss import RunLoss, inexact
from reinforce_ada.training.reference import ReferencePolicy
from reinforce_ada.types import Pool, SamplingResult, Scored

KL = {"kl_coef": 0.5, "kl_estimator": "k3"}


def drifted(model: HuggingFaceModel, scale: float = 0.02) -> HuggingFaceModel:
    """The model some updates later."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.module.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return model


# -------------------- loss and gradient


def estimate(x: torch.Tensor, name: str) -> torch.Tensor:
    """The estimate of each token's KL from x = log pi - log pi_ref, in plain PyTorch."""
    values = {"k1": x, "abs": x.abs(), "k2": x.square() / 2, "k3": (-x).exp() - 1 + x}
    value = values[name.rstrip("+")]
    return values["k2"] + (value - values["k2"]).detach() if name.endswith("+") else value


def true_loss(model: HuggingFaceModel, base: HuggingFaceModel, samples: list[Sample], kl: str, coefficient: float) -> Any:
    """(loss, mean KL): means of -A log pi + coefficient KL over the tokens that the policy wrote, in float64."""
    losses, divergences = [], []
    for s in samples:
        prompt, ids = s.prompt.token_ids, s.completion.token_ids.tolist()
        written = torch.ones(len(ids)) if s.completion.token_mask is None else torch.tensor(s.completion.token_mask)
        scores = []
        for m in (model, base):
            logits = m.module(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            assert logits.dtype == torch.float64
            scores.append((logits / TEMPERATURE).log_softmax(-1)[range(len(ids)), ids][written.bool()])
        divergence = estimate(scores[0] - scores[1].detach(), kl)
        losses.append(-s.advantage * scores[0])
        divergences.append(divergence)
    policy_part, divergence = torch.cat(losses).mean(), torch.cat(divergences).mean()
    return policy_part + coefficient * divergence, float(divergence.detach())


def double(model: HuggingFaceModel) -> HuggingFaceModel:
    return HuggingFaceModel(copy.deepcopy(model.module).double(), model.tokenizer)


FORMS = [*((kl, "shared rows") for kl in KL_ESTIMATORS), ("k3", "separate rows"), ("k2", "logits"), ("k3+", "custom loss")]


@pytest.mark.parametrize(("kl", "form"), FORMS)
def test_loss_and_gradient_are_those_of_float64(kl: str, form: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def reinforce(x, old, adv, mask):\n    return -adv * x\n")
    model, rng = make_model("llama"), np.random.default_rng(1)
    base, reference = double(model), ReferencePolicy(model)
    drifted(model)
    model.use_head, model.share_prompts = form != "logits", form != "separate rows"
    samples = [with_tools(s, rng) if i % 2 else s for i, s in enumerate(SAMPLES)]
    named = f"{tmp_path}/own.py:reinforce" if form == "custom loss" else "reinforce"
    config = configuration.load(None, {"temperature": TEMPERATURE, "loss": named, "kl_coef": 0.7, "kl_estimator": kl})
    loss = RunLoss.from_config(config)
    batches = [reference.scored(b, TEMPERATURE) for b in micro_batches(samples, 40, share_prompts=model.share_prompts, pad_id=0)]
    num_tokens = sum(b.num_written for b in batches)
    found = [loss(model, b, None, num_tokens, len(samples)) for b in batches]
    value = torch.stack([value for value, _ in found]).sum()

    truth = double(model)
    expected, divergence = true_loss(truth, base, samples, kl, 0.7)
    assert abs(divergence) > 0.01
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    measured = sum(float(m["kl"]) * b.num_written for (_, m), b in zip(found, batches, strict=True)) / num_tokens
    assert measured == pytest.approx(divergence, rel=1e-3)
    right = gradients(truth, expected)
    without = gradients(truth, true_loss(truth, base, samples, kl, 0.0)[0])
    assert_same_gradients({name: g.double() for name, g in gradients(model, value).items()}, right, 5e-5)
    scale = max(float(g.abs().max()) for g in right.values())
    assert max(float((without[name] - g).abs().max()) for name, g in right.items()) > 0.01 * scale  # or nothing of the KL is compared


def test_the_estimators_are_those_of_the_operator() -> None:
    assert typing.get_args(typing.get_type_hints(TrainingConfig)["kl_estimator"]) == KL_ESTIMATORS


def test_without_a_coefficient_nothing_is_computed_and_nothing_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a copy")

    monkeypatch.setattr(copy, "deepcopy", refuse)
    model = ToyModel(torch.float32)
    learner = Learner(model, toy_config(tmp_path, kl_estimator="k1"), Ranks())
    (batch,) = learner._passes(GROUPS[0][:2])[:1]
    assert (learner.reference, learner.loss.kl, batch.ref_logprobs) == (None, None, None)
    with pytest.raises(AssertionError, match="a copy"):
        Learner(model, toy_config(tmp_path, **KL), Ranks())


# -------------------- adapters


def test_adapters_that_are_off_are_the_reference_without_a_copy() -> None:
    from peft import LoraConfig, get_peft_model

    model = make_model("llama")
    batch, base = collate(GROUPS, 0), ReferencePolicy(make_model("llama"))
    expected = base.scored(batch, TEMPERATURE).ref_logprobs
    model.module = get_peft_model(model.module, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.use_head = base._policy.use_head = False
    trainable = {name for name, p in model.module.named_parameters() if p.requires_grad}
    reference = ReferencePolicy(model)
    got = reference.scored(batch, TEMPERATURE).ref_logprobs
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert reference._model is model
    assert {name for name, p in model.module.named_parameters() if p.requires_grad} == trainable
    with torch.no_grad():
        assert (token_logprobs(model, batch, TEMPERATURE) - expected).abs().max() > 0.01


# -------------------- the run


def same_weights(a: Path, b: Path) -> bool:
    left, right = saved_weights(a), saved_weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def measured(out: Path, kind: str) -> list[tuple[int, float]]:
    return [(r["step"], r["kl"]) for r in read_log(out / "log.jsonl") if r["kind"] == kind]


@pytest.fixture(scope="module")
def undisturbed(toy_run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "undisturbed"
    assert toy_run(out, dtype="float32", **KL) == 0
    return out


def test_a_run_logs_its_kl_and_is_held_by_it(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    steps, evals = measured(undisturbed, "step"), measured(undisturbed, "eval")
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5]
    assert all(kl > 0 for _, kl in steps)  # with two minibatches a step: the second one has drifted
    assert evals[0] == (0, 0.0)
    assert [step for step, _ in evals] == [0, 2, 4, 5]
    assert all(kl > 0 for _, kl in evals[1:])
    assert all(r["kl_coef"] == 0.5 for r in read_log(undisturbed / "log.jsonl") if r["kind"] == "step")
    assert toy_run(tmp_path / "held", dtype="float32", **{**KL, "kl_coef": 50.0}) == 0
    assert toy_run(tmp_path / "free", dtype="float32") == 0
    assert measured(tmp_path / "held", "eval")[-1][1] < evals[-1][1]
    assert not same_weights(tmp_path / "free", undisturbed)
    assert not any("kl" in r or "kl_coef" in r for r in read_log(tmp_path / "free" / "log.jsonl"))


def test_the_evaluation_reports_the_kl_of_its_completions(tmp_path: Path) -> None:
    trainer = toy_trainer(toy_config(tmp_path / "run", dtype="float32", **KL), tmp_path / "run", resume=False)
    weights = {name: p.detach().clone().double() for name, p in trainer.parts.model.module.named_parameters()}
    trainer.run()
    after = {name: p.detach().double() for name, p in trainer.parts.model.module.named_parameters()}
    assert trainer.learner.reference is not None
    samples = [_of_toy(s, i) for i, s in enumerate(SAMPLES)]
    found = trainer.learner.kl(SamplingResult(tuple(map(_pool, samples)), (), {}))
    trainer.parts.store.close()
    x = []
    for s in samples:
        states = [s.prompt.token_ids[-1], *s.completion.token_ids.tolist()]
        for last, token in pairwise(states):
            scores = [
                (w["head.weight"] @ torch.tanh(w["embedding.weight"][last]) + w["head.bias"]).log_softmax(-1)[token]
                for w in (after, weights)
            ]
            x.append(float(scores[0] - scores[1]))
    expected = np.mean([np.exp(-d) - 1 + d for d in x])
    assert found == {"kl": pytest.approx(expected, rel=1e-3)}


def _of_toy(s: Sample, index: int) -> Sample:
    """The sample in the vocabulary of toys."""
    prompt = dataclasses.replace(s.prompt, token_ids=tuple(t % 32 for t in s.prompt.token_ids))
    return s._replace(prompt=prompt, completion=dataclasses.replace(s.completion, token_ids=(s.completion.token_ids + index) % 32))


def _pool(s: Sample) -> Pool:
    return Pool(s.prompt, (Scored(s.completion, 0.0),), 0, 1, 0, 0.0, 0.0, 0.0, 0.0, 1, "exhausted", 1)


@pytest.mark.parametrize(
    ("point", "n"),
    [("between two minibatches", 7), ("between log and checkpoint", 1), ("between checkpoint and next step", 1)],
)
def test_killed_and_resumed_the_reference_is_the_base_model(toy_run: Runner, undisturbed: Path, tmp_path: Path, point: str, n: int) -> None:
    out = tmp_path / "run"
    assert toy_run(out, kill=(point, n), dtype="float32", **KL) == -9
    assert toy_run(out, resume=True, dtype="float32", **KL) == 0
    assert same_weights(out, undisturbed)
    assert (pools(out), trained(out), evaluations(out)) == (pools(undisturbed), trained(undisturbed), evaluations(undisturbed))
    assert [measured(out, kind) for kind in ("step", "eval")] == [measured(undisturbed, kind) for kind in ("step", "eval")]


def test_two_ranks_are_one(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    assert toy_run.several(2, tmp_path / "two", dtype="float32", **KL) == [0, 0]
    assert pools(tmp_path / "two") == pools(undisturbed)
    for name, tensor in saved_weights(undisturbed).items():
        torch.testing.assert_close(saved_weights(tmp_path / "two")[name], tensor, rtol=0, atol=1e-5)
    for mine, other in zip(measured(tmp_path / "two", "step"), measured(undisturbed, "step"), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_a_predicted_baseline_and_a_kl(toy_run: Runner, tmp_path: Path) -> None:
    predicted = {"preset": "reinforce-ada-memory", "baseline": "predicted", "group_size": 2, "round_size": None, "max_rounds": None}
    assert toy_run(tmp_path / "run", dtype="float32", **predicted, **KL) == 0
    assert all(kl > 0 for _, kl in measured(tmp_path / "run", "step")[1:])
    assert toy_run(tmp_path / "free", dtype="float32", **predicted) == 0
    assert not same_weights(tmp_path / "run", tmp_path / "free")


def test_a_kl_keeps_objective_mean_from_being_exact(tmp_path: Path) -> None:
    config = toy_config(
        tmp_path, minibatches=1, preset="reinforce-ada-exact", max_grad_norm=1e6, loss_agg="seq-mean-token-sum", kl_coef=0.1
    )
    assert inexact(config, configured(config.sampling)) == (
        'objective "mean" is only approximate here: kl_coef 0.1 adds the KL to a reference as an objective of its own (kl_coef 0)'
    )
