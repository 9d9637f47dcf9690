"""policy_loss in Triton: stages that follow each other on the stream, with float64 sums in an order that depends only on shapes."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from reinforce_ada.ops._gpu import guard
from reinforce_ada.ops._triton import launch_options
from reinforce_ada.ops.policy_loss import settings
from reinforce_ada.ops.policy_loss.contract import Inputs, Results, by_name, empty_results
from reinforce_ada.ops.policy_loss.triton_kernels import (
    EXPONENT_BOUND,
    GSPO,
    PARTS,
    SEQ_MEAN_TOKEN_MEAN,
    finish_kernel,
    sequences_kernel,
    through_kernel,
    tokens_kernel,
    totals_kernel,
)
from reinforce_ada.ops.policy_loss.triton_records import Choices, Compared, Denominators, Layout, Numbers, Summing, Tokens, Weighing

THREADS = 128
BLOCK = 512  # tokens of a program, 4 a thread
SHORT_THREADS, SHORT_BLOCK = 32, 64  # of a program that goes through a sequence, where sequences are short
SHORT_LENGTH = 256  # up to this mean length they are
LANES = 1024  # sequences, or numbers of parts, that one program looks at at once


def workspace_size(num_tokens: int, num_sequences: int) -> int:
    """Return how many float64 numbers sequences, totals and parts take."""
    return int(4 * num_sequences + 1 + PARTS.value * triton.cdiv(num_tokens, BLOCK))


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
    sequences, totals, parts = workspace.split([4 * num_sequences, 1, PARTS.value * num_parts])
    layout = Layout(workspace if cu_seqlens is None else cu_seqlens, num_tokens, num_sequences, logprobs.shape[-1])
    tokens, numbers, choices = _tokens(inputs), _numbers(s), _choices(inputs, s)
    short = num_tokens <= SHORT_LENGTH * num_sequences
    one_sequence = {"BLOCK": SHORT_BLOCK if short else BLOCK, **launch_options(SHORT_THREADS if short else THREADS)}
    of_tokens = (tokens, layout, totals, sequences, numbers)
    with guard(logprobs):
        if num_sequences:
            compared = Compared(logprobs, inputs.mask, tokens.old_logprobs, tokens.rollout_logprobs)
            sequences_kernel[(num_sequences,)](
                *(compared, layout, numbers.ratio_bound, numbers.weighing, sequences), SUMMING=choices.SUMMING, **one_sequence
            )
        totals_kernel[(1,)](
            *(sequences, layout, Denominators(s.num_tokens, s.num_seqs, s.norm_length), totals),
            AGG=int(s.loss_agg),
            PACKED=cu_seqlens is not None,
            LANES=LANES,
            **launch_options(LANES),
        )
        if num_tokens and s.sequence_ratio:
            through_kernel[(num_sequences,)](*of_tokens, CHOICES=choices, **one_sequence)
        if num_tokens:
            tokens_kernel[(num_parts,)](
                *(*of_tokens, (num_sequences - 1).bit_length(), parts, grad, grad_entropy),
                CHOICES=choices,
                ENTROPY_GRAD=inputs.entropy_grad,
                BLOCK=BLOCK,
                **launch_options(THREADS),
            )
        finish_kernel[(1,)](parts, num_parts, num_tokens, totals, value, metrics, LANES=LANES // 32, **launch_options(THREADS))


def _tokens(inputs: Inputs) -> Tokens:
    """Return the tensors, with logprobs in the place of one that is not given."""
    given = (inputs.old_logprobs, inputs.rollout_logprobs, inputs.ref_logprobs, inputs.entropy)
    return Tokens(inputs.logprobs, inputs.advantages, inputs.mask, *(inputs.logprobs if x is None else x for x in given))


def _numbers(s: Any) -> Numbers:
    """Return the numbers of a call as the kernels compute with them."""
    return Numbers(
        ratio_low=1 - s.clip_low,
        ratio_high=1 + s.clip_high,
        dual=s.dual_clip,
        ratio_bound=min(s.log_ratio_bound, EXPONENT_BOUND.value),
        weighing=Weighing(s.correction_low, s.correction_high, s.correction_scale),
        kl_coef=s.kl_coef,
        kl_x_bound=settings.KL_LOG_RATIO_BOUND if s.kl_bound < math.inf else EXPONENT_BOUND.value,
        kl_bound=s.kl_bound,
        entropy_coef=s.entropy_coef,
    )


def _choices(inputs: Inputs, s: Any) -> Choices:
    """Return the choices for which the kernels are compiled."""
    has_old, has_rollout = inputs.old_logprobs is not None, inputs.rollout_logprobs is not None
    return Choices(
        SUMMING=Summing(
            OF_SEQUENCES=has_old and (bool(s.sequence_ratio) or int(s.loss) == GSPO.value),
            CORRECTION=int(s.correction) if has_rollout else 0,
            ALLOW_MISSING=bool(s.allow_missing),
            PACKED=inputs.cu_seqlens is not None,
            HAS_OLD=has_old,
        ),
        LOSS=int(s.loss),
        SPREAD=bool(s.sequence_ratio),
        PER_TOKEN=inputs.advantages_per_token,
        HAS_DUAL=s.dual_clip < math.inf,
        HAS_ROLLOUT=has_rollout,
        HAS_REF=inputs.ref_logprobs is not None,
        HAS_ENTROPY=inputs.entropy is not None,
        KL=int(s.kl),
        STRAIGHT_THROUGH=bool(s.straight_through),
        KL_WEIGHTED=bool(s.kl_weighted),
        BY_SEQUENCE=int(s.loss_agg) == SEQ_MEAN_TOKEN_MEAN.value,
    )
