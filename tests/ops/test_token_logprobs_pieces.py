"""`token_logprobs` piece by piece: the kernels for logits that are never in memory at once."""

import math
from itertools import pairwise

import pytest
import torch
from conformance import Build, assert_no_worse, assert_repeatable, builds, using
from hypothesis import given, settings
from hypothesis import strategies as st
from token_logprobs_scene import LN2, evaluate, native_builds
from torch import Tensor

from reinforce_ada.ops import _native
from reinforce_ada.ops._torch import DTYPE_CODES

# Piece by piece: the kernels for logits that are never in memory at once

STATE, TOKEN_U = 6, 4  # RowState in csrc/common/logits_sweep.h


def add_piece(state: Tensor, piece: Tensor, first: int, ids: Tensor, head: dict[str, float]) -> None:
    _native.cpu.token_logprobs_add_piece(
        *(piece.data_ptr(), DTYPE_CODES[piece.dtype], *piece.shape, piece.stride(0), first, ids.data_ptr(), 0, head.get("temperature", 1)),
        *(head.get("logit_scale", 1), head.get("soft_cap", 0), state.data_ptr(), True, True, torch.get_num_threads()),
    )


def finish(state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, normalizers [T, 2] (their log2 is the sum of the two), entropy, sum_p2."""
    out = [torch.empty(len(state), *rest, dtype=torch.float64 if rest else torch.float32) for rest in ((), (2,), (), ())]
    _native.cpu.token_logprobs_finish(state.data_ptr(), len(state), *(x.data_ptr() for x in out))
    return tuple(out)


def piece_gradient(
    grad: Tensor, piece: Tensor, first: int, ids: Tensor, head: dict[str, float], saved: list[Tensor], grad_bias: Tensor
) -> None:
    """`saved` is normalizers, entropy and the two incoming gradients."""
    _native.cpu.token_logprobs_gradient_piece(
        *(piece.data_ptr(), DTYPE_CODES[piece.dtype], *piece.shape, piece.stride(0), first, ids.data_ptr(), 0, head.get("temperature", 1)),
        *(head.get("logit_scale", 1), head.get("soft_cap", 0), *(x.data_ptr() for x in saved)),
        *(grad.data_ptr(), grad.stride(0), grad_bias.data_ptr(), torch.get_num_threads()),
    )


def by_pieces(logits: Tensor, cuts: list[int], ids: Tensor, g: Tensor, h: Tensor, **head: float) -> list[Tensor]:
    """As `evaluate`, with the sum of the gradient's rows at the end: pieces from cut to cut, last first, the gradient over the logits."""
    state = torch.zeros(len(ids), STATE, dtype=torch.float64)
    grad, grad_bias = logits.clone(), torch.zeros(logits.shape[1], dtype=torch.float64)
    pieces = [slice(*cut) for cut in pairwise(cuts)][::-1]
    for ids_of in pieces:
        add_piece(state, logits[:, ids_of], ids_of.start, ids, head)
    logprobs, normalizers, entropy, sum_p2 = finish(state)
    for ids_of in pieces:
        piece_gradient(grad[:, ids_of], grad[:, ids_of], ids_of.start, ids, head, [normalizers, entropy, g, h], grad_bias[ids_of])
    return [logprobs, entropy, sum_p2, grad, grad_bias]


HEADS = st.sampled_from([{}, {"temperature": 0.7}, {"logit_scale": -0.5}, {"soft_cap": 5.0, "logit_scale": 0.3, "temperature": 1.3}])


@pytest.mark.parametrize("build", builds("token_logprobs", reference=False))
@settings(max_examples=40, deadline=None)
@given(
    vocab=st.integers(1, 5000),
    cuts=st.lists(st.integers(0, 5000), max_size=4),
    head=HEADS,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    outliers=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pieces(build: Build, vocab: int, cuts: list[int], head: dict[str, float], dtype: torch.dtype, outliers: bool, seed: int) -> None:
    """Any cut of the vocabulary, in any order, gives results and gradients no further from float64 than plain PyTorch's."""
    torch.manual_seed(seed)
    logits = torch.randn(4, vocab) * 3
    if outliers:
        logits[0, 0], logits[1, -1] = 200, -200
        logits[2, 1::2] = -math.inf if head.get("logit_scale", 1) > 0 else 200
    logits = logits.to(dtype)
    ids = torch.tensor([0, vocab - 1, vocab // 2, -100])
    g, h = torch.randn(2, 4)
    g[1] = h[1] = 0
    with using(build):
        actual = by_pieces(logits, sorted({0, vocab, *(cut for cut in cuts if cut < vocab)}), ids, g, h, **head)

    def plain(dtype: torch.dtype) -> list[Tensor]:
        return evaluate(logits.to(dtype), ids, **{"temperature": 1.0, **head}, g=g.to(dtype), h=h.to(dtype), backend="reference")

    names = ("logprobs", "entropy", "sum_p2", "gradient")
    for name, a, t, p in zip(names, actual, plain(torch.float64), plain(torch.float32), strict=False):
        # The gradient is written in the logits' dtype.
        rounding = torch.finfo(dtype).eps * t.abs().max().item() if name == "gradient" and dtype != torch.float32 else 0
        assert_no_worse(a, t, p, 2e-6 + rounding, name)
    torch.testing.assert_close(actual[4], actual[3].double().sum(0))


@native_builds
def test_pieces_that_are_nothing(backend: str) -> None:
    """A piece that is all -inf, first or last, changes nothing; a row that is all -inf or has a NaN somewhere is NaN."""
    logits = torch.randn(4, 60)
    logits[0, :20] = logits[1, 40:] = logits[2] = -math.inf
    logits[3, 30] = math.nan
    ids, g = torch.tensor([25, 3, 3, 50]), torch.ones(4)
    logprobs, entropy, sum_p2, grad, _ = by_pieces(logits, [0, 20, 40, 60], ids, g, g)
    whole = evaluate(logits, ids, 1.0, g, g, backend=backend)
    for a, b in zip((logprobs, entropy, sum_p2, grad), whole, strict=True):
        assert a.isnan().flatten(1).any(1).tolist() == [False, False, True, True] if a.ndim > 1 else a.isnan().tolist()[2:] == [True] * 2
        torch.testing.assert_close(a, b, equal_nan=True)


@native_builds
def test_a_token_that_no_piece_contained_is_not_a_number(backend: str) -> None:
    state = torch.zeros(3, STATE, dtype=torch.float64)
    add_piece(state, torch.zeros(3, 4), 10, torch.tensor([9, 14, 13]), {})
    logprobs, normalizers, entropy, sum_p2 = finish(state)
    assert logprobs.isnan().tolist() == [True, True, False]
    for result, value in ((normalizers.sum(1), 2), (entropy, 2 * LN2), (sum_p2, 0.25)):
        assert result.tolist() == pytest.approx([value] * 3, abs=1e-6)


@native_builds
def test_gradient_of_the_bias_does_not_depend_on_threads(backend: str) -> None:
    """It is also added to what is there, and rows of zero gradient, even NaN, add nothing."""
    logits, ids = torch.randn(300, 1100), torch.randint(1100, (300,))
    logits[7] = math.nan
    g, h = torch.randn(2, 300)
    g[7] = h[7] = 0
    assert_repeatable(lambda: by_pieces(logits, [0, 700, 1100], ids, g, h)[3:])


@pytest.mark.parametrize("build", builds("token_logprobs", reference=False))
def test_tanh(build: Build) -> None:
    """The vector tanh over all magnitudes, as the state's token_u shows it: relative error 2.5e-7, at most 1, NaN of NaN."""
    x = torch.cat([torch.logspace(-30, 30, 20000), torch.linspace(0, 12, 20000), torch.tensor([0.0, math.inf])])
    x = torch.cat([x, -x, torch.tensor([math.nan])])
    with using(build):
        state = torch.zeros(len(x), STATE, dtype=torch.float64)
        add_piece(state, x[:, None], 0, torch.zeros(len(x), dtype=torch.int64), {"soft_cap": 1.0})
    tanh, x = state[:-1, TOKEN_U] * LN2, x[:-1]
    assert state[-1, TOKEN_U].isnan()
    error = (tanh - x.double().tanh()).abs() / x.double().tanh().abs().clamp(min=1e-38)
    assert error.max() <= 2.5e-7
    assert tanh.abs().max() <= 1
    assert error[x.abs() > 9.1].max() <= 6e-8
