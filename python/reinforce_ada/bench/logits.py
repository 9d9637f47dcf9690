"""The cases of token_logprobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.bench import baselines
from reinforce_ada.bench.baselines import Implementation, candidates, compiled, missing, reading, runnable
from reinforce_ada.bench.case import Case, Goal, Setup
from reinforce_ada.bench.checks import close
from reinforce_ada.ops import token_logprobs

_OP = "token_logprobs"
_SHAPES = [(256, 151936), (1024, 32000), (512, 49152), (256, 128256)]  # heads of Qwen2.5, Llama 2, SmolLM2, Llama 3
_DTYPES = ["float32", "bfloat16"]
_CHECKED = slice(0, 16)  # rows that are compared with float64
_QUICK = {"T": 128, "V": 151936}

_FORWARD = (Goal("speedup", 3.5, "inductor"), Goal("speedup", 9, "TRL"))
_CEILING = {"float32": Goal("speedup", 0.9, "reading its bytes"), "bfloat16": Goal("gelem_per_s", 7)}
_FRESH = {"float32": 2.5, "bfloat16": 3.5}


def cases() -> Iterator[Case]:
    """Yield the forward at every shape, and at the first two also with entropy and with gradients."""
    for i, (tokens, vocab) in enumerate(_SHAPES):
        for dtype in _DTYPES:
            shape = {"T": tokens, "V": vocab}
            quick = _QUICK if i == 0 else None
            goals = (*_FORWARD, _CEILING[dtype])
            yield Case(_OP, "forward", shape, dtype, partial(_forward, entropy=False), goals, "log_softmax", quick)
            if i < 2:
                yield Case(_OP, "forward with entropy", shape, dtype, partial(_forward, entropy=True), goals[::2], "log_softmax")
                yield from _with_gradients(shape, dtype, quick)


def _with_gradients(shape: Mapping[str, int], dtype: str, quick: Mapping[str, int] | None) -> Iterator[Case]:
    in_place = (Goal("speedup", 6.5, "inductor"), Goal("extra_mb", 10))
    fresh = (Goal("speedup", _FRESH[dtype], "inductor"),)
    entropy = Goal("speedup", 5, "inductor")
    for name, inplace, with_entropy, goals, quick_shape in (
        ("forward and backward, gradient over the logits", True, False, in_place, quick if dtype == "float32" else None),
        ("forward and backward, fresh gradient", False, False, fresh, None),
        ("forward and backward with entropy, gradient over the logits", True, True, (entropy, Goal("extra_mb", 10)), None),
        ("forward and backward with entropy, fresh gradient", False, True, (entropy,), None),
    ):
        build = partial(_backward, inplace=inplace, entropy=with_entropy)
        yield Case(_OP, name, shape, dtype, build, goals, "log_softmax", quick_shape)


def _inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits with the spread of a language model's, token ids, and two rows of incoming gradients."""
    tokens, vocab = case.shape["T"], case.shape["V"]
    logits = (torch.randn(tokens, vocab, device=device) * 3).to(getattr(torch, case.dtype))
    return logits, torch.randint(vocab, (tokens,), device=device), torch.randn(2, tokens, device=device)


def _forward(case: Case, device: str, entropy: bool) -> Setup:
    logits, ids, _ = _inputs(case, device)
    truth = token_logprobs(logits[_CHECKED].double(), ids[_CHECKED], entropy=True, backend="reference")

    def check(results: Any, loose: bool) -> None:
        parts = results[:2] if entropy else (results,)
        for name, a, e in zip(("logprobs", "entropy"), parts, (truth.logprobs, truth.entropy), strict=False):
            assert e is not None
            close(name, a[_CHECKED], e, 0.15 if loose else 1e-5)

    found = _with_entropy() if entropy else _logprobs_only()
    return Setup(
        subject=lambda: token_logprobs(logits, ids, entropy=entropy),
        others=[*candidates(found, lambda implementation: implementation(logits, ids)), reading(logits.nbytes, device)],
        check=check,
        held=[logits, ids],
        moved_bytes=logits.nbytes,
        elements=logits.numel(),
    )


def _logprobs_only() -> dict[str, Implementation]:
    return {
        "log_softmax": baselines.log_softmax,
        "TRL": baselines.trl,
        "cross_entropy": baselines.cross_entropy,
        "inductor logsumexp": compiled(baselines.logsumexp),
        "inductor cross_entropy": compiled(baselines.cross_entropy),
    }


def _with_entropy() -> dict[str, Implementation]:
    return {
        "log_softmax": baselines.entropy_by_log_softmax,
        "inductor log_softmax": compiled(baselines.entropy_by_log_softmax),
        "inductor logsumexp": compiled(baselines.entropy_by_logsumexp),
    }


def _backward(case: Case, device: str, inplace: bool, entropy: bool) -> Setup:
    """Set up the gradient of the logprobs, and of the entropy if requested, for given incoming gradients."""
    values, ids, g = _inputs(case, device)
    leaf = values.clone().requires_grad_()
    weights = (g[0], g[1]) if entropy else (g[0],)

    def gradient(implementation: Implementation, logits: Tensor) -> Tensor:
        results = implementation(logits, ids)
        outputs = results[:2] if isinstance(results, tuple) else (results,)
        return torch.autograd.grad(outputs, logits, weights)[0]

    def ours() -> Tensor:
        logits = leaf.view_as(leaf) if inplace else leaf  # only a tensor that is no leaf may be overwritten
        return gradient(partial(token_logprobs, entropy=entropy, inplace_backward=inplace), logits)

    rows = values[_CHECKED].double().requires_grad_()
    truth = token_logprobs(rows, ids[_CHECKED], entropy=True, backend="reference")
    assert truth.entropy is not None
    outputs = (truth.logprobs, truth.entropy)[: len(weights)]
    expected = torch.autograd.grad(outputs, rows, [w[_CHECKED].double() for w in weights])[0]

    def check(results: Tensor, loose: bool) -> None:
        eps = torch.finfo(values.dtype).eps
        close("gradient", results[_CHECKED], expected, 0.02 if loose else 1e-5, 0.1 if loose else 2 * eps)

    found = _with_entropy() if entropy else _logprobs_only()
    gpu, absent = _on_gpu(device) if inplace and not entropy else ({}, {})
    others = candidates({**found, **gpu}, lambda implementation: gradient(implementation, leaf))
    return Setup(
        subject=ours,
        others=[*others, reading(3 * values.nbytes, device)],
        check=check,
        held=[values, leaf, ids, g],
        moved_bytes=3 * values.nbytes,  # the logits twice, the gradient once
        elements=values.numel(),
        reset=partial(leaf.data.copy_, values) if inplace else None,  # hidden from autograd: all earlier graphs are finished
        absent=absent,
    )


def _on_gpu(device: str) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Return the baselines that need a GPU and write the gradient over the logits, and why others are absent."""
    return runnable(
        {
            "liger": (missing("liger_kernel", device, needs_gpu=True), _liger),
            "flash-attn": (missing("flash_attn", device, needs_gpu=True), _flash_attn),
        }
    )


def _liger(logits: Tensor, ids: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    loss: Tensor = liger_cross_entropy(logits.view_as(logits), ids, reduction="none")
    return -loss


def _flash_attn(logits: Tensor, ids: Tensor) -> Tensor:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    loss: Tensor = cross_entropy_loss(logits.view_as(logits), ids, inplace_backward=True)[0]
    return -loss
