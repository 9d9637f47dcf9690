"""The arguments of the Triton kernels of policy_loss: records of tensors and numbers that belong together, and of constants.

Triton passes the fields of a record one after the other, and those of a record within it in its place. Constants are in capitals; Triton
compiles a kernel for each of their values.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Compared(NamedTuple):
    """The tensors from which the sums of a sequence are computed, with one value per token; a tensor that is not given is logprobs."""

    logprobs: Any
    mask: Any
    old_logprobs: Any
    rollout_logprobs: Any


class Tokens(NamedTuple):
    """All tensors with a value for each token, and the advantages."""

    logprobs: Any
    advantages: Any
    mask: Any
    old_logprobs: Any
    rollout_logprobs: Any
    ref_logprobs: Any
    entropy: Any


class Layout(NamedTuple):
    """Which tokens a sequence has: those between two of cu_seqlens where PACKED, else `width`; cu_seqlens is then any tensor."""

    cu_seqlens: Any
    num_tokens: int
    num_sequences: int
    width: int


class Weighing(NamedTuple):
    """The numbers that bound and scale a rollout weight."""

    weight_low: float
    weight_high: float
    weight_scale: float


class Numbers(NamedTuple):
    """The bounds of ratio, loss and log-ratio, and the coefficients."""

    ratio_low: float
    ratio_high: float
    dual: float
    ratio_bound: float
    weighing: Weighing
    kl_coef: float
    kl_x_bound: float
    kl_bound: float
    entropy_coef: float


class Denominators(NamedTuple):
    """The denominators of the loss; 0 for one that is counted."""

    tokens: float
    seqs: float
    length: float


class Summing(NamedTuple):
    """The choices for which sequences_kernel is compiled."""

    OF_SEQUENCES: bool
    CORRECTION: int
    ALLOW_MISSING: bool
    PACKED: bool
    HAS_OLD: bool


class Choices(NamedTuple):
    """The choices for which through_kernel and tokens_kernel are compiled."""

    SUMMING: Summing
    LOSS: int
    SPREAD: bool
    PER_TOKEN: bool
    HAS_DUAL: bool
    HAS_ROLLOUT: bool
    HAS_REF: bool
    HAS_ENTROPY: bool
    KL: int
    STRAIGHT_THROUGH: bool
    KL_WEIGHTED: bool
    BY_SEQUENCE: bool
