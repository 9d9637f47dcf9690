from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conformance import Build, assert_no_worse, assert_repeatable, assert_same_bits, builds, using
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from reinforce_ada.errors import InputError
from reinforce_ada.ops import TokenLogprobs, _native, token_logprobs
from reinforce_ada.ops._torch import DTYPE_CODES
from reinforce_ada.ops.token_logprobs import cpu as cpu_form

every_build = pytest.mark.parametrize("backend", builds("token_logprobs"), indirect=True)
native_builds = pytest.mark.parametrize("backend", builds("token_logprobs", reference=False), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("token_logprobs", every_isa=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("token_logprobs", reference=False, every_isa=False), indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])

LN2, LN3 = math.log(2), math.log(3)
# One, less than any vector, one short of, exactly and one past the vectors and blocks of the kernels, and a real vocabulary.
SHAPES = [(0, 7), (1, 1), (3, 2), (5, 15), (4, 16), (3, 17), (2, 64), (7, 1003), (3, 2047), (2, 2048), (2, 2049), (1, 151936)]


def evaluate(logits: Tensor, ids: Tensor, temperature: float | Tensor, g: Tensor, h: Tensor, **options: object) -> list[Tensor]:
    """Results and the gradient of g . logprobs + h . entropy."""
    leaf = logits.detach().requires_grad_()
    out = token_logprobs(leaf, ids, temperature=temperature, entropy=True, sum_p2=True, **options)
    (grad,) = torch.autograd.grad((out.logprobs.to(g.dtype) * g).sum() + (out.entropy.to(h.dtype) * h).sum(), leaf)
    return [x.detach() for x in (*out, grad)]


def assert_conforms(logits: Tensor, ids: Tensor, backend: str, temperature: float | Tensor = 1.0, **head: float | None) -> None:
    """Results and gradients are no further from float64 than plain PyTorch's; `plain` is what a trainer writes without this op."""
    g, h = torch.randn(2, len(ids))
    g[::3] = 0
    actual = evaluate(logits, ids, temperature, g, h, backend=backend, **head)
    truth = evaluate(logits.double(), ids, temperature, g.double(), h.double(), backend="reference", **head)
    plain = evaluate(logits, ids, temperature, g, h, backend="reference", **head)
    for name, a, t, p in zip(("logprobs", "entropy", "sum_p2", "gradient"), actual, truth, plain, strict=True):
        assert a.dtype == (logits.dtype if name == "gradient" else torch.float32)
        assert_no_worse(a, t, p, 2e-6, name)


# The meaning


@every_build
def test_table(backend: str) -> None:
    """Worked by hand: uniform over 4; odds 3:1; temperature 1/2 squares the odds to 9:1; a certain token; an ignored row."""
    inf = math.inf
    logits = torch.tensor([[5.0, 5, 5, 5], [LN3, 0, -inf, -inf], [LN3, 0, -inf, -inf], [0, -inf, -inf, -inf], [7, 8, 9, 10]])
    out = token_logprobs(
        logits,
        torch.tensor([2, 0, 1, 0, -100]),
        temperature=torch.tensor([1.0, 1, 0.5, 1, 1]),
        entropy=True,
        sum_p2=True,
        backend=backend,
    )
    assert isinstance(out, TokenLogprobs)
    h31, h91 = 2 * LN2 - 0.75 * LN3, math.log(10) - 0.9 * math.log(9)
    torch.testing.assert_close(out.logprobs, torch.tensor([-2 * LN2, math.log(0.75), math.log(0.1), 0, 0]))
    torch.testing.assert_close(out.entropy, torch.tensor([2 * LN2, h31, h91, 0, 0]))
    torch.testing.assert_close(out.sum_p2, torch.tensor([0.25, 10 / 16, 82 / 100, 1, 0]))


