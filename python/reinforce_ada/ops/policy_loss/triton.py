"""policy_loss in Triton: stages that follow each other on the stream, sums in float64 in an order that depends on shapes only.

Entry points, with sequences float64 [N, 4] (counted tokens, mean log-ratio, rollout weight, derivative in the mean log-ratio), totals
float64 [1] (the share of a token in the loss, NaN where cu_seqlens is wrong) and parts float64 [17, P]:

    sequences_kernel, grid (N,)     what is counted and summed of each sequence
    totals_kernel, grid (1,)        the denominators
    through_kernel, grid (N,)       only where ratios are of sequences: the derivative of the loss in each mean log-ratio
    tokens_kernel, grid (P,)        the gradients, and the sums of each BLOCK tokens
    finish_kernel, grid (1,)        the value and the metrics
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reinforce_ada.ops._gpu import guard
from reinforce_ada.ops._triton import LOG2_E, launch
from reinforce_ada.ops.policy_loss import settings
from reinforce_ada.ops.policy_loss.contract import Inputs, Results, by_name, empty_results

THREADS = 128
BLOCK = 512  # tokens of a program, 4 a thread
SHORT_THREADS, SHORT_BLOCK = 32, 64  # of a program that goes through a sequence, where sequences are short
SHORT_LENGTH = 256  # up to this mean length they are
LANES = 1024  # sequences, or numbers of parts, that one program looks at at once

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


def workspace_size(num_tokens: int, num_sequences: int) -> int:
    """Float64 numbers of sequences, totals and parts."""
    return 4 * num_sequences + 1 + 17 * int(triton.cdiv(num_tokens, BLOCK))


def evaluate(x: Inputs) -> Results:
    """See contract.Kernels."""
    results = empty_results(x.logprobs, x.entropy, x.entropy_grad)
    size = workspace_size(x.logprobs.numel(), x.num_sequences)
    _launch(x, *results, x.logprobs.new_empty(size, dtype=torch.float64))
    return results


def _launch(inputs: Inputs, value: Tensor, metrics: Tensor, grad: Tensor, grad_entropy: Tensor, workspace: Tensor) -> None:
    logprobs, cu_seqlens = inputs.logprobs, inputs.cu_seqlens
    num_tokens, num_sequences = logprobs.numel(), inputs.num_sequences
    if num_tokens and not num_sequences:  # tokens of no sequence
        for result in (value, metrics, grad, grad_entropy):
            result.fill_(math.nan)
        return
    s = by_name(inputs.numbers)
    num_parts = triton.cdiv(num_tokens, BLOCK)
    sequences, totals, parts = workspace.split([4 * num_sequences, 1, 17 * num_parts])
    layout = (workspace if cu_seqlens is None else cu_seqlens, num_tokens, num_sequences, logprobs.shape[-1])
    ratio_bound = min(s.log_ratio_bound, EXPONENT_BOUND.value)
    weights = (s.correction_low, s.correction_high, s.correction_scale)
    weigh: dict[str, Any] = {
        "CORRECTION": int(s.correction) if inputs.rollout_logprobs is not None else 0,
        "ALLOW_MISSING": bool(s.allow_missing),
        "PACKED": cu_seqlens is not None,
        "HAS_OLD": inputs.old_logprobs is not None,
    }
    given = (inputs.old_logprobs, inputs.rollout_logprobs, inputs.ref_logprobs, inputs.entropy)
    old, rollout, ref, bonus = (logprobs if x is None else x for x in given)
    of_sequences = inputs.old_logprobs is not None and (bool(s.sequence_ratio) or int(s.loss) == GSPO.value)
    short = num_tokens <= SHORT_LENGTH * num_sequences
    one_sequence = {"BLOCK": SHORT_BLOCK if short else BLOCK, **launch(SHORT_THREADS if short else THREADS)}
    tokens = (logprobs, inputs.advantages, inputs.mask, old, rollout, ref, bonus, *layout, totals, sequences)
    bounds = (1 - s.clip_low, 1 + s.clip_high, s.dual_clip, ratio_bound, *weights)
    kl_numbers = (s.kl_coef, settings.KL_LOG_RATIO_BOUND if s.kl_bound < math.inf else EXPONENT_BOUND.value, s.kl_bound, s.entropy_coef)
    chosen: dict[str, Any] = {
        **weigh,
        "LOSS": int(s.loss),
        "SPREAD": bool(s.sequence_ratio),
        "OF_SEQUENCES": of_sequences,
        "PER_TOKEN": inputs.advantages_per_token,
        "HAS_DUAL": s.dual_clip < math.inf,
        "HAS_ROLLOUT": inputs.rollout_logprobs is not None,
        "HAS_REF": inputs.ref_logprobs is not None,
        "HAS_ENTROPY": inputs.entropy is not None,
        "KL": int(s.kl),
        "STRAIGHT_THROUGH": bool(s.straight_through),
        "KL_WEIGHTED": bool(s.kl_weighted),
        "BY_SEQUENCE": int(s.loss_agg) == SEQ_MEAN_TOKEN_MEAN.value,
    }
    with guard(logprobs):
        if num_sequences:
            sequences_kernel[(num_sequences,)](
                *(logprobs, inputs.mask, old, rollout, *layout, ratio_bound, *weights, sequences),
                OF_SEQUENCES=of_sequences,
                **weigh,
                **one_sequence,
            )
        totals_kernel[(1,)](
            *(sequences, *layout, s.num_tokens, s.num_seqs, s.norm_length, totals),
            AGG=int(s.loss_agg),
            PACKED=cu_seqlens is not None,
            LANES=LANES,
            **launch(LANES),
        )
        if num_tokens and s.sequence_ratio:
            through_kernel[(num_sequences,)](*tokens, *bounds, *kl_numbers, **chosen, **one_sequence)
        if num_tokens:
            tokens_kernel[(num_parts,)](
                *(*tokens, *bounds, *kl_numbers, (num_sequences - 1).bit_length(), parts, grad, grad_entropy),
                **chosen,
                ENTROPY_GRAD=inputs.entropy_grad,
                BLOCK=BLOCK,
                **launch(THREADS),
            )
        finish_kernel[(1,)](parts, num_parts, num_tokens, totals, value, metrics, LANES=LANES // 32, **launch(THREADS))


# -------------------- numbers


@triton.jit
def _clamp(x, low, high):
    """Between the bounds; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _exponential(x):
    """(e^x, e^x - 1 - x) for |x| <= EXPONENT_BOUND. The latter, the k3 estimate, comes from the polynomial where |x| < .35: the difference
    of numbers near 1 would leave 10 % of it at x = 1e-3."""
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
def _weight(rho, weight_low, weight_high, weight_scale, CORRECTION: tl.constexpr):
    """What a rollout weight becomes by the correction."""
    if CORRECTION == TOKEN_TRUNCATE or CORRECTION == SEQUENCE_TRUNCATE:  # noqa: SIM109  a compile-time choice
        return _clamp(rho, weight_low, weight_high) * weight_scale
    return tl.where((rho < weight_low) | (weight_high < rho), 0.0, rho) * weight_scale


