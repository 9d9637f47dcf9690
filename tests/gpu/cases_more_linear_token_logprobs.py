"""linear_token_logprobs on a GPU: what its mutants asked for beside cases_linear_token_logprobs."""

from __future__ import annotations

import math

import torch
from cases import each
from cases_linear_token_logprobs import HEADS, assert_conforms, make, scores
from conformance import assert_no_worse

from reinforce_ada.ops import linear_token_logprobs


def check_columns_at_minus_infinity(backend: str, device: str) -> None:
    """A part of the vocabulary that nobody can sample, of several tiles."""
    hidden, weight, bias, ids = make(3, 8, 1203, torch.float32)
    bias[:600] = -math.inf
    ids[[0, 2]] = torch.tensor([600, 1202])
    assert_conforms(backend, device, (hidden, weight, bias, ids), HEADS["bias"])


def check_infinite_temperature(backend: str, device: str) -> None:
    """Wrong too where each tile is full, so that nothing else is infinite."""
    hidden, weight, bias, ids = (x.to(device) for x in make(4, 8, 512, torch.float32))
    temperature = torch.tensor([1.0, 1, math.inf, 1], device=device)
    for result in scores(hidden, weight, bias, ids, {"temperature": temperature}, backend=backend)[:4]:
        assert result[2].isnan().all()
        assert not result[[0, 1, 3]].isnan().any()


def check_ignored_row_under_a_large_bias(backend: str, device: str) -> None:
    """It is not computed what e^120 of it would be, nor for the others how much later tiles are below the first."""
    hidden, weight, bias, ids = make(5, 8, 1203, torch.float32)
    bias[3] = 120
    ids[[0, 2, 3, 4]] = 3
    assert_conforms(backend, device, (hidden, weight, bias, ids), HEADS["bias"])


def check_many_rows(backend: str, device: str) -> None:
    """More blocks of rows than go through the vocabulary together."""
    hidden, weight, _, ids = make(2100, 3, 300, torch.float32)
    logprobs = linear_token_logprobs(hidden.to(device), weight.to(device), ids.to(device), backend=backend)
    truth = linear_token_logprobs(hidden.double(), weight.double(), ids, backend="reference")
    assert_no_worse(logprobs.cpu(), truth, linear_token_logprobs(hidden, weight, ids, backend="reference"), 2e-6)


CASES = [
    *each(check_many_rows),
    *each(check_columns_at_minus_infinity),
    *each(check_infinite_temperature),
    *each(check_ignored_row_under_a_large_bias),
]
