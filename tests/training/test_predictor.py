"""The predicted pass rate: its regression against float64, what it may know, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from reinforce_ada.training.batching import Batch, Sample, collate
from reinforce_ada.training.predictor import PassRatePredictor, features
from reinforce_ada.types import Completion, CompletionId, Prompt

WIDTH = 6
CPU = torch.device("cpu")


def batch_of(outcomes: list[bool], num_tokens: list[int], factor: float = 1.0) -> Batch:
    """Completions of a prompt each, with an advantage of 1 for correct ones and -0 for the others."""
    rows = [
        [Sample(Prompt(str(i), (5, 6)), Completion(CompletionId(1, str(i), 0), np.full(n, 7), np.zeros(n), "", "stop", 0), a, factor)]
        for i, (n, a) in enumerate(zip(num_tokens, [1.0 if o else -0.0 for o in outcomes], strict=True))
    ]
    return collate(rows, 0)


def states(num_tokens: list[int], first: Tensor) -> Tensor:
    """Hidden states of all tokens: those that predict a first token, and others that must not matter."""
    out = torch.full((sum(num_tokens), first.shape[1]), 99.0, dtype=torch.float32)
    starts = np.cumsum([0, *num_tokens])[:-1]
    for i, n in enumerate(num_tokens):
        if n:
            out[starts[i]] = first[i]
    return out


def alone(tensor: Tensor) -> None:
    """One process has nothing to add."""


def test_the_regression_in_float64() -> None:
    """Three steps, the second without tokens of one completion; the predictions of a step use those before it."""
    rng, predictor, decay = np.random.default_rng(0), PassRatePredictor(WIDTH, 0.9, CPU), 0.9
    s, u = np.zeros((WIDTH + 1, WIDTH + 1)), np.zeros(WIDTH + 1)
    for lengths in ([1, 2, 3], [2, 0, 1], [1, 1, 4]):
        outcomes = (rng.random(3) < 0.5).tolist()
        first = torch.from_numpy(rng.normal(size=(3, WIDTH))).float()
        h = first.double().numpy()
        x = np.concatenate([h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-6), np.ones((3, 1))], axis=1)
        w = np.linalg.solve(s + 2 * (WIDTH + 1) * np.eye(WIDTH + 1), u)
        predicted = np.clip(0.5 + x @ w, 0, 1)
        there = np.array(lengths) > 0
        wanted = np.array([1.0 if o else 0.0 for o in outcomes]) - 0.5 * predicted * there
        found = predictor.complete(batch_of(outcomes, lengths, 0.5), states(lengths, first))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=1e-6)
        said = predictor.update(alone)
        assert said["prediction_error"] == pytest.approx(((np.array(outcomes) - predicted)[there] ** 2).mean(), abs=1e-6)
        s, u = decay * s + x[there].T @ x[there], decay * u + x[there].T @ (np.array(outcomes)[there] - 0.5)
    np.testing.assert_allclose(predictor.tensors()["predictor/moments"].numpy(), s, rtol=1e-5)


def test_a_prediction_has_not_seen_its_own_step() -> None:
    """Other outcomes of a step change nothing before it ends."""
    found = []
    for outcomes in ([True, True], [False, False]):
        predictor = PassRatePredictor(WIDTH, 1.0, CPU)
        first = torch.ones(2, WIDTH)
        predictor.complete(batch_of(outcomes, [1, 1]), states([1, 1], first))
        batch = batch_of([True, False], [1, 1])
        found.append(predictor.complete(batch, states([1, 1], first)) - batch.advantages)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], torch.full((2,), -0.5))


def test_it_learns_which_prompts_are_easy() -> None:
    rng, predictor = np.random.default_rng(0), PassRatePredictor(WIDTH, 0.99, CPU)
    direction = rng.normal(size=WIDTH)
    errors, best = [], []
    for _ in range(60):
        h = rng.normal(size=(64, WIDTH))
        rate = 1 / (1 + np.exp(-4 * h @ direction / np.linalg.norm(direction)))
        outcomes = (rng.random(64) < rate).tolist()
        predictor.complete(batch_of(outcomes, [1] * 64), states([1] * 64, torch.from_numpy(h).float()))
        errors.append(predictor.update(alone)["prediction_error"])
        best.append((rate * (1 - rate)).mean())
    assert errors[0] == 0.25  # nothing known: 1/2 for all
    known = np.mean(best[-20:])
    assert np.mean(errors[-20:]) - known < 0.3 * (0.25 - known)  # a straight line is not the logistic curve


def test_the_parts_of_two_processes_add_up() -> None:
    """Each sees half of the completions, and `add_up` gives both the sums."""
    rng = np.random.default_rng(0)
    first, outcomes = torch.from_numpy(rng.normal(size=(4, WIDTH))).float(), [True, False, False, True]
    whole, other = PassRatePredictor(WIDTH, 0.9, CPU), PassRatePredictor(WIDTH, 0.9, CPU)
    whole.complete(batch_of(outcomes, [1] * 4), states([1] * 4, first))
    error = whole.update(alone)
    half = PassRatePredictor(WIDTH, 0.9, CPU)
    half.complete(batch_of(outcomes[:2], [1, 1]), states([1, 1], first[:2]))
    other.complete(batch_of(outcomes[2:], [1, 1]), states([1, 1], first[2:]))
    theirs: list[Tensor] = []
    other.update(lambda tensor: theirs.append(tensor.clone()))

    def add_up(tensor: Tensor) -> None:
        tensor += theirs.pop(0)

    assert half.update(add_up) == pytest.approx(error)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(half.tensors()[name], tensor)


def test_a_step_without_completions() -> None:
    assert PassRatePredictor(WIDTH, 0.9, CPU).update(alone) == {}


def test_saved_and_restored() -> None:
    predictor, other = PassRatePredictor(WIDTH, 0.9, CPU), PassRatePredictor(WIDTH, 0.9, CPU)
    first = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    batch, hidden = batch_of([True, False, True], [1, 1, 1]), states([1, 1, 1], first)
    predictor.complete(batch, hidden)
    predictor.update(alone)
    saved = {name: tensor.clone() for name, tensor in predictor.tensors().items()}
    assert other.misfit(saved) == ""
    other.load(saved)
    assert torch.equal(other.complete(batch, hidden), predictor.complete(batch, hidden))
    assert other.misfit({}) == "predictor/moments is missing"
    assert "predictor/targets is not a finite [7] float32" in other.misfit({**saved, "predictor/targets": torch.full((7,), torch.nan)})
    assert "[7, 7]" in other.misfit({**saved, "predictor/moments": torch.zeros(3, 3)})


def test_features_have_no_scale() -> None:
    h = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features(h), features(1000 * h), rtol=1e-5, atol=1e-5)
    assert features(torch.zeros(1, WIDTH)).tolist() == [[0.0] * WIDTH + [1.0]]


def test_a_state_that_is_not_finite_is_not_remembered() -> None:
    predictor = PassRatePredictor(WIDTH, 1.0, CPU)
    first = torch.ones(3, WIDTH)
    first[1, 2] = torch.nan
    first[2, 0] = torch.inf
    found = predictor.complete(batch_of([True, True, False], [1, 1, 1]), states([1, 1, 1], first))
    predictor.update(alone)
    assert found.tolist() == [0.5, 0.5, -0.5]
    alike = PassRatePredictor(WIDTH, 1.0, CPU)
    alike.complete(batch_of([True], [1]), first[:1])
    alike.update(alone)
    for name, tensor in alike.tensors().items():
        assert torch.equal(predictor.tensors()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(dtype: torch.dtype) -> None:
    found = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            predictor = PassRatePredictor(WIDTH, 0.9, CPU)
            first = torch.arange(2.0 * WIDTH, dtype=torch.float32).reshape(2, WIDTH)
            for _ in range(2):
                advantages = predictor.complete(batch_of([True, False], [1, 1]), states([1, 1], first))
                predictor.update(alone)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(advantages)
    assert found[1].dtype == torch.float32
    assert torch.equal(*found)