@triton.jit
def _gap(old, rollout, ALLOW_MISSING: tl.constexpr):
    """Old minus rollout logprob, 0 where there is no rollout logprob and that is allowed."""
    gap = old - rollout
    return tl.where(rollout != rollout, 0.0, gap) if ALLOW_MISSING else gap


@triton.jit
def _kl(y, kl_x_bound, kl_bound, KL: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr):
    """(the estimate from y = l_ref - l, its derivative in y)."""
    if KL == KL_K3:
        bounded = _clamp(y, -kl_x_bound, kl_x_bound)
        _, excess = _exponential(bounded)
        value = tl.where(kl_bound < excess, kl_bound, excess)
        slope = tl.where((y < bounded) | (bounded < y) | (kl_bound < excess), 0.0, excess + bounded)
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
    """Values of the tokens that count, in float32, 0 for the others. Those are read too: a mask out of memory has no wide loads."""
    return tl.where(keep, tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32), 0.0)


# -------------------- sequences


@triton.jit
def _bounds(cu_seqlens, i, num_tokens, num_sequences, width, PACKED: tl.constexpr):
    """(begin, end, whether they are right) of sequence i, never outside of the tokens."""
    if PACKED:
        begin = tl.load(cu_seqlens + i)
        end = tl.load(cu_seqlens + i + 1)
        right = (begin >= 0) & (begin <= end) & (end <= num_tokens) & ((i > 0) | (begin == 0))
        right = right & ((i < num_sequences - 1) | (end == num_tokens))
        return tl.where(right, begin, 0), tl.where(right, end, 0), right
    begin = i * width
    return begin, begin + width, i >= 0


