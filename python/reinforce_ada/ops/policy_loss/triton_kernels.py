"""The kernels of policy_loss in Triton.

Entry points, with sequences float64 [N, 4] (counted tokens, mean log-ratio, rollout weight, derivative in the mean log-ratio), totals
float64 [1] (the share of a token in the loss, NaN where cu_seqlens is wrong) and parts float64 [17, P]:

    sequences_kernel, grid (N,)     what is counted and summed of each sequence
    totals_kernel, grid (1,)        the denominators
    through_kernel, grid (N,)       only where ratios are of sequences: the derivative of the loss in each mean log-ratio
    tokens_kernel, grid (P,)        the gradients, and the sums of each BLOCK tokens
    finish_kernel, grid (1,)        the value and the metrics

Their arguments are the records of triton_records.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reinforce_ada.ops._triton import LOG2_E
from reinforce_ada.ops.policy_loss import settings

PARTS = tl.constexpr(17)  # sums over tokens: the 14 below, the smallest ratio, the largest ratio, the largest weight
SUMS = tl.constexpr(14)  # loss, tokens, d, k3, ratio, clipped low, high, dual, gap, its k3, weight, its square, kl, entropy
EXPONENT_BOUND = tl.constexpr(88.3)  # e^88.3 = 2.2e38 is the last to fit float32, and e^-88.3 becomes zero
SEQUENCE_BOUND = tl.constexpr(settings.SEQUENCE_LOG_RATIO_BOUND)
TAU_POSITIVE, TAU_OTHER = tl.constexpr(settings.SAPO_TAU[0]), tl.constexpr(settings.SAPO_TAU[1])
REINFORCE, CISPO, GSPO, SAPO = (tl.constexpr(settings.LOSSES.index(name)) for name in ("reinforce", "cispo", "gspo", "sapo"))
TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, NORM = (
    tl.constexpr(settings.LOSS_AGGS.index(name)) for name in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
)
KL_K1, KL_K2, KL_K3, KL_ABS = (tl.constexpr(settings.KL_ESTIMATORS.index(name)) for name in ("k1", "k2", "k3", "abs"))
TOKEN_TRUNCATE, SEQUENCE_TRUNCATE = tl.constexpr(1), tl.constexpr(3)  # corrections; those of sequences are at least the latter


class Ratio(NamedTuple):
    """The ratio to the old policy and its derivative in the log-ratio; the token's own log-ratio d, and e^d - 1 - d."""

    value: Any
    slope: Any
    d: Any
    k3: Any


class Measured(NamedTuple):
    """The values that the metrics sum over the tokens, in the order of the parts."""

    d: Any
    k3: Any
    ratio: Any
    low: Any
    high: Any
    both: Any
    gap: Any
    gap_k3: Any
    weight: Any
    weight_square: Any
    kl: Any
    entropy: Any


# -------------------- numbers


