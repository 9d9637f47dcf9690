"""The three products of an output head: every element against float64, in every build, and not a byte beside them."""

from __future__ import annotations

import pytest
import torch
from conformance import Build, assert_no_worse, assert_same_bits, builds, poisoned_memory, threads, using
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reinforce_ada.ops._native import cpu
from reinforce_ada.ops._products import LANES, Hidden, add_hidden_gradient, logits_dtype
from reinforce_ada.ops._torch import DTYPE_CODES

native_build = pytest.mark.parametrize("build", builds("linear_token_logprobs", reference=False))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
PRODUCTS = ("logits", "hidden", "weight")

# Tiles are 4 or 8 rows by 16, 32 or 48 columns; 3001 rows are several strips, 400 rows several depths of the gradient of hidden.
shapes = st.tuples(st.integers(1, 100), st.integers(1, 70), st.integers(1, 130))
CORNERS = [(1, 1, 1), (1, 17, 48), (48, 8, 16), (49, 9, 47), (96, 400, 49), (3, 3001, 20), (97, 1, 1), (1, 1, 3001), (130, 401, 97)]


def guarded(values: Tensor, stride: int, offset: int) -> tuple[Tensor, Tensor]:
    """The same [rows, columns], rows `stride` apart in a larger field of NaN; and that field."""
    rows, columns = values.shape
    field = torch.full((offset + rows * stride + 67,), torch.nan, dtype=values.dtype)
    view = field[offset:].as_strided((rows, columns), (stride, 1))
    view.copy_(values)
    return view, field


def assert_untouched(field: Tensor, view: Tensor) -> None:
    """Whatever is not in the view is still NaN."""
    view.fill_(torch.nan)
    assert field.isnan().all()