@every_build
def test_gradient_table(backend: str) -> None:
    """d logprob = onehot - p at odds 3:1; over the temperature at temperature 2; nothing in an ignored row."""
    logits = torch.tensor([[LN3, 0.0], [2 * LN3, 0], [1, 2]], requires_grad=True)
    temperature = torch.tensor([1.0, 2, 1])
    logprobs = token_logprobs(logits, torch.tensor([0, 1, -100]), temperature=temperature, backend=backend)
    assert isinstance(logprobs, Tensor)
    logprobs.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, -0.25], [-0.375, 0.375], [0, 0]]))


def test_reference_passes_gradcheck() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 4, -100, 2])

    def scores(x: Tensor) -> tuple[Tensor, Tensor | None]:
        return token_logprobs(x, ids, temperature=0.7, entropy=True)[:2]

    assert torch.autograd.gradcheck(scores, logits)


def test_results_that_were_not_asked_for() -> None:
    logits, ids = torch.randn(2, 3), torch.tensor([0, 1])
    assert isinstance(token_logprobs(logits, ids), Tensor)
    for backend in ("cpu", "reference"):
        assert token_logprobs(logits, ids, entropy=True, backend=backend).sum_p2 is None
        assert token_logprobs(logits, ids, sum_p2=True, backend=backend).entropy is None
        assert not token_logprobs(logits.requires_grad_(), ids, sum_p2=True, backend=backend).sum_p2.requires_grad


@pytest.mark.parametrize("build", builds("token_logprobs"))
@settings(max_examples=25, deadline=None)
@given(vocab=st.integers(1, 70), spread=st.floats(0, 20), temperature=st.floats(0.5, 20), seed=st.integers(0, 2**31))
def test_probabilities_sum_to_one(build: Build, vocab: int, spread: float, temperature: float, seed: int) -> None:
    row = torch.randn(1, vocab, generator=torch.Generator().manual_seed(seed)) * spread
    with using(build) as backend:
        logprobs, entropy, sum_p2 = token_logprobs(
            row.expand(vocab, vocab), torch.arange(vocab), temperature=temperature, entropy=True, sum_p2=True, backend=backend
        )
    p = logprobs.exp()
    assert (logprobs <= 0).all()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0), rtol=0, atol=2e-5)
    torch.testing.assert_close(sum_p2, p.square().sum().expand(vocab), rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy, -torch.special.xlogy(p, p).sum().expand(vocab), rtol=0, atol=1e-4)


# The head: scale and soft cap


@every_build
def test_head_table(backend: str) -> None:
    """A scale of 2 squares the odds 3:1 to 9:1, one of -1 turns them round; under the soft cap ln 3 a logit 1e9 is ln 3."""
    logits, ids = torch.tensor([[LN3, 0.0]]), torch.tensor([0])
    capped = token_logprobs(torch.tensor([[1e9, 0.0]]), ids, soft_cap=LN3, backend=backend)
    assert capped.item() == pytest.approx(math.log(0.75), abs=1e-6)
    for scale, p in ((2.0, 0.9), (-1.0, 0.25), (0.0, 0.5)):
        assert token_logprobs(logits, ids, logit_scale=scale, backend=backend).item() == pytest.approx(math.log(p), abs=1e-6)


@every_build
def test_gradient_of_the_head_table(backend: str) -> None:
    """(onehot - p) times the scale and, under the cap, times 1 - tanh^2; where the cap binds it is 0."""
    logits = torch.tensor([[LN3, 0.0], [1e9, 0.0]], requires_grad=True)
    token_logprobs(logits, torch.tensor([0, 0]), logit_scale=2.0, soft_cap=LN3, temperature=0.5, backend=backend).sum().backward()
    slope = 1 - math.tanh(2) ** 2
    p = 1 / (1 + math.exp(-2 * LN3 * math.tanh(2)))
    torch.testing.assert_close(logits.grad, torch.tensor([[4 * (1 - p) * slope, -4 * (1 - p)], [0, -0.4]]))