@triton.jit
def sequences_kernel(
    logprobs,
    mask,
    old_logprobs,
    rollout_logprobs,
    cu_seqlens,
    num_tokens,
    num_sequences,
    width,
    ratio_bound,
    weight_low,
    weight_high,
    weight_scale,
    sequences,
    OF_SEQUENCES: tl.constexpr,
    CORRECTION: tl.constexpr,
    ALLOW_MISSING: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence: what its tokens share. It has no counted tokens, but NaN, where its offsets are wrong."""
    i = tl.program_id(0).to(tl.int64)
    begin, end, right = _bounds(cu_seqlens, i, num_tokens, num_sequences, width, PACKED)
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    d = tl.zeros([BLOCK], tl.float64)
    gap = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside = at < end
        keep = tl.load(mask + at, mask=inside, other=0) != 0
        count += keep.to(tl.float64)
        if OF_SEQUENCES or CORRECTION >= SEQUENCE_TRUNCATE:
            logp = _load(logprobs, at, inside, keep)
            old = _load(old_logprobs, at, inside, keep) if HAS_OLD else logp
            d += (logp - old).to(tl.float64)
            if CORRECTION >= SEQUENCE_TRUNCATE:
                gap += _gap(old, _load(rollout_logprobs, at, inside, keep), ALLOW_MISSING).to(tl.float64)
    tokens = tl.sum(count, axis=0)
    row = sequences + 4 * i
    tl.store(row, tl.where(right, tokens, float("nan")))
    tl.store(row + 1, tl.sum(d, axis=0) / tl.maximum(tokens, 1.0))
    if CORRECTION >= SEQUENCE_TRUNCATE:
        rho, _ = _exponential(_clamp(tl.sum(gap, axis=0).to(tl.float32), -ratio_bound, ratio_bound))
        tl.store(row + 2, _weight(rho, weight_low, weight_high, weight_scale, CORRECTION).to(tl.float64))


@triton.jit
def _given_or(given, counted):
    """The denominator that was given, else what was counted, in float64."""
    return tl.where(given > 0.0, given + tl.zeros([], tl.float64), tl.maximum(counted, 1.0))


@triton.jit
def totals_kernel(
    sequences,
    cu_seqlens,
    num_tokens,
    num_sequences,
    width,
    tokens,
    seqs,
    length,
    totals,
    AGG: tl.constexpr,
    PACKED: tl.constexpr,
    LANES: tl.constexpr,
):
    """The share of a token in the loss (under seq-mean-token-mean divided by the tokens of its sequence); denominators given as 0 are
    counted here."""
    lanes = tl.arange(0, LANES)
    counted = tl.zeros([LANES], tl.float64)
    some = tl.zeros([LANES], tl.float64)
    longest = tl.zeros([LANES], tl.int64)
    for start in range(0, num_sequences, LANES):
        i = start + lanes
        inside = i < num_sequences
        count = tl.load(sequences + 4 * i.to(tl.int64), mask=inside, other=0.0)
        counted += count
        some += (count > 0.0).to(tl.float64)
        if PACKED:
            begin = tl.load(cu_seqlens + i, mask=inside, other=0)
            longest = tl.maximum(longest, tl.load(cu_seqlens + i + 1, mask=inside, other=0) - begin)
    if not PACKED:
        longest += width
    all_tokens = tl.sum(counted, axis=0)
    num_tokens = _given_or(tokens, all_tokens)
    num_seqs = _given_or(seqs, tl.sum(some, axis=0))
    norm = _given_or(length, tl.max(longest, axis=0).to(tl.float64))
    share = 1.0 / (num_tokens if AGG == TOKEN_MEAN else num_seqs * norm if AGG == NORM else num_seqs)
    right = all_tokens == all_tokens
    if PACKED:  # the offsets of no sequence
        right = right & ((num_sequences > 0) | (tl.load(cu_seqlens) == 0))
    tl.store(totals, tl.where(right, share, float("nan")))


# -------------------- tokens


@triton.jit
def _tokens(
    at,
    inside,
    keep,
    adv,
    mean,
    seq_weight,
    logprobs,
    old_logprobs,
    rollout_logprobs,
    ref_logprobs,
    entropy,
    ratio_low,
    ratio_high,
    dual,
    ratio_bound,
    weight_low,
    weight_high,
    weight_scale,
    kl_coef,
    kl_x_bound,
    kl_bound,
    entropy_coef,
    CORRECTION: tl.constexpr,
    ALLOW_MISSING: tl.constexpr,
    HAS_OLD: tl.constexpr,
    LOSS: tl.constexpr,
    SPREAD: tl.constexpr,
    OF_SEQUENCES: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
):
    """Of each token: its loss before aggregation, the derivatives directly in its logprob and through its sequence's log-ratio, and what
    the metrics sum: d, k3, ratio, clipped low, high, dual, gap, its k3, weight, kl, entropy. `mean` and `seq_weight` are its sequence's."""
    logp = _load(logprobs, at, inside, keep)
    zero = tl.zeros(logp.shape, tl.float32)
    old = logp
    ratio = zero + 1.0
    slope = zero + 1.0
    d = zero
    k3 = zero
    if HAS_OLD:
        old = _load(old_logprobs, at, inside, keep)
        difference = logp - old
        d = _clamp(difference, -ratio_bound, ratio_bound)
        ratio, k3 = _exponential(d)
        slope = tl.where((difference < d) | (d < difference), 0.0, ratio)
        if OF_SEQUENCES:
            most = SEQUENCE_BOUND if LOSS == GSPO else ratio_bound
            least = -EXPONENT_BOUND if LOSS == GSPO else -ratio_bound
            bounded = _clamp(mean + zero, least, most)
            ratio, _ = _exponential(bounded)
            slope = tl.where((mean < bounded) | (bounded < mean), 0.0, ratio)

    low = zero
    high = zero
    both = zero
    if LOSS == REINFORCE:
        loss = -adv * logp
        pull = -adv
    elif LOSS == CISPO:
        low = (ratio < ratio_low).to(tl.float32)
        high = (ratio_high < ratio).to(tl.float32)
        pull = -adv * _clamp(ratio, ratio_low, ratio_high)
        loss = pull * logp
    elif LOSS == SAPO:
        tau = tl.where(adv > 0.0, TAU_POSITIVE, TAU_OTHER)
        away, _ = _exponential(_clamp(-tau * (ratio - 1.0), -EXPONENT_BOUND, EXPONENT_BOUND))
        gate = 1.0 / (1.0 + away)
        loss = -adv * gate * (4.0 / tau)
        pull = -adv * 4.0 * gate * (gate * away) * slope
    else:
        is_low = (adv < 0.0) & (ratio < ratio_low)
        is_high = (adv > 0.0) & (ratio_high < ratio)
        loss = -adv * tl.where(is_low, ratio_low, tl.where(is_high, ratio_high, ratio))
        pull = tl.where(is_low | is_high, 0.0, -adv * slope)
        low = is_low.to(tl.float32)
        high = is_high.to(tl.float32)
        if HAS_DUAL:
            is_dual = (adv < 0.0) & (-adv * dual < loss)
            loss = tl.where(is_dual, -adv * dual, loss)
            pull = tl.where(is_dual, 0.0, pull)
            both = is_dual.to(tl.float32)

    gap = zero
    gap_k3 = zero
    weight = zero
    if HAS_ROLLOUT:
        gap = _clamp(_gap(old, _load(rollout_logprobs, at, inside, keep), ALLOW_MISSING), -ratio_bound, ratio_bound)
        rho, gap_k3 = _exponential(gap)
        if CORRECTION > 0:
            weight = (
                seq_weight + zero if CORRECTION >= SEQUENCE_TRUNCATE else _weight(rho, weight_low, weight_high, weight_scale, CORRECTION)
            )
            loss = loss * weight
            pull = pull * weight

    direct = pull
    through = zero
    if SPREAD and LOSS != REINFORCE and LOSS != CISPO:
        direct = zero
        through = pull
    kl = zero
    if HAS_REF:
        kl, kl_slope = _kl(_load(ref_logprobs, at, inside, keep) - logp, kl_x_bound, kl_bound, KL, STRAIGHT_THROUGH)
        if KL_WEIGHTED:
            if SPREAD:
                through += kl_coef * kl * slope
            else:
                direct += kl_coef * kl * slope
            loss += kl_coef * (kl * ratio)
            direct -= kl_coef * (kl_slope * ratio)
        else:
            loss += kl_coef * kl
            direct -= kl_coef * kl_slope
    h = zero
    if HAS_ENTROPY:
        h = _load(entropy, at, inside, keep)
        loss -= entropy_coef * h
    return loss, direct, through, d, k3, ratio, low, high, both, gap, gap_k3, weight, kl, h


@triton.jit
def through_kernel(
    logprobs,
    advantages,
    mask,
    old_logprobs,
    rollout_logprobs,
    ref_logprobs,
    entropy,
    cu_seqlens,
    num_tokens,
    num_sequences,
    width,
    totals,
    sequences,
    ratio_low,
    ratio_high,
    dual,
    ratio_bound,
    weight_low,
    weight_high,
    weight_scale,
    kl_coef,
    kl_x_bound,
    kl_bound,
    entropy_coef,
    CORRECTION: tl.constexpr,
    ALLOW_MISSING: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    LOSS: tl.constexpr,
    SPREAD: tl.constexpr,
    OF_SEQUENCES: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence: column 3 of `sequences`."""
    i = tl.program_id(0).to(tl.int64)
    begin, end, right = _bounds(cu_seqlens, i, num_tokens, num_sequences, width, PACKED)  # noqa: RUF059
    count = tl.load(sequences + 4 * i)
    mean = tl.load(sequences + 4 * i + 1).to(tl.float32)
    seq_weight = tl.load(sequences + 4 * i + 2).to(tl.float32)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + lanes
        inside = at < end
        keep = tl.load(mask + at, mask=inside, other=0) != 0
        adv = _load(advantages, at if PER_TOKEN else i + lanes * 0, inside, keep)
        _, _, through, _, _, _, _, _, _, _, _, _, _, _ = _tokens(
            at, inside, keep, adv, mean, seq_weight, logprobs, old_logprobs, rollout_logprobs, ref_logprobs, entropy, ratio_low,
            ratio_high, dual, ratio_bound, weight_low, weight_high, weight_scale, kl_coef, kl_x_bound, kl_bound, entropy_coef, CORRECTION,
            ALLOW_MISSING, HAS_OLD, LOSS, SPREAD, OF_SEQUENCES, HAS_DUAL, HAS_ROLLOUT, HAS_REF, HAS_ENTROPY, KL, STRAIGHT_THROUGH,
            KL_WEIGHTED,
        )  # fmt: skip
        total += tl.where(keep, through, 0.0).to(tl.float64)
    share = tl.load(totals)
    if BY_SEQUENCE:
        share = share / tl.maximum(count, 1.0)
    tl.store(sequences + 4 * i + 3, tl.sum(total, axis=0) * share)


@triton.jit
def _sequence_of(at, inside, cu_seqlens, num_sequences, width, search_steps, PACKED: tl.constexpr):
    """The sequence of each token: the last that begins at or before it."""
    if PACKED:
        low = tl.zeros(at.shape, tl.int64)
        high = low + num_sequences
        for _ in range(search_steps):
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle) <= at
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        return low
    return tl.where(inside, at, 0) // width


@triton.jit
def tokens_kernel(
    logprobs,
    advantages,
    mask,
    old_logprobs,
    rollout_logprobs,
    ref_logprobs,
    entropy,
    cu_seqlens,
    num_tokens,
    num_sequences,
    width,
    totals,
    sequences,
    ratio_low,
    ratio_high,
    dual,
    ratio_bound,
    weight_low,
    weight_high,
    weight_scale,
    kl_coef,
    kl_x_bound,
    kl_bound,
    entropy_coef,
    search_steps,
    parts,
    grad,
    grad_entropy,
    CORRECTION: tl.constexpr,
    ALLOW_MISSING: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    LOSS: tl.constexpr,
    SPREAD: tl.constexpr,
    OF_SEQUENCES: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    KL: tl.constexpr,
    STRAIGHT_THROUGH: tl.constexpr,
    KL_WEIGHTED: tl.constexpr,
    BY_SEQUENCE: tl.constexpr,
    ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens: their gradients, and what they add to each of the parts. search_steps: 2^search_steps >= num_sequences."""
    part = tl.program_id(0)
    at = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_tokens
    common = tl.load(totals)
    keep = tl.load(mask + at, mask=inside, other=0) != 0
    i = _sequence_of(at, inside, cu_seqlens, num_sequences, width, search_steps, PACKED)
    row = sequences + 4 * i
    count = tl.maximum(tl.load(row, mask=keep, other=1.0), 1.0)
    mean = tl.load(row + 1, mask=keep, other=0.0).to(tl.float32)
    seq_weight = tl.zeros([BLOCK], tl.float32)
    if CORRECTION >= SEQUENCE_TRUNCATE:
        seq_weight = tl.load(row + 2, mask=keep, other=0.0).to(tl.float32)
    adv = _load(advantages, at if PER_TOKEN else i, inside, keep)
    loss, direct, _, d, k3, ratio, low, high, both, gap, gap_k3, weight, kl, h = _tokens(
        at, inside, keep, adv, mean, seq_weight, logprobs, old_logprobs, rollout_logprobs, ref_logprobs, entropy, ratio_low, ratio_high,
        dual, ratio_bound, weight_low, weight_high, weight_scale, kl_coef, kl_x_bound, kl_bound, entropy_coef, CORRECTION, ALLOW_MISSING,
        HAS_OLD, LOSS, SPREAD, OF_SEQUENCES, HAS_DUAL, HAS_ROLLOUT, HAS_REF, HAS_ENTROPY, KL, STRAIGHT_THROUGH, KL_WEIGHTED,
    )  # fmt: skip

    own = 1.0 / count if BY_SEQUENCE else tl.full([BLOCK], 1.0, tl.float64)
    share = (own * common).to(tl.float32)
    dx = direct * share
    if SPREAD:
        dx += (tl.load(row + 3, mask=keep, other=0.0) / count).to(tl.float32)
    wrong = common != common
    dx = tl.where(wrong, float("nan"), tl.where(keep, dx, 0.0))
    tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=inside)
    if ENTROPY_GRAD:
        dh = tl.where(wrong, float("nan"), tl.where(keep, -entropy_coef * share, 0.0))
        tl.store(grad_entropy + at, dh.to(grad_entropy.dtype.element_ty), mask=inside)

    column = parts + part
    num_parts = tl.num_programs(0)
    _add_up(column, loss.to(tl.float64) * own, keep)
    _add_up(column + num_parts, keep.to(tl.float64), keep)
    _add_up(column + 2 * num_parts, d, keep)
    _add_up(column + 3 * num_parts, k3, keep)
    _add_up(column + 4 * num_parts, ratio, keep)
    _add_up(column + 5 * num_parts, low, keep)
    _add_up(column + 6 * num_parts, high, keep)
    _add_up(column + 7 * num_parts, both, keep)
    _add_up(column + 8 * num_parts, gap, keep)
    _add_up(column + 9 * num_parts, gap_k3, keep)
    _add_up(column + 10 * num_parts, weight, keep)
    _add_up(column + 11 * num_parts, weight * weight, keep)
    _add_up(column + 12 * num_parts, kl, keep)
    _add_up(column + 13 * num_parts, h, keep)
    tl.store(column + 14 * num_parts, tl.min(tl.where(keep, ratio, float("inf")), axis=0).to(tl.float64))
    tl.store(column + 15 * num_parts, tl.max(tl.where(keep, ratio, float("-inf")), axis=0).to(tl.float64))
    tl.store(column + 16 * num_parts, tl.max(tl.where(keep, weight, float("-inf")), axis=0).to(tl.float64))


@triton.jit
def _add_up(part, x, keep):
    tl.store(part, tl.sum(tl.where(keep, x, 0.0).to(tl.float64), axis=0))


# -------------------- the end


@triton.jit
def _pick(values, rows, row):
    """One element of a vector."""
    return tl.sum(tl.where(rows == row, values, 0.0), axis=0)


@triton.jit
def finish_kernel(parts, num_parts, num_tokens, totals, value, metrics, LANES: tl.constexpr):
    """The value, and the metrics as METRICS lists them."""
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
