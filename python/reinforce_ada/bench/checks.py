"""The comparison of results, which precedes all timing."""

from __future__ import annotations

from torch import Tensor


def close(what: str, actual: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
    """Raise AssertionError unless |actual - expected| <= atol + rtol |expected| everywhere; NaN is never close."""
    a, e = actual.detach().double(), expected.detach().double()
    assert a.shape == e.shape, f"{what} has shape {list(a.shape)}, not {list(e.shape)}"
    excess = ((a - e).abs() - rtol * e.abs()).max().item() if a.numel() else 0.0
    assert excess <= atol, f"{what} is off by {excess:.1e}, more than {atol:.1e}"


def close_in_norm(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless max |actual - expected| <= tolerance max |expected|."""
    close(what, actual, expected, tolerance * float(expected.abs().max()))
