"""group_advantages in Triton: a program for each segment of rows, moments in float64.

Entry points, with parts float64 [P, 3], P <= SURVEYS, and settled float64 [2]; the first two only for the scale "batch" and without order:

    survey_kernel, grid (P,)    a look at all rewards and offsets: sum and sum of squares of r - rewards[0], how many offsets are wrong
    settle_kernel, grid (1,)    of all parts: the divisor of the batch, how many offsets are wrong
    rows_kernel, grid (S,)      the advantages of one segment
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from reinforce_ada.ops._gpu import guard
from reinforce_ada.ops._triton import launch_options
from reinforce_ada.ops.group_advantages.checks import BASELINES, SCALES
from reinforce_ada.ops.group_advantages.contract import Inputs
from reinforce_ada.ops.group_advantages.gpu import in_segments

THREADS, BLOCK = 32, 32  # of a segment: groups are mostly of 4 to 32 rows
LONG_THREADS, LONG_BLOCK = 256, 1024  # where they are longer
LONG = 1024  # than this on average
SURVEYS, SURVEY_THREADS, SURVEY_BLOCK = 256, 256, 1024

LEAVE_ONE_OUT, VALUES = tl.constexpr(BASELINES.index("leave-one-out")), tl.constexpr(len(BASELINES))
GROUP = tl.constexpr(BASELINES.index("group"))
SCALE_NONE, SCALE_POOL, SCALE_GROUP, SCALE_BATCH = (tl.constexpr(i) for i in range(len(SCALES)))

_WORKSPACE = 3 * SURVEYS + 2


class Rows(NamedTuple):
    """The rewards [N], and which of them a segment has: order int64 [N] where ORDERED, offsets int64 [S + 1]."""

    rewards: Any
    order: Any
    offsets: Any


class Given(NamedTuple):
    """Float64 of the segments: what is known of their pools and baseline_values [S], class_weights [S, 2]."""

    pool_count: Any
    pool_mean: Any
    pool_m2: Any
    pool_min: Any
    pool_max: Any
    baseline_values: Any
    class_weights: Any


class Choices(NamedTuple):
    """What rows_kernel is compiled for."""

    ORDERED: bool
    SURVEYED: bool
    HAS_POOL: bool
    HAS_WEIGHTS: bool
    BASELINE: int
    SCALE: int
    KEEP_SINGLE: bool


def advantages(x: Inputs) -> Tensor:
    """Return the advantages, [N] in the dtype of the rewards; NaN for rows out of range."""
    return in_segments(x, _launch, _WORKSPACE)


def _launch(x: Inputs, order: Tensor | None, offsets: Tensor, workspace: Tensor, out: Tensor) -> None:
    rewards, num_rows, num_segments = x.rewards, x.rewards.shape[0], offsets.shape[0] - 1
    if num_rows == 0 or num_segments == 0:
        return
    parts, settled = workspace.split([3 * SURVEYS, 2])
    by_batch = x.scale == SCALE_BATCH.value
    surveyed = by_batch or order is None
    choices = Choices(
        ORDERED=order is not None,
        SURVEYED=surveyed,
        HAS_POOL=x.pool_min is not None,
        HAS_WEIGHTS=x.class_weights is not None,
        BASELINE=x.baseline,
        SCALE=x.scale,
        KEEP_SINGLE=x.keep_single,
    )
    long = num_rows > LONG * num_segments
    with guard(rewards):
        if surveyed:
            num_parts = min(SURVEYS, int(triton.cdiv(max(num_rows, num_segments), SURVEY_BLOCK)))
            chosen: dict[str, Any] = {"ORDERED": order is not None, "BY_BATCH": by_batch}
            survey_kernel[(num_parts,)](
                *(rewards, offsets, num_rows, num_segments, parts), BLOCK=SURVEY_BLOCK, **chosen, **launch_options(SURVEY_THREADS)
            )
            settle_kernel[(1,)](
                *(parts, num_parts, num_rows, x.ddof, x.eps, settled), SURVEYS=SURVEYS, BY_BATCH=by_batch, **launch_options(SURVEY_THREADS)
            )
        rows_kernel[(num_segments,)](
            *(Rows(rewards, offsets if order is None else order, offsets), Given(*(settled if s is None else s for s in x.statistics))),
            *(x.ddof, x.eps, settled, out),
            CHOICES=choices,
            BLOCK=LONG_BLOCK if long else BLOCK,
            **launch_options(LONG_THREADS if long else THREADS),
        )


@triton.jit
def survey_kernel(rewards, offsets, num_rows, num_segments, parts, ORDERED: tl.constexpr, BY_BATCH: tl.constexpr, BLOCK: tl.constexpr):
    """Write one part, of every SURVEYS-th block of rewards and of offsets."""
    part = tl.program_id(0)
    stride = tl.num_programs(0) * BLOCK
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    wrong = tl.zeros([BLOCK], tl.float64)
    if BY_BATCH:
        # Relative to some reward, so that a large mean does not drown the spread; one that all share leaves exactly 0.
        origin = tl.load(rewards).to(tl.float64)
        for start in range(part.to(tl.int64) * BLOCK, num_rows, stride):
            inside = start + lanes < num_rows
            r = tl.load(rewards + start + lanes, mask=inside, other=0.0).to(tl.float64)
            r = tl.where(inside, r - origin, 0.0)
            sums += r
            squares += r * r
    if not ORDERED:
        for start in range(part.to(tl.int64) * BLOCK, num_segments, stride):
            i = start + lanes
            inside = i < num_segments
            begin = tl.load(offsets + i, mask=inside, other=0)
            end = tl.load(offsets + i + 1, mask=inside, other=0)
            bad = (begin > end) | ((i == 0) & (begin != 0)) | ((i == num_segments - 1) & (end != num_rows))
            wrong += (bad & inside).to(tl.float64)
    tl.store(parts + 3 * part, tl.sum(sums, axis=0))
    tl.store(parts + 3 * part + 1, tl.sum(squares, axis=0))
    tl.store(parts + 3 * part + 2, tl.sum(wrong, axis=0))


@triton.jit
def settle_kernel(parts, num_parts, num_rows, ddof, eps, settled, SURVEYS: tl.constexpr, BY_BATCH: tl.constexpr):
    """Write what the parts make together."""
    lanes = tl.arange(0, SURVEYS)
    part = parts + 3 * lanes
    inside = lanes < num_parts
    divisor = tl.full([], 1.0, tl.float64)
    if BY_BATCH:
        total = tl.sum(tl.load(part, mask=inside, other=0.0), axis=0)
        squares = tl.sum(tl.load(part + 1, mask=inside, other=0.0), axis=0)
        divisor = _divisor(squares - total * total / num_rows, num_rows + tl.zeros([], tl.float64), ddof, eps, squares != 0.0)
    tl.store(settled, divisor)
    tl.store(settled + 1, tl.sum(tl.load(part + 2, mask=inside, other=0.0), axis=0))


@triton.jit
def _divisor(m2, count, ddof, eps, spread):
    """Return std + eps; 1 where there is no spread to divide by."""
    degrees = count - ddof
    std = tl.sqrt(tl.where(m2 < 0.0, 0.0, m2) / tl.maximum(degrees, 1.0))
    return tl.where((degrees > 0.0) & spread, std + eps, 1.0)


@triton.jit
def _rows(rows, start, end, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    """Return (where the rows of a block lie, whether they are in the segment, their rewards)."""
    at = start + tl.arange(0, BLOCK)
    inside = at < end
    row = tl.load(rows.order + at, mask=inside, other=0) if ORDERED else at
    return row, inside, tl.load(rows.rewards + row, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _own_mean(rows, begin, end, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    """Return (count, mean, whether they differ) of the rewards of a segment."""
    total = tl.zeros([BLOCK], tl.float64)
    smallest = tl.full([BLOCK], float("inf"), tl.float64)
    largest = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(begin, end, BLOCK):
        _, inside, r = _rows(rows, start, end, BLOCK, ORDERED)
        total += r
        smallest = tl.minimum(smallest, tl.where(inside, r, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, r, float("-inf")))
    own_count = (end - begin).to(tl.float64)
    own_mean = tl.sum(total, axis=0) / tl.maximum(own_count, 1.0)
    return own_count, own_mean, (tl.min(smallest, axis=0) != tl.max(largest, axis=0)) | (own_mean != own_mean)


@triton.jit
def _own_squares(rows, begin, end, own_mean, BLOCK: tl.constexpr, ORDERED: tl.constexpr):
    """The sum of squares of the rewards of a segment about their mean."""
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        _, inside, r = _rows(rows, start, end, BLOCK, ORDERED)
        r = tl.where(inside, r - own_mean, 0.0)
        squares += r * r
    return tl.sum(squares, axis=0)


@triton.jit
def _advantage(r, g, count, mean, spread, divisor, given, CHOICES: tl.constexpr):
    """The advantages of the rewards r of segment g."""
    if CHOICES.BASELINE == VALUES:
        a = r - tl.load(given.baseline_values + g)
    elif CHOICES.BASELINE == LEAVE_ONE_OUT:
        # Nobody else to compare with: advantage 0.
        a = tl.where(count > 1.0, r - (count * mean - r) / tl.where(count > 1.0, count - 1.0, 1.0), 0.0)
    else:
        a = r - mean
    if CHOICES.BASELINE != VALUES and CHOICES.KEEP_SINGLE:
        a = tl.where(count <= 1.0, r, a)
    a = a / divisor
    if CHOICES.HAS_WEIGHTS:
        a = a * tl.where(a >= 0.0, tl.load(given.class_weights + 2 * g + 1), tl.load(given.class_weights + 2 * g))
    if CHOICES.BASELINE != VALUES:
        signal = (spread | (count <= 1.0)) if CHOICES.KEEP_SINGLE else spread
        a = tl.where(signal, a, 0.0)
    return a


@triton.jit
def rows_kernel(rows, given, ddof, eps, settled, out, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Write the advantages of one segment of `Rows`, by what is `Given`, to out [N]."""
    g = tl.program_id(0).to(tl.int64)
    begin = tl.load(rows.offsets + g)
    end = tl.load(rows.offsets + g + 1)
    divisor = tl.full([], 1.0, tl.float64)
    wrong = tl.full([], 0.0, tl.float64)
    if CHOICES.SURVEYED:
        divisor = tl.load(settled)
        wrong = tl.load(settled + 1)
    if wrong == 0.0:
        own_count, own_mean, own_spread = _own_mean(rows, begin, end, BLOCK, CHOICES.ORDERED)
        count = own_count
        mean = own_mean
        spread = own_spread
        if CHOICES.HAS_POOL:
            pool_spread = tl.load(given.pool_min + g) != tl.load(given.pool_max + g)
            if CHOICES.BASELINE != GROUP and CHOICES.BASELINE != VALUES:
                mean = tl.load(given.pool_mean + g)
                spread = pool_spread
                if CHOICES.BASELINE == LEAVE_ONE_OUT or CHOICES.KEEP_SINGLE:
                    count = tl.load(given.pool_count + g)

        if CHOICES.SCALE == SCALE_POOL and CHOICES.HAS_POOL:
            divisor = _divisor(tl.load(given.pool_m2 + g), tl.load(given.pool_count + g), ddof, eps, pool_spread)
        elif CHOICES.SCALE == SCALE_POOL or CHOICES.SCALE == SCALE_GROUP:
            squares = _own_squares(rows, begin, end, own_mean, BLOCK, CHOICES.ORDERED)
            divisor = _divisor(squares, own_count, ddof, eps, own_spread)

        for start in range(begin, end, BLOCK):
            row, inside, r = _rows(rows, start, end, BLOCK, CHOICES.ORDERED)
            a = _advantage(r, g, count, mean, spread, divisor, given, CHOICES)
            tl.store(out + row, a.to(tl.float32).to(out.dtype.element_ty), mask=inside)
