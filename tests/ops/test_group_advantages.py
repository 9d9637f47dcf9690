"""`group_advantages`: literal tables, a float64 truth written with loops, and every form against it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce_ada.errors import InputError
from reinforce_ada.ops import _dispatch, _native, group_advantages
from reinforce_ada.types import PoolStats

BASELINES = ("pool", "group", "leave-one-out", "values")
SCALES = ("none", "pool", "group", "batch")


def usable(dtype: torch.dtype = torch.float32) -> list[str]:
    forms = _dispatch.forms("group_advantages")
    return [name for name, form in forms.items() if form.why_not(torch.device("cpu"), dtype) is None]


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in usable():
        pytest.skip(f"{request.param}: {_native.missing()}")
    return str(request.param)


def pool_of(*pools: list[float]) -> PoolStats:
    """Statistics of literal pools."""
    columns = []
    for pool in pools:
        r = np.asarray(pool, dtype=np.float64)
        low, high = (r.min(), r.max()) if len(r) else (math.inf, -math.inf)
        columns.append((len(r), r.mean() if len(r) else 0.0, ((r - r.mean()) ** 2).sum() if len(r) else 0.0, low, high))
    return PoolStats(*np.asarray(columns, dtype=np.float64).T)


def check(expected: list[float], got: torch.Tensor) -> None:
    np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------------------- literal tables


def test_the_papers_balanced_group_against_its_pool(backend: str) -> None:
    outcomes = [float(c == "+") for c in "++++++++----++++"]
    kept = torch.tensor([outcomes[i] for i in (0, 1, 8, 9)])
    got = group_advantages(kept, torch.zeros(4, dtype=torch.int64), pool=pool_of(outcomes), backend=backend)
    assert got.tolist() == [0.25, 0.25, -0.75, -0.75]
    assert got.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.5, -0.5, 2.0, 0.0, -2.0]),
        ({"baseline": "leave-one-out"}, [1.0, -1.0, 3.0, 0.0, -3.0]),
        ({"scale": "group"}, [0.5 / (math.sqrt(0.5) + 1e-6), -0.5 / (math.sqrt(0.5) + 1e-6), 2 / 2.000001, 0.0, -2 / 2.000001]),
        ({"scale": "group", "ddof": 0, "eps": 0.0}, [1.0, -1.0, math.sqrt(1.5), 0.0, -math.sqrt(1.5)]),
        ({"scale": "batch", "eps": 0.0}, [x / math.sqrt(6.2) for x in (0.5, -0.5, 2.0, 0.0, -2.0)]),
        ({"baseline": torch.tensor([0.25, 1.0])}, [0.75, -0.25, 4.0, 2.0, 0.0]),
        ({"class_weights": torch.tensor([[2.0, 4.0], [1.0, 10.0]])}, [2.0, -1.0, 20.0, 0.0, -2.0]),
    ],
)
def test_two_groups(backend: str, arguments: dict[str, object], expected: list[float]) -> None:
    rewards = torch.tensor([1.0, 0.0, 5.0, 3.0, 1.0])  # batch mean 2, squared deviations 1 + 4 + 9 + 1 + 1 = 16... see below
    group_of = torch.tensor([0, 0, 1, 1, 1])
    if arguments.get("scale") == "batch":
        expected = [x / math.sqrt(16 / 4) for x in (0.5, -0.5, 2.0, 0.0, -2.0)]
    check(expected, group_advantages(rewards, group_of, backend=backend, **arguments))
    order = torch.tensor([4, 0, 2, 1, 3])
    check([expected[i] for i in order], group_advantages(rewards[order], group_of[order], backend=backend, **arguments))
    check(expected, group_advantages(rewards, cu_seqlens=torch.tensor([0, 2, 5]), backend=backend, **arguments))
