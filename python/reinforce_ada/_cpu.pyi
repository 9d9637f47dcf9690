"""Stub of the native module. Tensors are passed as addresses (Tensor.data_ptr()); 0 stands for "not given"."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    built_isas: list[str]
    usable_isas: list[str]
    selected_isa: str
    openmp: bool
    sanitized: bool
    emulated_avx512: bool

def build_info() -> BuildInfo: ...
def select_isa(name: str) -> None: ...
def limit_isa(name: str) -> None: ...

# token_logprobs
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
    logit_scale: float,
    soft_cap: float,
    logprobs: int,
    normalizers: int,
    entropy: int,
    sum_p2: int,
    num_threads: int,
) -> None: ...
def token_logprobs_add_piece(
    logits: int,
    dtype: int,
    num_tokens: int,
    piece_size: int,
    row_stride: int,
    first_id: int,
    token_ids: int,
    temperatures: int,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    state: int,
    with_entropy: bool,
    with_sum_p2: bool,
    num_threads: int,
) -> None: ...
def token_logprobs_finish(
    state: int,
    num_tokens: int,
    logprobs: int,
    normalizers: int,
    entropy: int,
    sum_p2: int,
) -> None: ...
def token_logprobs_gradient_piece(
    logits: int,
    dtype: int,
    num_tokens: int,
    piece_size: int,
    row_stride: int,
    first_id: int,
    token_ids: int,
    temperatures: int,
    temperature: float,
    logit_scale: float,
    soft_cap: float,
    normalizers: int,
    entropy: int,
    grad_logprobs: int,
    grad_entropy: int,
    grad: int,
    grad_row_stride: int,
    grad_bias: int,
    num_threads: int,
) -> None: ...

# linear_token_logprobs, linear_policy_loss
def pack_hidden(hidden: int, dtype: int, num_tokens: int, width: int, hidden_stride: int, packed: int, num_threads: int) -> None: ...
def linear_logits(
    packed: int,
    weight: int,
    dtype: int,
    bias: int,
    num_tokens: int,
    num_rows: int,
    width: int,
    weight_stride: int,
    logits: int,
    logits_stride: int,
    num_threads: int,
) -> None: ...
def linear_grad_hidden(
    dz: int,
    dz_stride: int,
    weight: int,
    dtype: int,
    num_tokens: int,
    num_rows: int,
    width: int,
    weight_stride: int,
    grad_hidden: int,
    num_threads: int,
) -> None: ...
def linear_grad_weight(
    dz: int,
    dz_stride: int,
    hidden: int,
    dtype: int,
    num_tokens: int,
    num_rows: int,
    width: int,
    hidden_stride: int,
    grad_weight: int,
    first: bool,
    num_threads: int,
) -> None: ...

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
    logprobs_dtype: int,
    advantages: int,
    advantages_per_token: bool,
    mask: int,
    float_mask: bool,
    old_logprobs: int,
    old_dtype: int,
    rollout_logprobs: int,
    rollout_dtype: int,
    ref_logprobs: int,
    ref_dtype: int,
    entropy: int,
    entropy_dtype: int,
    cu_seqlens: int,
    num_tokens_total: int,
    num_sequences: int,
    width: int,
    numbers: list[float],
    loss: int,
    metrics: int,
    grad: int,
    grad_entropy: int,
    num_threads: int,
) -> int: ...
