"""The contract of the policy losses is said once: the operators' signatures, the header and torch's schema agree with it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reinforce_ada.ops import RolloutCorrection, linear_policy_loss, policy_loss
from reinforce_ada.ops._torch import parameters
from reinforce_ada.ops.policy_loss import METRICS, contract, settings
from reinforce_ada.ops.policy_loss.contract import NUMBERS, Inputs, Settings, by_name, numbers

HEADER = (Path(__file__).parents[2] / "csrc/ops/policy_loss/policy_loss.h").read_text()
OPERATORS: tuple[Callable[..., Any], ...] = (policy_loss, linear_policy_loss)
SETTINGS = {f.name: f.default for f in fields(Settings) if f.init and f.name != "advantages_per_token"}


def enum(name: str) -> list[str]:
    """The names of an enumeration of the header, in order."""
    body = re.search(rf"enum class {name} : [\w:]+ \{{(.*?)\}}", HEADER, re.DOTALL)
    assert body is not None
    return re.findall(r"\w+", re.sub(r"//[^\n]*", "", body[1]))


# -------------------- the header


def test_the_numbers_of_a_call_are_those_of_the_header() -> None:
    assert enum("Number") == [*NUMBERS, "count"]


def test_the_codes_are_those_of_the_header() -> None:
    assert enum("Loss") == list(settings.LOSSES)
    assert enum("LossAgg") == [name.replace("-", "_") for name in settings.LOSS_AGGS]
    assert enum("Kl") == [name for name in settings.KL_ESTIMATORS if not name.endswith("+")]
    corrections = [RolloutCorrection(level, mode) for level in settings.CORRECTION_LEVELS for mode in settings.CORRECTION_MODES]
    names = {by_name(numbers(Settings(rollout_correction=c))).correction: f"{c.level}_{c.mode}" for c in corrections}
    assert {0.0: "none", **names} == dict(enumerate(enum("Correction")))


def test_the_bounds_are_those_of_the_header() -> None:
    found = {name: float(value) for name, value in re.findall(r"(k[A-Z]\w+) = ([\d.]+)f", HEADER)}
    tau_positive, tau_other = settings.SAPO_TAU
    assert found == {
        "kSequenceLogRatioBound": settings.SEQUENCE_LOG_RATIO_BOUND,
        "kKlLogRatioBound": settings.KL_LOG_RATIO_BOUND,
        "kSapoTauPositive": tau_positive,
        "kSapoTauOther": tau_other,
    }
    assert f"metrics           [{len(METRICS)}]" in HEADER


# -------------------- the numbers

PLAIN = {
    "loss": 1, "sequence_ratio": 0, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": math.inf, "log_ratio_bound": 20.0, "loss_agg": 0,
    "num_tokens": 0, "num_seqs": 0, "norm_length": 0, "correction": 0, "correction_low": 0, "correction_high": 2.0, "correction_scale": 1.0,
    "allow_missing": 0, "kl": 0, "straight_through": 0, "kl_coef": 0, "kl_weighted": 0, "kl_bound": 10.0, "entropy_coef": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "changed"),
    [
        ({}, {}),
        ({"loss": "sapo", "ratio_level": "sequence"}, {"loss": 4, "sequence_ratio": 1}),
        ({"dual_clip": 3, "log_ratio_bound": None, "kl_bound": None}, {"dual_clip": 3, "log_ratio_bound": math.inf, "kl_bound": math.inf}),
        ({"loss_agg": "seq-mean-token-sum-norm", "norm_length": 7}, {"loss_agg": 3, "norm_length": 7}),
        ({"num_tokens_global": 0.5, "num_seqs_global": 2}, {"num_tokens": 0.5, "num_seqs": 2}),
        ({"kl": "k3+", "kl_coef": 0.1, "kl_weighting": "ratio"}, {"kl": 2, "straight_through": 1, "kl_coef": 0.1, "kl_weighted": 1}),
        (
            {"rollout_correction": RolloutCorrection("sequence", "mask", low=0.5, high=3, normalizer=4, allow_missing=True)},
            {"correction": 4, "correction_low": 0.5, "correction_high": 3, "correction_scale": 0.25, "allow_missing": 1},
        ),
    ],
)
def test_numbers(chosen: dict[str, Any], changed: dict[str, float]) -> None:
    found = numbers(Settings(**chosen))
    assert vars(by_name(found)) == {**PLAIN, **changed}
    assert {type(x) for x in found} == {float}


# -------------------- the operators


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_signature_has_every_setting_with_its_default(operator: Callable[..., Any]) -> None:
    parameters = inspect.signature(operator).parameters
    assert {name: parameters[name].default for name in SETTINGS} == SETTINGS
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in SETTINGS)


OTHER: dict[str, Any] = {
    "loss": "cispo", "ratio_level": "sequence", "clip_low": 0.125, "clip_high": 0.25, "dual_clip": 3.0, "log_ratio_bound": 5.0,
    "loss_agg": "seq-mean-token-sum", "num_tokens_global": 3.0, "num_seqs_global": 4.0, "norm_length": 5.0,
    "rollout_correction": RolloutCorrection(), "kl": "k1", "kl_coef": 0.5, "kl_weighting": "ratio", "kl_bound": 7.0, "entropy_coef": 0.75,
}  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_setting_reaches_the_forms(operator: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):  # noqa: N818
        pass

    def check(where: str, others: Any, *values: Any) -> None:
        raise Seen(Settings(*values))

    monkeypatch.setitem(operator.__globals__, "checked_settings", check)
    tokens = (torch.zeros(2, 3),) if operator is policy_loss else (torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3).long())
    assert OTHER.keys() == SETTINGS.keys()
    with pytest.raises(Seen) as seen:
        operator(*tokens, torch.zeros(2, 3), torch.ones(2, 3), **OTHER)
    assert seen.value.args[0] == Settings(**OTHER, advantages_per_token=True)


def test_the_schema() -> None:
    assert parameters(Inputs) == (
        "Tensor logprobs, Tensor advantages, Tensor mask, Tensor? old_logprobs, Tensor? rollout_logprobs, Tensor? ref_logprobs, "
        "Tensor? entropy, Tensor? cu_seqlens, bool advantages_per_token, bool entropy_grad, float[] numbers"
    )
    grad, grad_entropy = torch.zeros(1), torch.ones(1)
    saved = SimpleNamespace(saved_tensors=(grad, grad_entropy), wants_entropy=True)
    returned = Inputs(*contract._backward(saved, torch.ones(())))  # type: ignore[arg-type]
    assert (returned.logprobs is grad, returned.entropy is grad_entropy) == (True, True)
    assert sum(x is not None for x in returned) == 2