class Inputs:
    """hidden [T, D], weight [V, D], dz [T, V], bias [V], all with guard zones; rows `gap` elements apart."""

    def __init__(self, tokens: int, rows: int, width: int, dtype: torch.dtype, gap: int) -> None:
        self.tokens, self.rows, self.width, self.dtype, self.gap = tokens, rows, width, dtype, gap
        self.hidden, _ = guarded(torch.randn(tokens, width).to(dtype), width + gap, 3)
        self.weight, _ = guarded(torch.randn(rows, width).to(dtype), width + 2 * gap, 5)
        self.dz, _ = guarded(torch.randn(tokens, rows), rows + gap, 1)
        bias, _ = guarded(torch.randn(1, rows), rows, 7)
        self.bias = bias[0]
        self.before = {"hidden": torch.randn(tokens, width), "weight": torch.randn(rows, width).to(dtype)}

    def truth(self, product: str, start: bool, dtype: torch.dtype) -> Tensor:
        """In `dtype`; from float64, or as plain torch computes it in float32."""
        hidden, weight, dz, bias = (x.to(dtype) for x in (self.hidden, self.weight, self.dz, self.bias))
        if product == "logits":
            return hidden @ weight.T + (bias if start else 0)
        if product == "hidden":
            return self.before["hidden"].to(dtype) + dz @ weight
        return dz.T @ hidden + (0 if start else self.before["weight"].to(dtype))

    def magnitude(self, product: str) -> float:
        """Largest sum of the absolute terms: two steps of float32 there are what is allowed beside plain torch."""
        hidden, weight, dz = (x.double().abs() for x in (self.hidden, self.weight, self.dz))
        sums = {"logits": lambda: hidden @ weight.T, "hidden": lambda: dz @ weight, "weight": lambda: dz.T @ hidden}[product]()
        return 1 + sums.max().item()

    def native(self, product: str, start: bool) -> Tensor:
        """`start`: with a bias, or written as the first; checks that only the result was written."""
        run = {"logits": self.logits, "hidden": self.grad_hidden, "weight": self.grad_weight}[product]
        out, field = run(start)
        result = out.clone()
        assert_untouched(field, out)
        return result

    def sizes(self) -> tuple[int, int, int]:
        return self.tokens, self.rows, self.width

    def matrix(self, x: Tensor) -> tuple[int, int]:
        return x.data_ptr(), DTYPE_CODES[x.dtype]

    def logits(self, with_bias: bool) -> tuple[Tensor, Tensor]:
        size = -(-self.tokens // LANES) * LANES * self.width
        packed, of_packed = guarded(torch.zeros(1, size), size, 2)
        packed.fill_(torch.nan)
        source, strides = self.matrix(self.hidden), (self.hidden.stride(0), self.weight.stride(0))
        cpu.pack_hidden(*source, self.tokens, self.width, strides[0], packed.data_ptr(), torch.get_num_threads())
        out, field = guarded(torch.zeros(self.tokens, self.rows), self.rows + self.gap, 9)
        out.fill_(torch.nan)
        bias = self.bias.data_ptr() if with_bias else 0
        cpu.linear_logits(
            packed.data_ptr(), *self.matrix(self.weight), bias, *self.sizes(), strides[1], out.data_ptr(), out.stride(0),
            torch.get_num_threads(),
        )  # fmt: skip
        assert_untouched(of_packed, packed)
        return out, field

    def grad_hidden(self, _: bool) -> tuple[Tensor, Tensor]:
        out, field = guarded(self.before["hidden"], self.width, 9)
        cpu.linear_grad_hidden(
            self.dz.data_ptr(), self.dz.stride(0), *self.matrix(self.weight), *self.sizes(), self.weight.stride(0), out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out, field

    def grad_weight(self, first: bool) -> tuple[Tensor, Tensor]:
        out, field = guarded(self.before["weight"], self.width, 9)
        if first:
            out.fill_(torch.nan)  # what was there does not matter
        cpu.linear_grad_weight(
            self.dz.data_ptr(), self.dz.stride(0), *self.matrix(self.hidden), *self.sizes(), self.hidden.stride(0), out.data_ptr(), first,
            torch.get_num_threads(),
        )  # fmt: skip
        return out, field


def check(inputs: Inputs, product: str, start: bool) -> None:
    got = inputs.native(product, start)
    truth, plain = inputs.truth(product, start, torch.float64), inputs.truth(product, start, torch.float32).to(got.dtype)
    # One accumulator where torch has several: over 4000 random shapes further off by up to 1.42 eps of the largest sum, 8 times past 1.
    assert_no_worse(got, truth, plain, 2 * torch.finfo(torch.float32).eps * inputs.magnitude(product), product)


@native_build
@dtypes
@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(0, 5), st.booleans(), st.sampled_from(PRODUCTS))
def test_products(build: Build, dtype: torch.dtype, shape: tuple[int, int, int], gap: int, start: bool, product: str) -> None:
    """No further from float64 than torch's float32 product plus two steps of the largest sum; guard zones stay as they are."""
    with using(build):
        check(Inputs(*shape, dtype, gap), product, start)


@native_build
@dtypes
@pytest.mark.parametrize("shape", CORNERS, ids=str)
def test_corners(build: Build, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    with using(build):
        inputs = Inputs(*shape, dtype, 1)
        for product in PRODUCTS:
            for start in (True, False):
                check(inputs, product, start)


@native_build
@dtypes
def test_long_sums(build: Build, dtype: torch.dtype) -> None:
    """4096 terms, added one after another in float32: as good as torch's."""
    with using(build):
        for product, shape in {"logits": (17, 9, 4096), "hidden": (9, 4096, 17), "weight": (4096, 9, 17)}.items():
            check(Inputs(*shape, dtype, 0), product, True)


@native_build
@dtypes
def test_nothing_to_do(build: Build, dtype: torch.dtype) -> None:
    with using(build):
        for shape in ((0, 5, 3), (3, 0, 5), (3, 5, 0)):
            inputs = Inputs(*shape, dtype, 0)
            for product in PRODUCTS:
                torch.testing.assert_close(inputs.native(product, True).double(), inputs.truth(product, True, torch.float64))


@native_build
@dtypes
def test_results_do_not_depend_on_threads_or_memory(build: Build, dtype: torch.dtype) -> None:
    """Past the grain below which the work stays on one thread."""
    with using(build):
        inputs = Inputs(131, 1003, 101, dtype, 0)

        def run() -> list[Tensor]:
            return [inputs.native(product, start) for product in PRODUCTS for start in (True, False)]

        first = run()
        with threads(2):
            assert_same_bits(first, run(), "two threads")
        with poisoned_memory():
            assert_same_bits(first, run(), "poisoned memory")


@native_build
def test_a_row_does_not_depend_on_the_others(build: Build) -> None:
    """So chunks of tokens and pieces of the vocabulary give the same bits as the whole, where a sum is not cut."""
    with using(build):
        whole = Inputs(60, 50, 33, torch.float32, 0)
        logits, of_hidden, of_weight = (whole.native(product, True) for product in PRODUCTS)
        for tokens, rows in ((slice(0, 48), slice(0, 50)), (slice(48, 60), slice(0, 50)), (slice(0, 60), slice(16, 37))):
            part = Inputs(len(range(60)[tokens]), len(range(50)[rows]), 33, torch.float32, 0)
            part.hidden, part.weight, part.bias = whole.hidden[tokens], whole.weight[rows], whole.bias[rows]
            part.dz, part.before["hidden"] = whole.dz[tokens, rows], whole.before["hidden"][tokens]
            assert_same_bits([part.native("logits", True)], [logits[tokens, rows]], "logits")
            if rows == slice(0, 50):
                assert_same_bits([part.native("hidden", True)], [of_hidden[tokens]], "hidden")
            if tokens == slice(0, 60):
                assert_same_bits([part.native("weight", True)], [of_weight[rows]], "weight")


# As the operators call them: bfloat16 goes through torch


def through_the_operators(inputs: Inputs) -> list[Tensor]:
    """Logits with and without bias; the gradients, of hidden added to, of weight first written and then added to."""
    dtype = logits_dtype(inputs.dtype)
    rows = Hidden(inputs.hidden)
    buffer = torch.full((inputs.tokens * inputs.rows + 5,), torch.nan, dtype=dtype)
    results = []
    for bias in (inputs.bias.to(dtype), None):
        logits = rows.logits(inputs.weight, bias, buffer)
        assert logits.data_ptr() == buffer.data_ptr()
        assert buffer[inputs.tokens * inputs.rows :].isnan().all()
        results.append(logits.clone())
    dz = inputs.dz.to(dtype)
    of_hidden, of_weight = inputs.before["hidden"].clone(), torch.full_like(inputs.before["weight"], torch.nan)
    add_hidden_gradient(dz, inputs.weight, of_hidden)
    rows.add_weight_gradient(dz, of_weight, first=True)
    results += [of_hidden, of_weight.clone()]
    rows.add_weight_gradient(dz, of_weight, first=False)
    return [*results, of_weight]


@native_build
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 37, 19), (19, 1, 33), (49, 131, 97)], ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_through_the_operators(build: Build, dtype: torch.dtype, shape: tuple[int, int, int], gap: int) -> None:
    """In bfloat16 each result, and the sum it is added to, is rounded once more than plain float32 products are."""
    with using(build):
        inputs = Inputs(*shape, dtype, gap)
        inputs.dz = inputs.dz.to(logits_dtype(dtype)).float()
        got = through_the_operators(inputs)
    calls = [("logits", True), ("logits", False), ("hidden", True), ("weight", True), ("weight", True)]
    for i, (actual, (product, start)) in enumerate(zip(got, calls, strict=True)):
        factor = 2 if i == 4 else 1  # the gradient of the weight, added a second time
        truth, plain = (factor * inputs.truth(product, start, kind) for kind in (torch.float64, torch.float32))
        eps = torch.finfo(torch.float32 if dtype == torch.float16 and product != "weight" else dtype).eps
        assert_no_worse(actual, truth, plain, 2 * eps * inputs.magnitude(product), product)


