"""Stub of the native module. Tensors are passed as addresses (Tensor.data_ptr()); 0 stands for "not given"."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    built_isas: list[str]
    usable_isas: list[str]
    selected_isa: str
    openmp: bool
    sanitized: bool

def build_info() -> BuildInfo: ...
def select_isa(name: str) -> None: ...

# token_logprobs

# group_advantages
def group_advantages(
    rewards: int,
    dtype: int,
    group_of: int,
    cu_seqlens: int,
    num_rows: int,
    num_groups: int,
    pool_count: int,
    pool_mean: int,
    pool_m2: int,
    pool_min: int,
    pool_max: int,
    baseline_values: int,
    class_weights: int,
    baseline: int,
    scale: int,
    ddof: int,
    eps: float,
    keep_single: bool,
    out: int,
    num_threads: int,
) -> int: ...

# policy_loss
def policy_loss(
    logprobs: int,
    advantages: int,
    advantages_per_token: bool,
    mask: int,
    float_mask: bool,
    old_logprobs: int,
    rollout_logprobs: int,
    ref_logprobs: int,
    cu_seqlens: int,
    num_tokens_total: int,
    num_sequences: int,
    width: int,
    loss_kind: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    loss_agg: int,
    num_tokens: float,
    num_seqs: float,
    norm_length: float,
    correction: int,
    correction_low: float,
    correction_high: float,
    kl: int,
    straight_through: bool,
    kl_coef: float,
    loss: int,
    metrics: int,
    grad: int,
    num_threads: int,
) -> int: ...
def first_invalid_token(token_ids: int, num_tokens: int, vocab: int) -> int: ...
def token_logprobs_forward(
    logits: int,
    dtype: int,
    num_tokens: int,
    vocab: int,
    row_stride: int,
    token_ids: int,
    temperatures: int,
    temperature: float,
    logprobs: int,
    log2_normalizer: int,
    entropy: int,
    sum_p2: int,
    num_threads: int,
) -> None: ...
def token_logprobs_backward(
    logits: int,
    dtype: int,
    num_tokens: int,
    vocab: int,
    row_stride: int,
    token_ids: int,
    temperatures: int,
    temperature: float,
    log2_normalizer: int,
    entropy: int,
    grad_logprobs: int,
    grad_entropy: int,
    grad: int,
    grad_row_stride: int,
    num_threads: int,
) -> None: ...