@triton.jit
def _clamp(x, low, high):
    """Return x between the bounds; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _exponential(x):
    """Return (e^x, e^x - 1 - x) for |x| <= EXPONENT_BOUND.

    The latter, the k3 estimate, comes from the polynomial where |x| < .35: the difference of numbers near 1 would leave 10 % of it at
    x = 1e-3.
    """
    n = tl.floor(x * LOG2_E + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, the first with 9 bits: n times it is exact
    s = r * r
    # Minimax in relative error over |r| <= ln 2 / 2 with coefficients rounded to float32: 1.4e-7.
    high = 0.0013901335187256336 * s + (0.008363259956240654 * r + 0.04166685417294502)
    rest = (high * s + (0.16666576266288757 * r + 0.5)) * s
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    value = ((rest + r) + 1.0) * power
    return value, tl.where(n == 0.0, rest, value - 1.0 - x)


@triton.jit
def _weight(rho, weighing, CORRECTION: tl.constexpr):
    """Return what the correction makes of a rollout weight."""
    if CORRECTION == TOKEN_TRUNCATE or CORRECTION == SEQUENCE_TRUNCATE:  # noqa: SIM109  a compile-time choice
        return _clamp(rho, weighing.weight_low, weighing.weight_high) * weighing.weight_scale
    return tl.where((rho < weighing.weight_low) | (weighing.weight_high < rho), 0.0, rho) * weighing.weight_scale


@triton.jit
def _gap(old, rollout, ALLOW_MISSING: tl.constexpr):
    """Return old minus rollout logprob, 0 where there is no rollout logprob and that is allowed."""
    gap = old - rollout
    return tl.where(rollout != rollout, 0.0, gap) if ALLOW_MISSING else gap


@triton.jit
def _kl(y, numbers, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """Return (the estimate from y = l_ref - l, its derivative in y)."""
    if KL == KL_K3:
        bounded = _clamp(y, -numbers.kl_x_bound, numbers.kl_x_bound)
        _, excess = _exponential(bounded)
        value = tl.where(numbers.kl_bound < excess, numbers.kl_bound, excess)
        slope = tl.where((y < bounded) | (bounded < y) | (numbers.kl_bound < excess), 0.0, excess + bounded)
    elif KL == KL_K2:
        value = y * y * 0.5
        slope = y
    elif KL == KL_ABS:
        value = tl.abs(y)
        slope = tl.where(y < 0.0, -1.0, tl.where(y > 0.0, 1.0, y))
    else:
        value = -y
        slope = y * 0.0 - 1.0
    return value, y if STRAIGHT_THROUGH else slope


@triton.jit
def _load(pointer, at, inside, keep):
    """Return the values of the tokens that count, in float32, and 0 for the others, which are read too, as masked loads are not wide."""
    return tl.where(keep, tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32), 0.0)


# -------------------- sequences


@triton.jit
def _bounds(layout, i, PACKED: tl.constexpr):
    """Return (begin, end, whether they are right) of sequence i, never outside of the tokens."""
    if PACKED:
        begin = tl.load(layout.cu_seqlens + i)
        end = tl.load(layout.cu_seqlens + i + 1)
        right = (begin >= 0) & (begin <= end) & (end <= layout.num_tokens) & ((i > 0) | (begin == 0))
        right = right & ((i < layout.num_sequences - 1) | (end == layout.num_tokens))
        return tl.where(right, begin, 0), tl.where(right, end, 0), right
    begin = i * layout.width
    return begin, begin + layout.width, i >= 0


@triton.jit
def sequences_kernel(compared, layout, ratio_bound, weighing, sequences, SUMMING: tl.constexpr, BLOCK: tl.constexpr):
    """Write what the tokens of one sequence share. If its offsets are wrong, the number of counted tokens is NaN."""
    i = tl.program_id(0).to(tl.int64)
    begin, end, right = _bounds(layout, i, SUMMING.PACKED)
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    d = tl.zeros([BLOCK], tl.float64)
    gap = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside = at < end
        keep = tl.load(compared.mask + at, mask=inside, other=0) != 0
        count += keep.to(tl.float64)
        if SUMMING.OF_SEQUENCES or SUMMING.CORRECTION >= SEQUENCE_TRUNCATE:
            logp = _load(compared.logprobs, at, inside, keep)
            old = _load(compared.old_logprobs, at, inside, keep) if SUMMING.HAS_OLD else logp
            d += (logp - old).to(tl.float64)
            if SUMMING.CORRECTION >= SEQUENCE_TRUNCATE:
                rollout = _load(compared.rollout_logprobs, at, inside, keep)
                gap += _gap(old, rollout, SUMMING.ALLOW_MISSING).to(tl.float64)
    tokens = tl.sum(count, axis=0)
    row = sequences + 4 * i
    tl.store(row, tl.where(right, tokens, float("nan")))
    tl.store(row + 1, tl.sum(d, axis=0) / tl.maximum(tokens, 1.0))
    if SUMMING.CORRECTION >= SEQUENCE_TRUNCATE:
        rho, _ = _exponential(_clamp(tl.sum(gap, axis=0).to(tl.float32), -ratio_bound, ratio_bound))
        tl.store(row + 2, _weight(rho, weighing, SUMMING.CORRECTION).to(tl.float64))


@triton.jit
def _given_or(given, counted):
    """Return the denominator that was given, or else what was counted, in float64."""
    return tl.where(given > 0.0, given + tl.zeros([], tl.float64), tl.maximum(counted, 1.0))


@triton.jit
def totals_kernel(sequences, layout, denominators, totals, AGG: tl.constexpr, PACKED: tl.constexpr, LANES: tl.constexpr):
    """Write the share of a token in the loss (under seq-mean-token-mean to be divided by the tokens of its sequence).

    Denominators given as 0 are counted here.
    """
    lanes = tl.arange(0, LANES)
    counted = tl.zeros([LANES], tl.float64)
    some = tl.zeros([LANES], tl.float64)
    longest = tl.zeros([LANES], tl.int64)
    for start in range(0, layout.num_sequences, LANES):
        i = start + lanes
        inside = i < layout.num_sequences
        count = tl.load(sequences + 4 * i.to(tl.int64), mask=inside, other=0.0)
        counted += count
        some += (count > 0.0).to(tl.float64)
        if PACKED:
            begin = tl.load(layout.cu_seqlens + i, mask=inside, other=0)
            longest = tl.maximum(longest, tl.load(layout.cu_seqlens + i + 1, mask=inside, other=0) - begin)
    if not PACKED:
        longest += layout.width
    all_tokens = tl.sum(counted, axis=0)
    num_tokens = _given_or(denominators.tokens, all_tokens)
    num_seqs = _given_or(denominators.seqs, tl.sum(some, axis=0))
    norm = _given_or(denominators.length, tl.max(longest, axis=0).to(tl.float64))
    share = 1.0 / (num_tokens if AGG == TOKEN_MEAN else num_seqs * norm if AGG == NORM else num_seqs)
    right = all_tokens == all_tokens
    if PACKED:  # the offsets of no sequence
        right = right & ((layout.num_sequences > 0) | (tl.load(layout.cu_seqlens) == 0))
    tl.store(totals, tl.where(right, share, float("nan")))


# -------------------- tokens


@triton.jit
def _ratio(logp, old, mean, ratio_bound, C: tl.constexpr):
    """Return the `Ratio` of each token; `mean` is the mean log-ratio of its sequence."""
    zero = tl.zeros(logp.shape, tl.float32)
    if not C.SUMMING.HAS_OLD:
        return Ratio(zero + 1.0, zero + 1.0, zero, zero)
    difference = logp - old
    d = _clamp(difference, -ratio_bound, ratio_bound)
    ratio, k3 = _exponential(d)
    slope = tl.where((difference < d) | (d < difference), 0.0, ratio)
    if C.SUMMING.OF_SEQUENCES:
        most = SEQUENCE_BOUND if C.LOSS == GSPO else ratio_bound
        least = -EXPONENT_BOUND if C.LOSS == GSPO else -ratio_bound
        bounded = _clamp(mean + zero, least, most)
        ratio, _ = _exponential(bounded)
        slope = tl.where((mean < bounded) | (bounded < mean), 0.0, ratio)
    return Ratio(ratio, slope, d, k3)


@triton.jit
def _clipped(ratio, adv, numbers, C: tl.constexpr):
    """Return (loss, its derivative, clipped low, high, dual) of ppo and gspo."""
    is_low = (adv < 0.0) & (ratio.value < numbers.ratio_low)
    is_high = (adv > 0.0) & (numbers.ratio_high < ratio.value)
    loss = -adv * tl.where(is_low, numbers.ratio_low, tl.where(is_high, numbers.ratio_high, ratio.value))
    pull = tl.where(is_low | is_high, 0.0, -adv * ratio.slope)
    both = tl.zeros(loss.shape, tl.float32)
    if C.HAS_DUAL:
        is_dual = (adv < 0.0) & (-adv * numbers.dual < loss)
        loss = tl.where(is_dual, -adv * numbers.dual, loss)
        pull = tl.where(is_dual, 0.0, pull)
        both = is_dual.to(tl.float32)
    return loss, pull, is_low.to(tl.float32), is_high.to(tl.float32), both


@triton.jit
def _policy_term(logp, ratio, adv, numbers, C: tl.constexpr):
    """Return (loss, its derivative, clipped low, high, dual) of each token by its loss alone."""
    zero = tl.zeros(logp.shape, tl.float32)
    if C.LOSS == REINFORCE:
        return -adv * logp, -adv, zero, zero, zero
    if C.LOSS == CISPO:
        low = (ratio.value < numbers.ratio_low).to(tl.float32)
        high = (numbers.ratio_high < ratio.value).to(tl.float32)
        pull = -adv * _clamp(ratio.value, numbers.ratio_low, numbers.ratio_high)
        return pull * logp, pull, low, high, zero
    if C.LOSS == SAPO:
        tau = tl.where(adv > 0.0, TAU_POSITIVE, TAU_OTHER)
        away, _ = _exponential(_clamp(-tau * (ratio.value - 1.0), -EXPONENT_BOUND, EXPONENT_BOUND))
        gate = 1.0 / (1.0 + away)
        return -adv * gate * (4.0 / tau), -adv * 4.0 * gate * (gate * away) * ratio.slope, zero, zero, zero
    return _clipped(ratio, adv, numbers, C)


@triton.jit
def _rollout_weight(old, rollout, seq_weight, numbers, C: tl.constexpr):
    """Return (gap, its k3, weight) of each token; the weight is 0 where nothing is corrected."""
    gap = _clamp(_gap(old, rollout, C.SUMMING.ALLOW_MISSING), -numbers.ratio_bound, numbers.ratio_bound)
    rho, gap_k3 = _exponential(gap)
    weight = tl.zeros(old.shape, tl.float32)
    if C.SUMMING.CORRECTION >= SEQUENCE_TRUNCATE:
        weight += seq_weight
    elif C.SUMMING.CORRECTION > 0:
        weight = _weight(rho, numbers.weighing, C.SUMMING.CORRECTION)
    return gap, gap_k3, weight


@triton.jit
def _with_kl(loss, direct, through, y, ratio, numbers, C: tl.constexpr):
    """Return (loss, direct, through) with the KL term of y = l_ref - l added, and the estimate."""
    kl, slope = _kl(y, numbers, C.KL, C.STRAIGHT_THROUGH)
    if C.KL_WEIGHTED:
        if C.SPREAD:
            through += numbers.kl_coef * kl * ratio.slope
        else:
            direct += numbers.kl_coef * kl * ratio.slope
        loss += numbers.kl_coef * (kl * ratio.value)
        direct -= numbers.kl_coef * (slope * ratio.value)
    else:
        loss += numbers.kl_coef * kl
        direct -= numbers.kl_coef * slope
    return loss, direct, through, kl


@triton.jit
def _tokens(at, inside, keep, adv, mean, seq_weight, tokens, numbers, C: tl.constexpr):
    """Return each token's loss before aggregation, its derivatives in its logprob and through its sequence's log-ratio, and `Measured`.

    `mean` and `seq_weight` are those of its sequence.
    """
    logp = _load(tokens.logprobs, at, inside, keep)
    zero = tl.zeros(logp.shape, tl.float32)
    old = _load(tokens.old_logprobs, at, inside, keep) if C.SUMMING.HAS_OLD else logp
    ratio = _ratio(logp, old, mean, numbers.ratio_bound, C)
    loss, pull, low, high, both = _policy_term(logp, ratio, adv, numbers, C)
    gap = zero
    gap_k3 = zero
    weight = zero
    if C.HAS_ROLLOUT:
        gap, gap_k3, weight = _rollout_weight(old, _load(tokens.rollout_logprobs, at, inside, keep), seq_weight, numbers, C)
        if C.SUMMING.CORRECTION > 0:
            loss = loss * weight
            pull = pull * weight
    direct = pull
    through = zero
    if C.SPREAD and C.LOSS != REINFORCE and C.LOSS != CISPO:
        direct = zero
        through = pull
    kl = zero
    if C.HAS_REF:
        y = _load(tokens.ref_logprobs, at, inside, keep) - logp
        loss, direct, through, kl = _with_kl(loss, direct, through, y, ratio, numbers, C)
    h = zero
    if C.HAS_ENTROPY:
        h = _load(tokens.entropy, at, inside, keep)
        loss -= numbers.entropy_coef * h
    measured = Measured(ratio.d, ratio.k3, ratio.value, low, high, both, gap, gap_k3, weight, weight * weight, kl, h)
    return loss, direct, through, measured


@triton.jit
def through_kernel(tokens, layout, totals, sequences, numbers, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Write column 3 of `sequences` for one sequence."""
    i = tl.program_id(0).to(tl.int64)
    begin, end, right = _bounds(layout, i, CHOICES.SUMMING.PACKED)  # noqa: RUF059
    count = tl.load(sequences + 4 * i)
    mean = tl.load(sequences + 4 * i + 1).to(tl.float32)
    seq_weight = tl.load(sequences + 4 * i + 2).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside = at < end
        keep = tl.load(tokens.mask + at, mask=inside, other=0) != 0
        adv = _load(tokens.advantages, at if CHOICES.PER_TOKEN else i + lanes * 0, inside, keep)
        _, _, through, _ = _tokens(at, inside, keep, adv, mean, seq_weight, tokens, numbers, CHOICES)
        total += tl.where(keep, through, 0.0).to(tl.float64)
    share = tl.load(totals)
    if CHOICES.BY_SEQUENCE:
        share = share / tl.maximum(count, 1.0)
    tl.store(sequences + 4 * i + 3, tl.sum(total, axis=0) * share)