@dtypes
@pytest.mark.parametrize("width", [32, 33, 97, 100])
def test_a_row_that_is_not_finite_stays_alone(dtype: torch.dtype, width: int) -> None:
    """Torch's own bfloat16 product fails this with AMX, where `width` is no multiple of 32."""
    inputs = Inputs(7, 40, width, dtype, 0)
    inputs.hidden[3] = torch.nan
    inputs.dz[3] = torch.inf
    inputs.dz = inputs.dz.to(logits_dtype(dtype))
    buffer = torch.empty(7 * 40, dtype=logits_dtype(dtype))
    logits = Hidden(inputs.hidden).logits(inputs.weight, None, buffer)
    add_hidden_gradient(inputs.dz, inputs.weight, inputs.before["hidden"])
    others = [0, 1, 2, 4, 5, 6]
    assert logits[others].isfinite().all()
    assert inputs.before["hidden"][others].isfinite().all()
    assert logits[3].isnan().all()


@dtypes
def test_what_hidden_states_hold_beside_them(dtype: torch.dtype) -> None:
    for width in (7, 32, 33):
        given = torch.zeros(LANES * 2, width, dtype=dtype)
        rows = Hidden(given)
        copied = 0 if rows.rows is given else rows.rows.untyped_storage().nbytes()
        held = copied + (0 if rows._packed is None else rows._packed.nbytes)
        assert held == Hidden.bytes_per_token(dtype, width) * LANES * 2
