"""top_p, top_k and min_p in a run: their ranges, what they do to an exact objective, and what they cannot go with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.sampling import configured
from reinforce_ada.training import launch, models
from reinforce_ada.training.log import read_log
from reinforce_ada.training.loss import RunLoss, inexact
from reinforce_ada.training.trainer import compared, fingerprint

EXACT = {"objective": "mean", "loss": "reinforce", "max_grad_norm": 1e6}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"top_p": "0"}, "config [sampling]: top_p = '0'; a number above 0 and up to 1"),
        ({"top_p": "1.01"}, "config [sampling]: top_p = '1.01'; a number above 0 and up to 1"),
        ({"top_p": "nan"}, "config [sampling]: top_p = 'nan'; a number above 0 and up to 1"),
        ({"top_k": "-1"}, "config [sampling]: top_k = '-1'; an integer from 0 to 10000000"),
        ({"top_k": "0.5"}, "config [sampling]: top_k = '0.5'; an integer from 0 to 10000000"),
        ({"min_p": "-0.1"}, "config [sampling]: min_p = '-0.1'; a number from 0 to 1"),
        ({"min_p": "2"}, "config [sampling]: min_p = '2'; a number from 0 to 1"),
    ],
)
def test_values_out_of_range(keys: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as error:
        configuration.load(None, keys)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("keys", "said"),
    [({}, ""), ({"top_p": 0.9}, "top_p 0.9"), ({"top_p": 0.95, "top_k": 20, "min_p": 0.05}, "min_p 0.05, top_k 20, top_p 0.95")],
)
def test_what_truncates(keys: dict[str, Any], said: str) -> None:
    assert configuration.load(None, keys).sampling.truncation == said


def test_a_truncated_distribution_is_said_to_make_objective_mean_inexact() -> None:
    plain = configuration.load(None, EXACT)
    assert inexact(plain, configured(plain.sampling)) == ""
    config = configuration.load(None, {**EXACT, "top_p": 0.9})
    assert inexact(config, configured(config.sampling)) == (
        'objective "mean" is only approximate here: top_p 0.9 samples from another distribution than the one whose gradient is taken '
        "(leave it out)"
    )


def test_a_rollout_correction_is_refused() -> None:
    keys = {"rollout_correction": "token-truncate", "top_k": 20}
    with pytest.raises(InputError, match=r"train: rollout_correction token-truncate with top_k 20; one of them: its weights would be"):
        RunLoss.from_config(configuration.load(None, keys))
    for key, value in (("top_k", 0), ("rollout_correction", "none")):
        RunLoss.from_config(configuration.load(None, {**keys, key: value}))


def test_a_run_of_before_these_keys_resumes_and_only_with_their_defaults() -> None:
    now = configuration.load(None, {})
    before = {section: dict(values) for section, values in fingerprint(now).items()}
    for key in ("top_p", "top_k", "min_p"):
        del before["sampling"][key]
    assert compared(before) == fingerprint(now)
    assert compared(before) != fingerprint(configuration.load(None, {"top_k": 20}))


def test_the_expected_gradient_of_a_truncated_policy_is_that_of_the_documentation() -> None:
    """One token, by enumeration in float64: E_q[(r - b) grad log p] = grad E_q[r] + (E_q[r] - b) grad log Z. Z is the mass of the kept
    tokens, of which it is the softmax; the first term is the gradient of the truncated policy's reward."""
    z, rewards, kept, baseline = np.array([0.3, -0.2, 1.1, 0.4]), np.array([1.0, 0.0, 0.2, 1.0]), [0, 2, 3], 0.25

    def expected_reward(z: Any) -> float:
        q = np.exp(z[kept]) / np.exp(z[kept]).sum()
        return float(q @ rewards[kept])

    def log_mass(z: Any) -> float:
        return float(np.log(np.exp(z[kept]).sum() / np.exp(z).sum()))

    def gradient(f: Any) -> Any:
        return np.array([(f(z + d) - f(z - d)) / 2e-6 for d in 1e-6 * np.eye(4)])

    p = np.exp(z) / np.exp(z).sum()
    q = p[kept] / p[kept].sum()
    taken = sum(share * (rewards[i] - baseline) * (np.eye(4)[i] - p) for share, i in zip(q, kept, strict=True))
    np.testing.assert_allclose(taken, gradient(expected_reward) + (expected_reward(z) - baseline) * gradient(log_mass), atol=1e-9)
    assert np.abs(taken - gradient(expected_reward)).max() > 0.01


def test_the_log_of_a_truncated_run_measures_what_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two tokens left of the nearly uniform 384 of an untrained model, -log Z is about log 192, and the trainer computes it."""
    questions = [f"{a} + {b} =" for a in range(4) for b in range(4)]
    models.build_tiny(tmp_path / "model", models.tiny_tokenizer(questions), [(questions[0], "3")], seed=0, num_updates=0)
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"prompt": q, "answer": "3"}) + "\n" for q in questions))
    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    settings = "--dtype float32 --device cpu --engine transformers --num-examples 0 --eval-prompts 0 --preset grpo --group-size 2"
    places = ["--model", str(tmp_path / "model"), "--task", str(tmp_path / "task.jsonl"), "--out", str(tmp_path / "run")]
    reward = ["--reward", "toy_rewards:even_length", "--degenerate", "keep", "--top-k", "2"]
    assert cli.main(["train", *settings.split(), *places, *reward, "--steps", "1", "--prompts-per-step", "4", "--max-tokens", "3"]) == 0
    (step,) = [record for record in read_log(tmp_path / "run/log.jsonl") if record["kind"] == "step"]
    assert 0.5 * math.log(192) < step["rollout_kl_k1"] < 1.1 * math.log(192)
