"""Calls of the public operators that together launch every kernel with every combination of flags that a launcher can choose."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from reinforce_ada import ops
from reinforce_ada.ops._dispatch import table
from reinforce_ada.ops.policy_loss import RolloutCorrection
from reinforce_ada.types import PoolStats

__all__ = ["DTYPES", "calls"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
T = 32
# Vocabulary, distance of rows, and elements past an aligned address: aligned throughout, rows that begin aligned and end anywhere, neither.
ROWS = ((151936, 151936, 0), (50257, 50304, 0), (50257, 50257, 1))
COMPLETIONS, GROUPS = 512, 64
Call = tuple[str, Callable[[], Any]]


def calls() -> Iterator[Call]:
    """(dtype, a call of an operator in its Triton form, forward and backward)."""
    makers = {
        "token_logprobs": _token_logprobs,
        "group_advantages": _group_advantages,
        "policy_loss": _policy_loss,
        "linear_token_logprobs": _linear_token_logprobs,
        "linear_policy_loss": _linear_policy_loss,
    }
    for op, forms in table().items():
        if "triton" in forms:
            for dtype in DTYPES:
                yield from ((dtype, call) for call in makers[op](DTYPES[dtype]))


def tensor(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Nothing runs, so nothing is in it. `offset` elements past an address that is a multiple of 64."""
    return torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:].view(shape)


def ids() -> Tensor:
    return torch.zeros(T, dtype=torch.int64)


def _backward(*outputs: Tensor | None) -> None:
    wanted = [x.sum() for x in outputs if x is not None and x.requires_grad]
    if wanted:
        torch.stack(wanted).sum().backward()  # type: ignore[no-untyped-call]


