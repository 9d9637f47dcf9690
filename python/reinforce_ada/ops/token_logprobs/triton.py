"""token_logprobs in Triton: one program per row sweeps it once; the gradient has one program per block of a row.

Entry points: `forward_kernel` with grid (T,) and `gradient_kernel` with grid (T, ceil(V / BLOCK)), THREADS threads each.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from reinforce_ada.ops import _checks
from reinforce_ada.ops._gpu import guard
from reinforce_ada.ops._triton import LN2, LOG2_E, head, head_and_slope, launch_options, vanishing
from reinforce_ada.ops.token_logprobs.contract import GradientInputs, Inputs, Scores
from reinforce_ada.ops.token_logprobs.gpu import NORMALIZERS, empty_normalizers

__all__ = ["NORMALIZERS", "empty_normalizers", "forward", "gradient"]

THREADS = 256
BLOCK = 4096  # logits that a program holds at once, 16 a thread: with 32 the half-precision forward spills registers under a soft cap
IGNORED = tl.constexpr(_checks.IGNORED)


def width(dtype: torch.dtype) -> int:
    """Return how many logits the threads of a program load in one instruction, 16 bytes each."""
    return THREADS * (16 // dtype.itemsize)


def rest(number: float) -> float:
    """Return what is left of a number after rounding to float32, in which Triton passes numbers."""
    return number - ctypes.c_float(number).value


def forward(x: Inputs, out: Scores, row_max: Tensor, log2_sum: Tensor) -> None:
    """See contract.Kernels."""
    logits = x.logits
    num_tokens, vocab = logits.shape
    if num_tokens == 0:
        return
    with guard(logits):
        forward_kernel[(num_tokens,)](
            *(logits, logits.stride(0), vocab, x.token_ids, row_max if x.temperatures is None else x.temperatures),
            *(x.temperature, rest(x.temperature), x.logit_scale, rest(x.logit_scale), x.soft_cap),
            *(out.logprobs, row_max, log2_sum, out.entropy, out.sum_p2),
            HAS_TEMPERATURES=x.temperatures is not None,
            HAS_CAP=x.soft_cap != 0,
            WITH_ENTROPY=x.entropy,
            WITH_SUM_P2=x.sum_p2,
            BLOCK=BLOCK,
            WIDTH=width(logits.dtype),
            **launch_options(THREADS),
        )


def gradient(grad: Tensor, x: GradientInputs, row_max: Tensor, log2_sum: Tensor) -> None:
    """See contract.Kernels."""
    logits = x.logits
    num_tokens, vocab = logits.shape
    if num_tokens == 0:
        return
    with guard(logits):
        gradient_kernel[(num_tokens, triton.cdiv(vocab, BLOCK))](
            *(grad, grad.stride(0), logits, logits.stride(0), vocab, x.token_ids, row_max if x.temperatures is None else x.temperatures),
            *(x.temperature, x.logit_scale, x.soft_cap, row_max, log2_sum, x.entropy),
            *(row_max if g is None else g for g in (x.grad_logprobs, x.grad_entropy)),
            HAS_TEMPERATURES=x.temperatures is not None,
            HAS_CAP=x.soft_cap != 0,
            HAS_GRAD_LOGPROBS=x.grad_logprobs is not None,
            HAS_GRAD_ENTROPY=x.grad_entropy is not None,
            BLOCK=BLOCK,
            **launch_options(THREADS),
        )


@triton.jit
def forward_kernel(
    logits,
    row_stride,
    vocab,
    token_ids,
    temperatures,
    temperature,
    temperature_rest,
    logit_scale,
    logit_scale_rest,
    soft_cap,
    logprobs,
    row_max,
    log2_sum,
    entropy,
    sum_p2,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_SUM_P2: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the results of one row, float32 [T] (entropy and sum_p2 only if requested).

    logits [T, V] has rows `row_stride` apart; token_ids are int64 [T], temperatures float32 [T] (read if HAS_TEMPERATURES). `_rest` is what
    is left of the number before it after rounding to float32.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row)
    if token == IGNORED:
        largest = 0.0
        log2_total = 0.0
        logprob = 0.0
        h = 0.0
        p2 = 0.0
    else:
        t = _temperature(temperatures, temperature, row, HAS_TEMPERATURES)
        unit = _unit(logit_scale, HAS_CAP)
        x = logits + row * row_stride
        largest, total, weighted, squares = _sweep(
            x, vocab, logit_scale, soft_cap, unit * LOG2_E / t, HAS_CAP, WITH_ENTROPY, WITH_SUM_P2, BLOCK, WIDTH
        )
        log2_total = tl.math.log2(total)
        known = (token >= 0) & (token < vocab)
        z = _logit(tl.load(x + token, mask=known, other=0.0), logit_scale, soft_cap, HAS_CAP)
        # In float64: a logprob of -400 would lose its last digit several times on the way, scale and temperature included.
        exact_unit = unit.to(tl.float64)
        exact_t = t.to(tl.float64)
        if not HAS_CAP:
            exact_unit += tl.where(logit_scale < 0.0, -logit_scale_rest, logit_scale_rest)
        if not HAS_TEMPERATURES:
            exact_t += temperature_rest
        log_p = (z.to(tl.float64) - largest) * exact_unit / exact_t - LN2 * log2_total.to(tl.float64)
        logprob = tl.where(known, log_p.to(tl.float32), float("nan"))
        h = LN2 * (log2_total - weighted / total)
        p2 = squares / (total * total)
    tl.store(logprobs + row, logprob)
    tl.store(row_max + row, largest)
    tl.store(log2_sum + row, log2_total)
    if WITH_ENTROPY:
        tl.store(entropy + row, h)
    if WITH_SUM_P2:
        tl.store(sum_p2 + row, p2)


@triton.jit
def _temperature(temperatures, temperature, row, HAS_TEMPERATURES: tl.constexpr):
    """Return the temperature of the row, NaN unless it is positive and finite."""
    if HAS_TEMPERATURES:
        t = tl.load(temperatures + row)
        return tl.where((t > 0.0) & (t < float("inf")), t, float("nan"))
    return temperature


@triton.jit
def _unit(logit_scale, HAS_CAP: tl.constexpr):
    """Return the factor by which `_logit` is multiplied to give z."""
    if HAS_CAP:
        return tl.full([], 1.0, tl.float32)
    return tl.abs(logit_scale)


@triton.jit
def _logit(x, logit_scale, soft_cap, HAS_CAP: tl.constexpr):
    """Return z in a unit that leaves logits as they are without a cap, so that their differences are exact where they matter."""
    if HAS_CAP:
        return head(x, logit_scale, soft_cap, HAS_CAP)
    v = x.to(tl.float32)
    return tl.where(logit_scale < 0.0, -v, v)


@triton.jit
def _sweep(
    x,
    vocab,
    logit_scale,
    soft_cap,
    log2_scale,
    HAS_CAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_SUM_P2: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return (max z, S 2^d, S d 2^d, S 4^d) over the row, d = (z - max z) log2_scale, z in the unit of `_logit`."""
    # A state a lane, so that threads need each other only at the end.
    largest = tl.full([WIDTH], float("-inf"), tl.float32)
    total = tl.zeros([WIDTH], tl.float32)
    weighted = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    columns = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):  # without a mask, which would cost the wide loads where V is not a multiple of 16
        z = _logit(tl.load(x + start + columns), logit_scale, soft_cap, HAS_CAP)
        largest, total, weighted, squares = _add(z, log2_scale, largest, total, weighted, squares, WITH_ENTROPY, WITH_SUM_P2)
    if whole < vocab:
        inside = columns < vocab - whole
        z = _logit(tl.load(x + whole + columns, mask=inside, other=0.0), logit_scale, soft_cap, HAS_CAP)
        z = tl.where(inside, z, float("-inf"))
        largest, total, weighted, squares = _add(z, log2_scale, largest, total, weighted, squares, WITH_ENTROPY, WITH_SUM_P2)
    row_largest = tl.max(largest, axis=0)
    shift, factor = _shift(largest, row_largest, log2_scale)
    return (
        row_largest,
        tl.sum(total * factor, axis=0),
        tl.sum((weighted + shift * total) * factor, axis=0),
        tl.sum(squares * factor * factor, axis=0),
    )