@triton.jit
def _sequence_of(at, inside, layout, search_steps, PACKED: tl.constexpr):
    """Return the sequence of each token, the last that begins at or before it."""
    if PACKED:
        low = tl.zeros(at.shape, tl.int64)
        high = low + layout.num_sequences
        for _ in range(search_steps):
            middle = (low + high) // 2
            before = tl.load(layout.cu_seqlens + middle) <= at
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low
    return tl.where(inside, at, 0) // layout.width


@triton.jit
def tokens_kernel(
    tokens,
    layout,
    totals,
    sequences,
    numbers,
    search_steps,
    parts,
    grad,
    grad_entropy,
    CHOICES: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of BLOCK tokens, and what they add to each of the parts. search_steps: 2^search_steps >= num_sequences."""
    part = tl.program_id(0)
    at = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < layout.num_tokens
    common = tl.load(totals)
    keep = tl.load(tokens.mask + at, mask=inside, other=0) != 0
    i = _sequence_of(at, inside, layout, search_steps, CHOICES.SUMMING.PACKED)
    row = sequences + 4 * i
    count = tl.maximum(tl.load(row, mask=keep, other=1.0), 1.0)
    mean = tl.load(row + 1, mask=keep, other=0.0).to(tl.float32)
    seq_weight = tl.zeros([BLOCK], tl.float32)
    if CHOICES.SUMMING.CORRECTION >= SEQUENCE_TRUNCATE:
        seq_weight = tl.load(row + 2, mask=keep, other=0.0).to(tl.float32)
    adv = _load(tokens.advantages, at if CHOICES.PER_TOKEN else i, inside, keep)
    loss, direct, _, measured = _tokens(at, inside, keep, adv, mean, seq_weight, tokens, numbers, CHOICES)

    own = 1.0 / count if CHOICES.BY_SEQUENCE else tl.full([BLOCK], 1.0, tl.float64)
    share = (own * common).to(tl.float32)
    dx = direct * share
    if CHOICES.SPREAD:
        dx += (tl.load(row + 3, mask=keep, other=0.0) / count).to(tl.float32)
    wrong = common != common
    dx = tl.where(wrong, float("nan"), tl.where(keep, dx, 0.0))
    tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=inside)
    if ENTROPY_GRAD:
        dh = tl.where(wrong, float("nan"), tl.where(keep, -numbers.entropy_coef * share, 0.0))
        tl.store(grad_entropy + at, dh.to(grad_entropy.dtype.element_ty), mask=inside)
    _store_parts(parts + part, loss.to(tl.float64) * own, measured, keep)


@triton.jit
def _store_parts(column, loss, measured, keep):
    """Write the numbers of the parts, over the tokens that count."""
    rows = tl.num_programs(0)
    _add_up(column, loss, keep)
    _add_up(column + rows, keep.to(tl.float64), keep)
    for k in tl.static_range(SUMS - 2):
        _add_up(column + (k + 2) * rows, measured[k], keep)
    ratio = measured.ratio
    tl.store(column + 14 * rows, tl.min(tl.where(keep, ratio, float("inf")), axis=0).to(tl.float64))
    tl.store(column + 15 * rows, tl.max(tl.where(keep, ratio, float("-inf")), axis=0).to(tl.float64))
    tl.store(column + 16 * rows, tl.max(tl.where(keep, measured.weight, float("-inf")), axis=0).to(tl.float64))


@triton.jit
def _add_up(part, x, keep):
    tl.store(part, tl.sum(tl.where(keep, x, 0.0).to(tl.float64), axis=0))


# -------------------- the end


@triton.jit
def _pick(values, rows, row):
    """Return one element of a vector."""
    return tl.sum(tl.where(rows == row, values, 0.0), axis=0)


@triton.jit
def finish_kernel(parts, num_parts, num_tokens, totals, value, metrics, LANES: tl.constexpr):
    """Write the value, and the metrics as METRICS lists them."""
    rows = tl.arange(0, 32)
    lanes = tl.arange(0, LANES)
    adds = rows < SUMS
    sums = tl.zeros([32], tl.float64)
    smallest = tl.full([32], float("inf"), tl.float64)
    largest = tl.full([32], float("-inf"), tl.float64)
    for start in range(0, num_parts, LANES):
        inside = (rows < PARTS)[:, None] & (start + lanes < num_parts)[None, :]
        x = tl.load(parts + rows[:, None] * num_parts + (start + lanes)[None, :], mask=inside, other=0.0)
        sums += tl.sum(tl.where(inside & adds[:, None], x, 0.0), axis=1)
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, x, float("inf")), axis=1))
        largest = tl.maximum(largest, tl.max(tl.where(inside, x, float("-inf")), axis=1))
    share = tl.load(totals)
    tokens = _pick(sums, rows, 1)
    n = tl.maximum(tokens, 1.0)
    ratio = _pick(sums, rows, 4)
    weight = _pick(sums, rows, 10)
    squares = _pick(sums, rows, 11)
    some = tokens > 0.0
    wrong = share - share
    tl.store(value, (_pick(sums, rows, 0) * share).to(tl.float32))
    tl.store(metrics, tokens + wrong)
    tl.store(metrics + 1, num_tokens - tokens + wrong)
    tl.store(metrics + 2, -_pick(sums, rows, 2) / n + wrong)
    tl.store(metrics + 3, _pick(sums, rows, 3) / n + wrong)
    tl.store(metrics + 4, ratio / n + wrong)
    # A ratio that is not a number is the smallest and the largest, as in plain PyTorch.
    tl.store(metrics + 5, tl.where(some, _pick(smallest, rows, 14), 0.0) + (ratio - ratio) + wrong)
    tl.store(metrics + 6, tl.where(some, _pick(largest, rows, 15), 0.0) + (ratio - ratio) + wrong)
    tl.store(metrics + 7, _pick(sums, rows, 5) / n + wrong)
    tl.store(metrics + 8, _pick(sums, rows, 6) / n + wrong)
    tl.store(metrics + 9, _pick(sums, rows, 7) / n + wrong)
    tl.store(metrics + 10, -_pick(sums, rows, 8) / n + wrong)
    tl.store(metrics + 11, _pick(sums, rows, 9) / n + wrong)
    tl.store(metrics + 12, weight / n + wrong)
    tl.store(metrics + 13, tl.where(some, _pick(largest, rows, 16), 0.0) + (weight - weight) + wrong)
    tl.store(metrics + 14, tl.where(squares > 0.0, weight * weight / (n * squares), squares) + wrong)
    tl.store(metrics + 15, _pick(sums, rows, 12) / n + wrong)
    tl.store(metrics + 16, _pick(sums, rows, 13) / n + wrong)
