"""token_logprobs on a GPU: what its mutants asked for beside cases_token_logprobs."""

from __future__ import annotations

import math

import torch
from cases import each
from cases_token_logprobs import assert_conforms, scores


def check_infinity_under_a_cap(backend: str, device: str) -> None:
    """It is the cap, on either side."""
    logits, ids = torch.randn(3, 4100), torch.tensor([0, 7, 4099])
    logits[0, ::5] = math.inf
    logits[1, ::7] = -math.inf
    logits[2, 4099] = math.inf
    assert_conforms(backend, device, logits, ids, soft_cap=5.0)


def check_scale_that_float32_has_not(backend: str, device: str, scale: float) -> None:
    """1.3 is off by 5e-8 there, which logits of 1000 would show."""
    logits = torch.randn(2, 4100)
    logits[:, 5] = 1000 if scale > 0 else -1000
    assert_conforms(backend, device, logits, torch.tensor([3, 4099]), logit_scale=scale)


def check_wrong_id_without_gradient(backend: str, device: str) -> None:
    """The entropy does not depend on the token, nor does its gradient."""
    logits, good, ones = torch.randn(3, 4100, device=device), torch.tensor([5, 6, 7], device=device), torch.ones(3, device=device)
    wrong = torch.tensor([5, 4100, 7], device=device)
    right = scores(logits, good, 0 * ones, ones, backend=backend)
    result = scores(logits, wrong, 0 * ones, ones, backend=backend)
    assert result[0][1].isnan()
    torch.testing.assert_close(result[3], right[3])


def check_infinite_temperature(backend: str, device: str) -> None:
    """Wrong too where the row is a whole number of blocks, so that nothing else is infinite."""
    logits, ids, ones = torch.randn(3, 8192, device=device), torch.tensor([5, 6, 7], device=device), torch.ones(3, device=device)
    temperature = torch.tensor([1.0, math.inf, 1], device=device)
    for result in scores(logits, ids, ones, ones, temperature=temperature, backend=backend):
        assert result[1].isnan().all()
        assert not result[[0, 2]].isnan().any()


def check_logits_as_large_as_the_dtype(backend: str, device: str, dtype: torch.dtype) -> None:
    """Whole blocks at the smallest number before the first other one, and two at the largest."""
    smallest, largest = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits = torch.full((4, 8300), smallest)
    logits[0, 8192:] = torch.randn(108)
    logits[1, :] = torch.where(torch.rand(8300) < 0.5, logits[1], torch.randn(8300))
    logits[2, [5, 8299]] = largest
    logits, ids, ones = logits.to(dtype), torch.tensor([8200, 7, 5, 3]), torch.ones(4)
    out = scores(logits.to(device), ids.to(device), ones.to(device), ones.to(device), backend=backend)
    truth = scores(logits.double(), ids, ones.double(), ones.double(), backend="reference")
    for a, exact in zip(out, truth, strict=True):
        torch.testing.assert_close(a.float().cpu(), exact.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


CASES = [
    *each(check_logits_as_large_as_the_dtype, (torch.float32,), (torch.bfloat16,)),
    *each(check_infinity_under_a_cap),
    *each(check_scale_that_float32_has_not, (1.3,), (-1.3,)),
    *each(check_wrong_id_without_gradient),
    *each(check_infinite_temperature),
]