@triton.jit
def _add(z, log2_scale, largest, total, weighted, squares, WITH_ENTROPY: tl.constexpr, WITH_SUM_P2: tl.constexpr):
    """Return the state of the lanes after the logits z [rounds, WIDTH], relative to the new largest."""
    new = tl.maximum(largest, tl.max(z, axis=0))
    shift, factor = _shift(largest, new, log2_scale)
    d = (z - _anchor(new)[None, :]) * log2_scale
    power = tl.math.exp2(d)
    if WITH_ENTROPY:
        # A forbidden token adds nothing, not -inf 0.
        weighted = (weighted + shift * total) * factor + tl.sum(tl.where(d == float("-inf"), 0.0, d) * power, axis=0)
    if WITH_SUM_P2:
        squares = squares * factor * factor + tl.sum(power * power, axis=0)
    return new, total * factor + tl.sum(power, axis=0), weighted, squares


@triton.jit
def _shift(largest, new, log2_scale):
    """Return the change of d when the largest logit changes, and 2 to that power; no change where no logit was seen that could count."""
    shift = tl.where(largest == float("-inf"), 0.0, (largest - _anchor(new)) * log2_scale)
    shift = vanishing(shift)
    return shift, tl.math.exp2(shift)


@triton.jit
def _anchor(largest):
    """Return the largest logit, or 0 where all are -inf, since the difference to -inf would not be a number."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def gradient_kernel(
    grad,
    grad_stride,
    logits,
    row_stride,
    vocab,
    token_ids,
    temperatures,
    temperature,
    logit_scale,
    soft_cap,
    row_max,
    log2_sum,
    entropy,
    grad_logprobs,
    grad_entropy,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_GRAD_LOGPROBS: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of BLOCK logits of a row.

    grad and logits [T, V] may be the same tensor; their rows are `grad_stride` and `row_stride` apart. The normalizers and the incoming
    gradients are float32 [T]; entropy is read if HAS_GRAD_ENTROPY.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = tl.arange(0, BLOCK)
    inside = columns < vocab - start
    out = grad + row * grad_stride + start
    token = tl.load(token_ids + row)
    g = 0.0
    h = 0.0
    if HAS_GRAD_LOGPROBS:
        g = tl.load(grad_logprobs + row)
    if HAS_GRAD_ENTROPY:
        h = tl.load(grad_entropy + row)
    if (token == IGNORED) | ((g == 0.0) & (h == 0.0)):
        tl.store(out + columns, tl.zeros([BLOCK], grad.dtype.element_ty), mask=inside)
    else:
        t = _temperature(temperatures, temperature, row, HAS_TEMPERATURES)
        known = (token >= 0) & (token < vocab)
        g = tl.where(known | (g == 0.0), g, float("nan"))
        largest = tl.load(row_max + row)
        log2_total = tl.load(log2_sum + row)
        row_entropy = 0.0
        if HAS_GRAD_ENTROPY:
            row_entropy = tl.load(entropy + row)
        x = logits + row * row_stride + start
        if vocab - start >= BLOCK:  # without a mask, as in the forward
            dx = _derivative(
                tl.load(x + columns), columns == token - start, t, logit_scale, soft_cap, largest, log2_total, row_entropy, g, h, HAS_CAP,
                HAS_GRAD_ENTROPY,
            )  # fmt: skip
            tl.store(out + columns, dx.to(grad.dtype.element_ty))
        else:
            dx = _derivative(
                tl.load(x + columns, mask=inside, other=0.0), columns == token - start, t, logit_scale, soft_cap, largest, log2_total,
                row_entropy, g, h, HAS_CAP, HAS_GRAD_ENTROPY,
            )  # fmt: skip
            tl.store(out + columns, dx.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _derivative(
    x,
    is_token,
    t,
    logit_scale,
    soft_cap,
    largest,
    log2_total,
    row_entropy,
    g,
    h,
    HAS_CAP: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
):
    """Return the gradient of the logits x."""
    slope = logit_scale / t
    if HAS_CAP:
        z, bend = head_and_slope(x, logit_scale, soft_cap, HAS_CAP)
        slope = slope * bend
    else:
        z = _logit(x, logit_scale, soft_cap, HAS_CAP)
    log2_p = (z - largest) * (_unit(logit_scale, HAS_CAP) * LOG2_E / t) - log2_total
    pull = g
    if HAS_GRAD_ENTROPY:
        pull = g + h * (LN2 * tl.where(log2_p == float("-inf"), 0.0, log2_p) + row_entropy)
    return (tl.where(is_token, g, 0.0) - tl.math.exp2(log2_p) * pull) * slope
