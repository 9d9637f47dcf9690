"""`token_logprobs`: literal tables, and the error of every build against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from conformance import Build, assert_repeatable, assert_same_bits, builds, using
from hypothesis import given, settings
from hypothesis import strategies as st
from token_logprobs_scene import LN2, LN3, SHAPES, assert_conforms, dtypes, evaluate, every_build, every_form, native_builds
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import TokenLogprobs, token_logprobs

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