@every_build
@dtypes
@pytest.mark.parametrize("head", [(0.0625, None), (-1.3, None), (1.0, 30.0), (0.5, 2.0)], ids=str)
def test_head(backend: str, dtype: torch.dtype, head: tuple[float, float | None]) -> None:
    """Also outliers, -inf where it has a meaning, and a NaN in an ignored row."""
    logits = torch.randn(6, 5001) * 10
    logits[1, 4000] = logits[2, 17] = 200
    logits[3] -= 200
    logits[4, ::2] = -math.inf if head[0] > 0 else math.inf
    logits[5, 9] = math.nan
    ids = torch.tensor([5, 4000, 18, 3, 7, -100])
    assert_conforms(logits.to(dtype), ids, backend, 0.7, logit_scale=head[0], soft_cap=head[1])


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


# The error against float64


@every_build
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_worse_than_plain_torch(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits = (torch.randn(shape) * 3).to(dtype)
    assert_conforms(logits, torch.randint(shape[1], shape[:1]), backend)


@every_build
@dtypes
@pytest.mark.parametrize("temperature", [0.3, 1.7, "per token"], ids=str)
def test_temperature(backend: str, dtype: torch.dtype, temperature: float | str) -> None:
    logits = (torch.randn(6, 3001) * 3).to(dtype)
    per_token = torch.rand(6) + 0.5 if isinstance(temperature, str) else temperature
    assert_conforms(logits, torch.randint(3001, (6,)), backend, per_token)


@every_build
@dtypes
def test_outliers(backend: str, dtype: torch.dtype) -> None:
    """Logits of 200 that arrive in the first, a later and the last block, alone, repeated, and with the token elsewhere."""
    logits = torch.randn(8, 5000) * 3
    logits[0, 0] = logits[1, 3000] = logits[2, 4999] = 200
    logits[3, ::1000] = 150
    logits[4] -= 200
    logits[5, torch.arange(5000) % 2 == 0] = -200
    logits[6] = torch.linspace(-200, 200, 5000)  # the anchor moves in every block
    logits[7] = torch.linspace(200, -200, 5000)
    ids = torch.tensor([0, 5, 4999, 1000, 17, 3, 4998, 4999])
    assert_conforms(logits.to(dtype), ids, backend)


@every_build
@dtypes
def test_forbidden_tokens(backend: str, dtype: torch.dtype) -> None:
    """-inf in one place, in whole blocks, before everything else, and at the token itself."""
    logits = (torch.randn(5, 5000) * 3).to(dtype)
    logits[0, 7] = logits[2, :4100] = logits[3, 2048:] = logits[4, 9] = -math.inf
    logits[1, 1:] = -math.inf
    assert_conforms(logits, torch.tensor([5, 0, 4500, 100, 9]), backend)


@every_build
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_a_number_stays_so(backend: str, bad: float) -> None:
    logits = torch.randn(4, 100)
    logits[0, 50] = logits[1, 99] = logits[2, 0] = bad
    logprobs = token_logprobs(logits, torch.tensor([3, 3, 0, 3]), backend=backend)
    assert logprobs.isnan().tolist() == [True, True, True, False]


@every_build
def test_nothing_allowed_is_not_a_number(backend: str) -> None:
    assert token_logprobs(torch.full((1, 40), -math.inf), torch.tensor([3]), backend=backend).isnan().all()


# Rows: ignored, without gradient, strided


@every_build
@dtypes
def test_ignored_rows_are_not_read(backend: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 100).to(dtype)
    clean = logits.clone()
    logits[1] = logits[3, 5] = math.nan
    ids = torch.tensor([3, -100, 9, -100])
    g, h = torch.randn(2, 4)
    results = evaluate(logits, ids, 1.0, g, h, backend=backend)
    assert_same_bits(results, evaluate(clean, ids, 1.0, g, h, backend=backend))
    for result in results:
        assert (result[[1, 3]] == 0).all()


@native_builds
def test_rows_without_gradient_are_not_read(backend: str) -> None:
    """A prompt, masked out of the loss, costs a write and cannot poison the gradient."""
    logits = torch.randn(3, 100)
    logits[1] = math.nan
    ids, g, h = torch.tensor([3, 4, 5]), torch.tensor([1.0, 0, 2]), torch.zeros(3)
    grad = evaluate(logits, ids, 1.0, g, h, backend=backend)[-1]
    assert (grad[1] == 0).all()
    assert (grad[[0, 2]] != 0).all()


@every_build
@dtypes
def test_strided_rows_and_int32_ids(backend: str, dtype: torch.dtype) -> None:
    """A slice of a padded vocabulary and every other row: the same bits as a copy of it."""
    storage = (torch.randn(10, 1037) * 3).to(dtype)
    view = storage[::2, 3:1004]
    ids, g, h = torch.randint(1001, (5,)), *torch.randn(2, 5)
    copied = evaluate(view.contiguous(), ids, 1.0, g, h, backend=backend)
    assert_same_bits(evaluate(view, ids.int(), 1.0, g, h, backend=backend), copied)


@native_builds
def test_offsets_past_int32(backend: str) -> None:
    """Two rows 2^31 elements apart (32k tokens of a 152k vocabulary have 5.0e9); only their pages are touched."""
    stride = 2**31 + 64
    logits = torch.empty(stride + 1000, dtype=torch.bfloat16).as_strided((2, 1000), (stride, 1))
    values = torch.randn(2, 1000).bfloat16()
    logits.copy_(values)
    ids = torch.tensor([5, 999])
    assert_same_bits([token_logprobs(logits, ids, backend=backend)], [token_logprobs(values, ids, backend=backend)])


# The same bits, always


@every_build
@dtypes
@pytest.mark.parametrize("shape", [(7, 9001), (3, 2049), (130, 513)], ids=str)
def test_repeatable(backend: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    logits, ids = (torch.randn(shape) * 3).to(dtype), torch.randint(shape[1], shape[:1])
    g, h = torch.randn(2, shape[0])
    assert_repeatable(lambda: evaluate(logits, ids, 0.9, g, h, backend=backend))


@native_builds
@dtypes
@pytest.mark.parametrize("soft_cap", [None, 9.0], ids=["as it is", "capped"])
def test_streamed_gradient(backend: str, dtype: torch.dtype, soft_cap: float | None) -> None:
    """Past 4 MiB the gradient bypasses the cache, row by row from an odd address: the same bits as row by row alone."""
    logits, ids = (torch.randn(9, 240001) * 3).to(dtype), torch.randint(240001, (9,))
    g, h = torch.randn(2, 9)
    whole = evaluate(logits, ids, 1.0, g, h, soft_cap=soft_cap, backend=backend)[-1]
    for t in range(9):
        row = slice(t, t + 1)
        alone = evaluate(logits[row], ids[row], 1.0, g[row], h[row], soft_cap=soft_cap, backend=backend)[-1]
        assert_same_bits([whole[row]], [alone], f"row {t}")


# The gradient over the logits


def in_place_and_fresh(leaf: Tensor, ids: Tensor, loss: Callable[[Tensor, TokenLogprobs], Tensor], backend: str) -> list[Tensor]:
    grads = []
    for inplace in (True, False):
        logits = leaf * 2
        out = token_logprobs(logits, ids, entropy=True, inplace_backward=inplace, backend=backend)
        grads.append(torch.autograd.grad(loss(logits, out), leaf)[0])
    return grads


@every_build
@dtypes
def test_in_place_gradient_is_the_same(backend: str, dtype: torch.dtype) -> None:
    leaf = torch.randn(5, 1003).to(dtype).requires_grad_()
    ids = torch.tensor([0, 1002, -100, 500, 7])
    in_place, fresh = in_place_and_fresh(leaf, ids, lambda _, out: (out.logprobs * out.entropy).sum(), backend)
    assert_same_bits([in_place], [fresh])


@native_form
def test_in_place_gradient_takes_no_memory(backend: str) -> None:
    seen: list[int] = []
    logits = torch.randn(3, 50, requires_grad=True) * 2
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    token_logprobs(logits, torch.tensor([1, 2, 3]), inplace_backward=True, backend=backend).sum().backward()
    assert seen == [logits.data_ptr()]


@native_form
@pytest.mark.parametrize("through_torch", [False, True], ids=["thin", "torch.library"])
def test_in_place_twice_raises(backend: str, through_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through_torch:
        monkeypatch.setattr("reinforce_ada.ops._torch.is_eager", lambda args: False)
    logits = torch.randn(3, 50, requires_grad=True) * 2
    total = token_logprobs(logits, torch.tensor([1, 2, 3]), inplace_backward=True, backend=backend).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@native_form
@pytest.mark.parametrize("through_torch", [False, True], ids=["thin", "torch.library"])
def test_in_place_with_another_reader_raises(backend: str, through_torch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The square saved the logits and is differentiated last (it was recorded first): it must not use the gradient instead."""
    if through_torch:
        monkeypatch.setattr("reinforce_ada.ops._torch.is_eager", lambda args: False)
    logits = torch.randn(3, 50, requires_grad=True) * 2
    squares = logits.square().sum()
    total = squares + token_logprobs(logits, torch.tensor([1, 2, 3]), inplace_backward=True, backend=backend).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# The gradient in memory that the caller has


@every_form
@dtypes
def test_gradient_in_given_memory(backend: str, dtype: torch.dtype) -> None:
    """Of a leaf and of what another operation computed, between rows that are not touched: the bits of a fresh one, and no copy."""
    values, ids = torch.randn(5, 1003).to(dtype), torch.tensor([0, 1002, -100, 500, 7])
    fresh = evaluate(values, ids, 0.7, *torch.ones(2, 5), backend=backend)[-1]
    memory = torch.full((5, 1003), math.nan, dtype=dtype)
    leaf = values.clone().requires_grad_()
    out = token_logprobs(leaf, ids, temperature=0.7, entropy=True, grad_out=memory, backend=backend)
    (out.logprobs + out.entropy).sum().backward()
    assert leaf.grad.data_ptr() == memory.data_ptr()
    assert_same_bits([memory], [fresh])

    wide = torch.full((5, 1100), 7.0).to(dtype)
    logits = leaf * 1
    out = token_logprobs(logits, ids, temperature=0.7, entropy=True, grad_out=wide[:, :1003], backend=backend)
    (grad,) = torch.autograd.grad((out.logprobs + out.entropy).sum(), logits)
    assert (grad.data_ptr(), grad.stride()) == (wide.data_ptr(), (1100, 1))
    assert_same_bits([grad], [fresh])
    assert (wide[:, 1003:] == 7).all()


@every_form
def test_given_memory_is_used_once(backend: str) -> None:
    """A second backward, another backward into the same memory, and a write to it in between raise instead of giving a wrong gradient."""
    logits, ids, memory = torch.randn(3, 50, requires_grad=True), torch.tensor([1, 2, 3]), torch.empty(3, 50)
    first, second = (token_logprobs(logits, ids, grad_out=memory, backend=backend).sum() for _ in range(2))
    first.backward(retain_graph=True)
    for total in (first, second):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    token_logprobs(logits, ids, grad_out=memory, backend=backend).sum().backward()


def test_grad_out_errors() -> None:
    logits, ids, memory = torch.zeros(2, 5, requires_grad=True), torch.tensor([0, 1]), torch.zeros(2, 5)
    for change, message in (
        ({"grad_out": memory, "inplace_backward": True, "logits": logits * 1}, "grad_out and inplace_backward=True; one place for"),
        ({"grad_out": memory, "logits": memory}, "grad_out for logits that need no gradient; logits.requires_grad, outside"),
        ({"grad_out": memory.double()}, "grad_out is [2, 5] float64 on cpu; [2, 5] float32 on cpu, without a gradient of its own"),
        ({"grad_out": memory[:1]}, "grad_out is [1, 5] float32 on cpu; [2, 5] float32 on cpu"),
        ({"grad_out": logits * 1}, "grad_out is [2, 5] float32 on cpu and requires a gradient; [2, 5] float32"),
        ({"grad_out": torch.zeros(5, 2).T}, "grad_out has stride (1, 2); stride 1 in the last dimension and rows of their own"),
        ({"grad_out": torch.zeros(1, 5).expand(2, 5)}, "grad_out has stride (0, 1); stride 1 in the last dimension and rows of"),
    ):
        with pytest.raises(InputError) as error:
            token_logprobs(**{"logits": logits, "token_ids": ids, **change})
        assert str(error.value).startswith(f"token_logprobs: {message}")


@every_form
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside inductor
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own, tracing the reference's Function
def test_gradient_in_given_memory_compiles(backend: str, compiler: str) -> None:
    def loss(x: Tensor, ids: Tensor, memory: Tensor) -> Tensor:
        return token_logprobs(x * 2, ids, grad_out=memory, backend=backend).sum()

    x, ids, memories = torch.randn(3, 50, requires_grad=True), torch.tensor([1, -100, 3]), torch.full((2, 3, 50), math.nan)
    (expected,) = torch.autograd.grad(loss(x, ids, memories[0]), x)
    (grad,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(x, ids, memories[1]), x)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(memories[1], memories[0])


# torch: tracing, compiling, differentiating twice


@native_form
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_opcheck(backend: str, inplace: bool) -> None:
    logits = torch.randn(4, 10).bfloat16().requires_grad_()
    ids = torch.tensor([1, -100, 3, 9])
    for temperatures, entropy in ((None, False), (torch.rand(4) + 0.5, True)):
        torch.library.opcheck(cpu_form._forward_op.op, (logits, ids, temperatures, 0.7, 0.5, 3.0, entropy, entropy, inplace, None))


@every_form
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_in_one_graph(backend: str, inplace: bool) -> None:
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        out = token_logprobs(hidden @ weight, ids, temperature=0.7, entropy=True, inplace_backward=inplace, backend=backend)
        return (out.logprobs * out.entropy).sum()

    inputs = torch.randn(6, 8, requires_grad=True), torch.randn(8, 50, requires_grad=True)
    ids = torch.tensor([1, 2, -100, 3, 49, 0])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, ids), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs, ids), inputs), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own, inside inductor
def test_compiles_with_inductor() -> None:
    def loss(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return token_logprobs(hidden @ weight, ids, inplace_backward=True, backend="cpu").square().sum()

    inputs = torch.randn(6, 8, requires_grad=True), torch.randn(8, 50, requires_grad=True)
    ids = torch.tensor([1, 2, -100, 3, 49, 0])
    expected = torch.autograd.grad(loss(*inputs, ids), inputs)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs, ids), inputs), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_calls_check_values_too() -> None:
    compiled = torch.compile(lambda x, ids: token_logprobs(x, ids, backend="cpu"), fullgraph=True, backend="aot_eager")
    with pytest.raises(InputError, match=r"token_ids\[1\] = 5; ids in \[0, 5\)"):
        compiled(torch.randn(2, 5), torch.tensor([0, 5]))


@native_form
def test_tracers_see_one_operator(backend: str) -> None:
    """make_fx on plain tensors and fake tensors: the kernel does not run behind the tracer's back. torch.func says that it cannot."""
    logits, ids = torch.randn(3, 5), torch.tensor([0, 1, 2])

    def total(x: Tensor) -> Tensor:
        return token_logprobs(x, ids, backend=backend).sum()

    graph = make_fx(total)(logits)
    assert torch.ops.reinforce_ada.token_logprobs.default in [node.target for node in graph.graph.nodes]
    with FakeTensorMode() as mode:
        assert token_logprobs(mode.from_tensor(logits), mode.from_tensor(ids), backend=backend).shape == (3,)
    with pytest.raises(InputError, match=r"a transform of torch\.func"):
        torch.func.grad(total)(logits)


def test_second_derivative_raises() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([1, 2]), backend="cpu")
    (grad,) = torch.autograd.grad(logprobs.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


# Errors: one line each

LOGITS, IDS = torch.zeros(2, 5), torch.tensor([0, 1])
ERRORS = [
    ({"logits": torch.zeros(5)}, "logits is [5] float32 on cpu; [rows, columns] of a floating dtype; flatten with x.flatten(0, -2)"),
    ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, "logits is [2, 5] int64 on cpu; [rows, columns] of a floating dtype; flatten"),
    ({"logits": torch.zeros(5, 2).T}, "logits has stride (1, 2); stride 1 in the last dimension; logits.contiguous()"),
    ({"logits": torch.zeros(2, 0)}, "logits of an empty vocabulary; V >= 1"),
    ({"token_ids": torch.tensor([0])}, "token_ids is [1] int64 on cpu; [2] int64 or int32 on cpu"),
    ({"token_ids": torch.tensor([0.0, 1])}, "token_ids is [2] float32 on cpu; [2] int64 or int32 on cpu"),
    ({"token_ids": torch.tensor([0, 1], device="meta")}, "token_ids is [2] int64 on meta; [2] int64 or int32 on cpu"),
    ({"token_ids": torch.tensor([4, 5])}, "token_ids[1] = 5; ids in [0, 5), or -100 to ignore a row"),
    ({"token_ids": torch.tensor([-1, 0])}, "token_ids[0] = -1; ids in [0, 5), or -100 to ignore a row"),
    ({"temperature": 0.0}, "temperature=0.0; a positive finite number"),
    ({"temperature": math.nan}, "temperature=nan; a positive finite number"),
    ({"temperature": math.inf}, "temperature=inf; a positive finite number"),
    ({"logit_scale": math.inf}, "logit_scale=inf, soft_cap=None; a finite scale, and None or a positive finite soft cap"),
    ({"logit_scale": math.nan}, "logit_scale=nan, soft_cap=None; a finite scale"),
    ({"soft_cap": 0.0}, "logit_scale=1.0, soft_cap=0.0; a finite scale, and None or a positive finite soft cap"),
    ({"soft_cap": math.inf}, "logit_scale=1.0, soft_cap=inf; a finite scale"),
    ({"temperature": torch.ones(3)}, "temperature is [3] float32 on cpu; a number, or a floating tensor [2] on cpu"),
    ({"temperature": torch.tensor([1.0, -1])}, "temperature[1] = -1.0; positive finite temperatures"),
    ({"temperature": torch.ones(2, requires_grad=True)}, "temperature requires a gradient; one without: it is a constant here"),
]


@every_form
@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message.split(";")[0] for _, message in ERRORS])
def test_errors(backend: str, change: dict[str, object], message: str) -> None:
    arguments = {"logits": LOGITS, "token_ids": IDS, **change}
    with pytest.raises(InputError) as error:
        token_logprobs(**arguments, backend=backend)
    assert str(error.value).startswith(f"token_logprobs: {message}")
    assert "\n" not in str(error.value)


def test_in_place_errors() -> None:
    with pytest.raises(InputError, match="with logits that are a leaf; logits computed by another operation"):
        token_logprobs(torch.zeros(2, 5, requires_grad=True), IDS, inplace_backward=True)
    with pytest.raises(InputError, match="with rows that overlap"):
        token_logprobs(torch.zeros(1, 5).expand(2, 5), IDS, inplace_backward=True)


def test_one_column_may_have_any_stride() -> None:
    column = torch.zeros(3, 7)[:, 2:3]
    assert token_logprobs(column, torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_agrees_with_cross_entropy() -> None:
    logits, ids = torch.randn(6, 11), torch.tensor([0, 1, -100, 3, 4, 10])
    torch.testing.assert_close(-token_logprobs(logits, ids), F.cross_entropy(logits, ids, reduction="none"))