def _token_logprobs(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    flags = product((None, 30.0), (False, True), (False, True), (False, True))
    for (vocab, row_stride, offset), (soft_cap, entropy, sum_p2, per_token) in product(ROWS, flags):
        if row_stride != vocab and not (bool(soft_cap) == entropy == sum_p2 == per_token):
            continue  # its code is that of the aligned rows but for the end of a row: the barest and the fullest tell
        for use in ("logprobs", "entropy", "both") if entropy else ("logprobs",):
            logits = partial(tensor, T, row_stride, dtype=dtype, offset=offset)
            yield partial(_one_token_logprobs, logits, vocab, use, per_token, soft_cap=soft_cap, entropy=entropy, sum_p2=sum_p2)


def _one_token_logprobs(make: Callable[[], Tensor], vocab: int, use: str, per_token: bool, **settings: Any) -> None:
    logits = make()[:, :vocab].requires_grad_()
    temperature = torch.ones(T) if per_token else 0.7
    result = ops.token_logprobs(logits, ids(), temperature=temperature, backend="triton", **settings)
    logprobs, entropy = (result, None) if isinstance(result, Tensor) else result[:2]
    _backward(logprobs if use != "entropy" else None, entropy if use != "logprobs" else None)


def _segments(num_rows: int, num_segments: int) -> Tensor:
    return torch.linspace(0, num_rows, num_segments + 1).long()


def _group_advantages(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    pool = PoolStats(*(torch.ones(GROUPS, dtype=torch.float64) for _ in range(5)))
    wheres: list[dict[str, Any]] = [{"group_of": torch.arange(COMPLETIONS) % GROUPS}, {"cu_seqlens": _segments(COMPLETIONS, GROUPS)}]
    extras: list[dict[str, Any]] = [{}, {"pool": pool}, {"class_weights": torch.ones(GROUPS, 2)}]
    extras.append({**extras[1], **extras[2]})
    values = torch.zeros(GROUPS, dtype=torch.float64)
    choices = product(wheres, extras, ("pool", "group", "leave-one-out", values), ("none", "pool", "group", "batch"), (0, 1))
    for where, extra, baseline, scale, offset in choices:
        for singleton in ("zero", "reward") if isinstance(baseline, str) else ("zero",):
            settings = {**where, **extra, "baseline": baseline, "scale": scale, "singleton": singleton}
            yield partial(ops.group_advantages, tensor(COMPLETIONS, dtype=dtype, offset=offset), backend="triton", **settings)
    for offset in (0, 1):  # groups that are long
        yield partial(ops.group_advantages, tensor(4096, dtype=dtype, offset=offset), cu_seqlens=_segments(4096, 2), backend="triton")


AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CORRECTIONS = (None, *product(("token", "sequence"), ("truncate", "mask"), (False, True)))
KLS = (None, *(f"{name}{more}" for name, more in product(("k1", "k2", "k3", "abs"), ("", "+"))))
POLICY_CALLS = 700  # for every two choices to meet, as the interpreter's run finds


def _policy_settings() -> Iterator[dict[str, Any]]:
    """Calls with choices drawn at random, the same ones each time."""
    draw = random.Random(0)
    for _ in range(POLICY_CALLS):
        loss, correction, kl = draw.choice(("reinforce", "ppo", "cispo", "gspo", "sapo")), draw.choice(CORRECTIONS), draw.choice(KLS)
        level, mode, missing = correction or ("token", "truncate", False)
        yield {
            "loss": loss,
            "ratio_level": "token" if loss == "gspo" else draw.choice(("token", "sequence")),
            "dual_clip": draw.choice((None, 3.0)) if loss == "ppo" else None,
            "loss_agg": draw.choice(AGGREGATIONS),
            "rollout_correction": RolloutCorrection(level=level, mode=mode, allow_missing=missing) if correction else None,
            "kl": kl,
            "kl_coef": 0.1 if kl else 0.0,
            "kl_weighting": draw.choice(("none", "ratio")) if kl else "none",
            "entropy_coef": draw.choice((0.0, 0.01)),
            "old": draw.random() < 0.8,
            "rollout": draw.random() < 0.5,
            "with_entropy": draw.random() < 0.5,
        }


# Packed, one advantage a token, dtype of the mask, elements past an aligned address, sequences and their length.
LAYOUTS = (
    (True, False, torch.bool, 0, 16, 128),
    (True, True, torch.float32, 1, 2, 1024),
    (False, False, torch.float32, 0, 2, 1024),
    (False, True, torch.bool, 1, 16, 128),
)


def _policy_loss(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    for i, settings in enumerate(_policy_settings()):
        yield partial(_one_policy_loss, dtype, *LAYOUTS[i % len(LAYOUTS)], **settings)


def _one_policy_loss(
    dtype: torch.dtype,
    packed: bool,
    per_token: bool,
    mask_dtype: torch.dtype,
    offset: int,
    sequences: int,
    length: int,
    *,
    old: bool,
    rollout: bool,
    with_entropy: bool,
    **settings: Any,
) -> None:
    shape = (sequences * length,) if packed else (sequences, length)
    of_tokens = partial(tensor, *shape, dtype=dtype, offset=offset)
    loss, _ = ops.policy_loss(
        of_tokens().requires_grad_(),
        tensor(*(shape if per_token else (sequences,)), offset=offset),
        tensor(*shape, dtype=mask_dtype, offset=offset),
        old_logprobs=of_tokens() if old else None,
        rollout_logprobs=of_tokens() if rollout or settings.get("rollout_correction") else None,
        ref_logprobs=of_tokens() if settings.get("kl") else None,
        entropy=of_tokens().requires_grad_() if with_entropy or settings["entropy_coef"] else None,
        cu_seqlens=_segments(sequences * length, sequences) if packed else None,
        norm_length=float(length) if settings.get("loss_agg") == "seq-mean-token-sum-norm" else None,
        backend="triton",
        **settings,
    )
    loss.backward()  # type: ignore[no-untyped-call]


# Hidden states, width of the rows, vocabulary, elements past an aligned address.
HEADS = ((256, 256, 4096, 0), (200, 250, 3003, 1))
# Bytes beside the results: all of the vocabulary at once, in pieces, in pieces for some tokens at a time.
PIECES = (None, 1_200_000, 200_000)


def _linear_token_logprobs(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    flags = product(("", "frozen", "trained"), (False, True), (None, 30.0), (False, True), (False, True))
    for shape, (with_bias, per_token, soft_cap, entropy, sum_p2) in product(HEADS, flags):
        settings: dict[str, Any] = {"soft_cap": soft_cap, "entropy": entropy, "sum_p2": sum_p2}
        for use, extra in product(("logprobs", "entropy", "both") if entropy else ("logprobs",), PIECES):
            yield partial(_one_linear, dtype, *shape, use, with_bias, per_token, max_extra_bytes=extra, **settings)


def _head(dtype: torch.dtype, num_tokens: int, width: int, vocab: int, offset: int, with_bias: str) -> dict[str, Any]:
    of = partial(tensor, dtype=dtype, offset=offset)
    return {
        "hidden": of(num_tokens, width).requires_grad_(),
        "weight": of(vocab, width).requires_grad_(),
        "token_ids": torch.zeros(num_tokens, dtype=torch.int64),
        "bias": of(vocab).requires_grad_(with_bias == "trained") if with_bias else None,
    }


def _one_linear(
    dtype: torch.dtype, num_tokens: int, width: int, vocab: int, offset: int, use: str, with_bias: str, per_token: bool, **settings: Any
) -> None:
    head = _head(dtype, num_tokens, width, vocab, offset, with_bias)
    temperature = torch.ones(num_tokens) if per_token else 0.7
    result = ops.linear_token_logprobs(**head, temperature=temperature, backend="triton", **settings)
    logprobs, entropy = (result, None) if isinstance(result, Tensor) else result[:2]
    _backward(logprobs if use != "entropy" else None, entropy if use != "logprobs" else None)


def _linear_policy_loss(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    for (num_tokens, width, vocab, offset), onto, extra in product(HEADS, (False, True), PIECES):
        yield partial(_one_linear_loss, dtype, num_tokens, width, vocab, offset, onto, max_extra_bytes=extra)


def _one_linear_loss(dtype: torch.dtype, num_tokens: int, width: int, vocab: int, offset: int, onto: bool, **settings: Any) -> None:
    head = _head(dtype, num_tokens, width, vocab, offset, with_bias="")
    loss, _ = ops.linear_policy_loss(
        *(head["hidden"], head["weight"], head["token_ids"], torch.zeros(8), torch.ones(num_tokens, dtype=torch.bool)),
        cu_seqlens=_segments(num_tokens, 8),
        weight_grad=tensor(vocab, width, dtype=dtype, offset=offset) if onto else None,
        backend="triton",
        **settings,
    )
    loss.backward()  # type: ignore[no-untyped-call]
