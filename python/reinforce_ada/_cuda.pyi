"""Stub of the native CUDA module. Tensors are passed as addresses (Tensor.data_ptr()); 0 stands for "not given"."""

from typing import TypedDict

class BuildInfo(TypedDict):
    compiler: str
    architectures: list[str]
    emulated: bool

def build_info() -> BuildInfo: ...

# Why kernels cannot run on a device of this index (no driver, an architecture that was not built for), None when they can.
def unusable_device(index: int) -> str | None: ...

# token_logprobs
def token_logprobs_forward(
    device: int,
    stream: int,
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
    row_max: int,
    log2_sum: int,
    entropy: int,
    sum_p2: int,
) -> None: ...
def token_logprobs_gradient(
    device: int,
    stream: int,
    grad: int,
    grad_row_stride: int,
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
    row_max: int,
    log2_sum: int,
    entropy: int,
    grad_logprobs: int,
    grad_entropy: int,
) -> None: ...

# group_advantages
def group_advantages_workspace() -> int: ...
def group_advantages(
    device: int,
    stream: int,
    rewards: int,
    dtype: int,
    order: int,
    offsets: int,
    num_rows: int,
    num_segments: int,
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
    workspace: int,
    out: int,
) -> None: ...

# policy_loss
def policy_loss_workspace(num_tokens: int, num_sequences: int) -> int: ...
def policy_loss(
    device: int,
    stream: int,
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
    workspace: int,
    loss: int,
    metrics: int,
    grad: int,
    grad_entropy: int,
) -> None: ...
