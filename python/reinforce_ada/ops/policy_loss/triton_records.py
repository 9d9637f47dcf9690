"""What the Triton kernels of policy_loss take: tensors and numbers together where they belong together, and what is compiled.

Triton passes the fields of a record one after the other, those of a record within it in its place; of the constants of a kernel, which are
in capitals, it compiles a kernel for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Compared(NamedTuple):
    """The tensors that the sums of a sequence are made of, a value for each token; one that is not there is logprobs."""

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
    """What bounds and scales a rollout weight."""

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
    """What the loss is divided by; 0 where it is counted."""

    tokens: float
    seqs: float
    length: float


class Summing(NamedTuple):
    """What sequences_kernel is compiled for."""

    OF_SEQUENCES: bool
    CORRECTION: int
    ALLOW_MISSING: bool
    PACKED: bool
    HAS_OLD: bool


class Choices(NamedTuple):
    """What through_kernel and tokens_kernel are compiled for."""

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
