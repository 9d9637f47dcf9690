"""The Triton kernels of linear_token_logprobs: logits a tile at a time, scored or turned into their gradient before the next one.

Shapes: hidden [T, D] and weight [V, D] of one dtype, rows any distance apart and each contiguous; everything indexed by token is [T].
A row is a token, a column an entry of the vocabulary. `temperatures` (float32), `bias` may be None. Sums are float32 (of the bias
float64), each in one fixed order. Offsets are int64: 32k tokens x 152k entries is 5.0e9, past int32.

Numbers that do not affect how rows are read (counts of tokens or splits), and the places where vectors with one value per token begin,
cause no new compilation when they change.
Constants of every kernel: INTERPRETED in Triton's interpreter; ROWS, COLUMNS and DEPTH of a tile product; GROUP, how many blocks of rows
run together on one range of columns, so that both are read from the L2 cache; HAS_CAP for a soft cap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reinforce_ada.ops._triton import LN2, LOG2_E, head, head_and_slope, vanishing

IGNORED = tl.constexpr(-100)  # ops._checks.IGNORED


# Tiles


@triton.jit
def operand(x, INTERPRETED: tl.constexpr):
    """Return a factor of a product as it is; in the interpreter in float32, since that would multiply the bits of bfloat16 as integers."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def rounded(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return x in DTYPE, rounded to nearest even; the interpreter by itself would truncate to bfloat16."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(tl.abs(x) < float("inf"), nearest.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def block_of(program, blocks, columns, GROUP: tl.constexpr):
    """Return (block of rows, range of columns) of a program: GROUP blocks of rows go through all ranges, then the next GROUP."""
    group = program // (GROUP * columns)
    size = tl.minimum(blocks - group * GROUP, GROUP)
    inside = program % (GROUP * columns)
    return group * GROUP + inside % size, inside // size


@triton.jit
def logits(
    hidden,
    hidden_stride,
    weight,
    weight_stride,
    bias,
    rows,
    read,
    columns,
    vocab,
    width,
    INTERPRETED: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Return hidden[rows] weight[columns]^T + bias[columns] in float32; rows where `read` is false count as 0."""
    there = columns < vocab
    k = tl.arange(0, DEPTH)
    hidden_at = hidden + rows[:, None].to(tl.int64) * hidden_stride + k[None, :]
    weight_at = weight + columns[:, None].to(tl.int64) * weight_stride + k[None, :]
    x = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    # A block in which nothing is read takes no step: prompts are long.
    for start in range(0, tl.where(tl.max(read.to(tl.int32), 0) > 0, width, 0), DEPTH):
        left = k[None, :] < width - start
        h = tl.load(hidden_at + start, mask=read[:, None] & left, other=0.0)
        w = tl.load(weight_at + start, mask=there[:, None] & left, other=0.0)
        x = tl.dot(operand(h, INTERPRETED), tl.trans(operand(w, INTERPRETED)), x, input_precision="ieee")
    if bias is not None:
        x += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def column_of(ids, vocab):
    """Return the columns of token ids in int32, -1 for an id outside the vocabulary: half the registers of int64."""
    return tl.where((ids >= 0) & (ids < vocab), ids, -1).to(tl.int32)


@triton.jit
def exponent_factor(temperatures, temperature, rows, there):
    """Return (log2(e) / temperature, temperature) of each row, NaN for a temperature that is not positive and finite."""
    t = tl.full(rows.shape, 1.0, tl.float32) * temperature
    if temperatures is not None:
        t = tl.load(temperatures + rows, mask=there, other=1.0)
    t = tl.where((t > 0.0) & (t < float("inf")), t, float("nan"))
    return 1.0 / t * LOG2_E, t


# Forward


@triton.jit(
    do_not_specialize=["num_tokens", "vocab", "splits", "tiles_of_split"],
    do_not_specialize_on_alignment=["bias", "token_ids", "temperatures", "states"],
)
def partial_scores(
    hidden,
    weight,
    bias,
    token_ids,
    temperatures,
    states,
    num_tokens,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    temperature,
    logit_scale,
    soft_cap,
    splits,
    tiles_of_split,
    HAS_CAP: tl.constexpr,
    MOMENTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Score a block of rows against a part of the vocabulary.

    It writes states [5, splits, T] (float32; [3, splits, T] without MOMENTS), with d = (z - m) log2(e) / temperature over the columns
    of the split: m = max z, sum 2^d, z of the row's own token (0 where the split lacks it), sum d 2^d, sum 4^d.

    token_ids: int64. The vocabulary is cut in `splits` of `tiles_of_split` tiles of COLUMNS. Programs: blocks of ROWS times splits.
    """
    block, split = block_of(tl.program_id(0), tl.cdiv(num_tokens, ROWS), splits, GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    there = rows < num_tokens
    ids = tl.load(token_ids + rows, mask=there, other=IGNORED)
    token = column_of(ids, vocab)
    factor, _ = exponent_factor(temperatures, temperature, rows, there)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    own = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for tile in range(split * tiles_of_split, tl.minimum((split + 1) * tiles_of_split, tl.cdiv(vocab, COLUMNS))):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        x = logits(hidden, hidden_stride, weight, weight_stride, bias, rows, ids != IGNORED, columns, vocab, width, INTERPRETED, DEPTH)
        z = tl.where((columns < vocab)[None, :], head(x, logit_scale, soft_cap, HAS_CAP), float("-inf"))
        own += tl.sum(tl.where(columns[None, :] == token[:, None], z, 0.0), 1)
        higher = tl.maximum(highest, tl.max(z, 1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far
        d = (z - anchor[:, None]) * factor[:, None]
        e = tl.math.exp2(d)
        down = tl.where(highest == float("-inf"), 0.0, (highest - higher) * factor)
        down = vanishing(down)
        shrink = tl.math.exp2(down)
        if MOMENTS:
            weighted = (weighted + down * total) * shrink + tl.sum(tl.where(e > 0.0, d, 0.0) * e, 1)
            squares = squares * shrink * shrink + tl.sum(e * e, 1)
        total = total * shrink + tl.sum(e, 1)
        highest = higher
    field = tl.cast(splits, tl.int64) * num_tokens
    at = states + tl.cast(split, tl.int64) * num_tokens + rows
    tl.store(at, highest, mask=there)
    tl.store(at + field, total, mask=there)
    tl.store(at + 2 * field, own, mask=there)
    if MOMENTS:
        tl.store(at + 3 * field, weighted, mask=there)
        tl.store(at + 4 * field, squares, mask=there)


@triton.jit(
    do_not_specialize=["num_tokens", "vocab", "splits"],
    do_not_specialize_on_alignment=["states", "token_ids", "temperatures", "logprobs", "row_max", "log2_sum", "entropy", "sum_p2"],
)
def combined_scores(
    states,
    token_ids,
    temperatures,
    logprobs,
    row_max,
    log2_sum,
    entropy,
    sum_p2,
    num_tokens,
    vocab,
    splits,
    temperature,
    BLOCK: tl.constexpr,
):
    """Join the states that `partial_scores` wrote, in the order of the splits.

    It writes [T] float32 each: logprobs, row_max = max z, log2_sum = log2 sum 2^((z - row_max) log2(e) / temperature), and entropy and
    sum_p2 unless they are None. Results are 0 where the token is ignored, and NaN where it is outside the vocabulary or its
    temperature is not positive and finite. Programs: blocks of BLOCK rows.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = rows < num_tokens
    ids = tl.load(token_ids + rows, mask=there, other=IGNORED)
    factor, t = exponent_factor(temperatures, temperature, rows, there)
    field = tl.cast(splits, tl.int64) * num_tokens
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        highest = tl.maximum(highest, tl.load(states + tl.cast(split, tl.int64) * num_tokens + rows, mask=there, other=0.0))
    own = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        at = states + tl.cast(split, tl.int64) * num_tokens + rows
        top = tl.load(at, mask=there, other=0.0)
        part = tl.load(at + field, mask=there, other=1.0)
        own += tl.load(at + 2 * field, mask=there, other=0.0)
        down = tl.where(top == float("-inf"), 0.0, (top - highest) * factor)
        down = vanishing(down)
        shrink = tl.math.exp2(down)
        total += part * shrink
        if entropy is not None:
            weighted += (tl.load(at + 3 * field, mask=there, other=0.0) + down * part) * shrink
        if sum_p2 is not None:
            squares += tl.load(at + 4 * field, mask=there, other=0.0) * shrink * shrink
    log2_total = tl.log2(total)
    kept = ids != IGNORED
    logprob = tl.math.div_rn(own - highest, t) - log2_total * LN2
    logprob = tl.where((ids >= 0) & (ids < vocab), logprob, float("nan"))
    tl.store(logprobs + rows, tl.where(kept, logprob, 0.0), mask=there)
    tl.store(row_max + rows, tl.where(kept, highest, 0.0), mask=there)
    tl.store(log2_sum + rows, tl.where(kept, log2_total, 0.0), mask=there)
    if entropy is not None:
        tl.store(entropy + rows, tl.where(kept, (log2_total - weighted / total) * LN2, 0.0), mask=there)
    if sum_p2 is not None:
        tl.store(sum_p2 + rows, tl.where(kept, squares / (total * total), 0.0), mask=there)


# Backward


@triton.jit(
    do_not_specialize=["num_tokens", "vocab", "first_column"],
    do_not_specialize_on_alignment=[
        "bias",
        "token_ids",
        "temperatures",
        "reached",
        "row_max",
        "log2_sum",
        "entropy",
        "grad_logprobs",
        "grad_entropy",
        "column_sums",
    ],
)
def logits_gradient(
    hidden,
    weight,
    bias,
    token_ids,
    temperatures,
    reached,
    row_max,
    log2_sum,
    entropy,
    grad_logprobs,
    grad_entropy,
    dz,
    column_sums,
    num_tokens,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    dz_stride,
    temperature,
    logit_scale,
    soft_cap,
    first_column,
    num_columns,
    HAS_CAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute the logits of `num_columns` of the vocabulary from `first_column` on again, and write their gradient.

        dz[j] = (g ([j == y] - p[j]) - h p[j] (log p[j] + entropy)) dz[j]/dx[j] / temperature

    Here g is from grad_logprobs and h from grad_entropy (0 if that is None); dz [T, num_columns] has the weight's dtype. Rows where
    `reached` (bool) is false are not read, and their gradient is 0. column_sums [blocks of ROWS, num_columns] float32 gets the sums over
    each block, unless it is None. Programs: blocks of ROWS times tiles of COLUMNS.
    """
    block, tile = block_of(tl.program_id(0), tl.cdiv(num_tokens, ROWS), tl.cdiv(num_columns, COLUMNS), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    there = rows < num_tokens
    read = tl.load(reached + rows, mask=there, other=0) != 0
    inside = tile * COLUMNS + tl.arange(0, COLUMNS)  # not columns - first_column, of which the compiler would not know that it is aligned
    columns = first_column + inside
    x = logits(hidden, hidden_stride, weight, weight_stride, bias, rows, read, columns, vocab, width, INTERPRETED, DEPTH)
    z, slope = head_and_slope(x, logit_scale, soft_cap, HAS_CAP)
    token = column_of(tl.load(token_ids + rows, mask=read, other=0), vocab)
    factor, t = exponent_factor(temperatures, temperature, rows, read)
    log2_p = (z - tl.load(row_max + rows, mask=read, other=0.0)[:, None]) * factor[:, None]
    log2_p -= tl.load(log2_sum + rows, mask=read, other=0.0)[:, None]
    p = tl.math.exp2(log2_p)
    g = tl.load(grad_logprobs + rows, mask=read, other=0.0)
    g = tl.where((g == 0.0) | (token >= 0), g, float("nan"))[:, None]
    grad = tl.where(columns[None, :] == token[:, None], g, 0.0) - g * p
    if grad_entropy is not None:
        h = tl.load(grad_entropy + rows, mask=read, other=0.0)[:, None]
        mean = tl.load(entropy + rows, mask=read, other=0.0)[:, None]
        grad -= h * p * (tl.where(p > 0.0, log2_p * LN2, 0.0) + mean)
    grad = tl.where(read[:, None] & (columns < vocab)[None, :], grad * slope * (logit_scale / t)[:, None], 0.0)
    tl.store(
        dz + rows[:, None].to(tl.int64) * dz_stride + inside[None, :],
        rounded(grad, dz.dtype.element_ty, INTERPRETED),
        mask=there[:, None] & (inside < num_columns)[None, :],
    )
    if column_sums is not None:
        tl.store(column_sums + tl.cast(block, tl.int64) * num_columns + inside, tl.sum(grad, 0), mask=inside < num_columns)


@triton.jit(do_not_specialize=["num_blocks", "num_columns"], do_not_specialize_on_alignment=["column_sums", "sums"])
def bias_gradient(column_sums, sums, num_blocks, num_columns, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Write to sums [num_columns] float64 (with ADD: add) the column_sums [num_blocks, num_columns] of all blocks, in their order.

    Programs: blocks of BLOCK columns.
    """
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = columns < num_columns
    total = tl.zeros([BLOCK], tl.float64)
    for block in range(num_blocks):
        total += tl.load(column_sums + tl.cast(block, tl.int64) * num_columns + columns, mask=there, other=0.0).to(tl.float64)
    if ADD:
        total += tl.load(sums + columns, mask=there, other=0.0)
    tl.store(sums + columns, total, mask=there)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["reached"])
def weight_gradient(
    dz,
    hidden,
    reached,
    before,
    grad_weight,
    num_tokens,
    num_columns,
    width,
    dz_stride,
    hidden_stride,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write grad_weight [num_columns, D] = (before +) dz^T hidden, over all T in one float32 sum, rounded once.

    `before` is None, or grad_weight itself; both have contiguous rows of D. Hidden states where `reached` is false are not read.
    Programs: blocks of ROWS of num_columns times tiles of COLUMNS of D.
    """
    block, tile = block_of(tl.program_id(0), tl.cdiv(num_columns, ROWS), tl.cdiv(width, COLUMNS), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    k = tl.arange(0, DEPTH)
    dz_at = dz + k[:, None].to(tl.int64) * dz_stride + rows[None, :]
    hidden_at = hidden + k[:, None].to(tl.int64) * hidden_stride + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_tokens, DEPTH):
        token = start + k
        read = tl.load(reached + token, mask=token < num_tokens, other=0) != 0
        mask = (token < num_tokens)[:, None] & (rows < num_columns)[None, :]
        d = tl.load(dz_at + tl.cast(start, tl.int64) * dz_stride, mask=mask, other=0.0)
        h = tl.load(hidden_at + tl.cast(start, tl.int64) * hidden_stride, mask=read[:, None] & there[None, :], other=0.0)
        total = tl.dot(tl.trans(operand(d, INTERPRETED)), operand(h, INTERPRETED), total, input_precision="ieee")
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows < num_columns)[:, None] & there[None, :]
    if before is not None:
        total += tl.load(before + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_weight + at, rounded(total, grad_weight.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["reached"])
def hidden_gradient(
    dz,
    weight,
    reached,
    before,
    grad_hidden,
    num_tokens,
    num_columns,
    width,
    dz_stride,
    weight_stride,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write grad_hidden [T, D] = (before +) dz weight, for the num_columns rows of the weight that begin at `weight`.

    `before` is None, or the float32 sums [T, D] of the pieces before, which may be grad_hidden itself. The result is 0 where
    `reached` is false.
    Programs: blocks of ROWS of T times tiles of COLUMNS of D.
    """
    block, tile = block_of(tl.program_id(0), tl.cdiv(num_tokens, ROWS), tl.cdiv(width, COLUMNS), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    there = columns < width
    read = tl.load(reached + rows, mask=rows < num_tokens, other=0) != 0
    k = tl.arange(0, DEPTH)
    dz_at = dz + rows[:, None].to(tl.int64) * dz_stride + k[None, :]
    weight_at = weight + k[:, None].to(tl.int64) * weight_stride + columns[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, tl.where(tl.max(read.to(tl.int32), 0) > 0, num_columns, 0), DEPTH):
        left = k < num_columns - start
        d = tl.load(dz_at + start, mask=read[:, None] & left[None, :], other=0.0)
        w = tl.load(weight_at + tl.cast(start, tl.int64) * weight_stride, mask=left[:, None] & there[None, :], other=0.0)
        total = tl.dot(operand(d, INTERPRETED), operand(w, INTERPRETED), total, input_precision="ieee")
    at = rows[:, None].to(tl.int64) * width + columns[None, :]
    inside = (rows < num_tokens)[:, None] & there[None, :]
    if before is not None:
        total += tl.load(before + at, mask=inside, other=0.0)
    total = tl.where(read[:, None], total, 0.0)
    tl.store(grad_hidden + at, rounded(total, grad_hidden.dtype.element_ty, INTERPRETED), mask=inside)
