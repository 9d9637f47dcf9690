"""token_logprobs on the CPU against what a trainer would write, and against torch.compile of the best of it.

pytest benchmarks/bench_token_logprobs.py --benchmark-json=token_logprobs.json -s
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reinforce_ada.ops import token_logprobs

SHAPES = [(256, 151936), (1024, 32000), (512, 49152)]  # Qwen2.5, Llama 2, SmolLM2
cases = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# torch's own, on importing inductor
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, ids[:, None]).squeeze(1)


def logsumexp(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(1, ids[:, None]).squeeze(1).float() - logits.float().logsumexp(-1)


def entropy_too(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(1, ids[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with the spread of a language model's, ids, and gradients of the logprobs."""
    return (torch.randn(shape) * 3).to(dtype), torch.randint(shape[1], shape[:1]), torch.randn(shape[0])


def compiled(form: Callable[..., object]) -> Callable[..., object]:
    torch.compiler.reset()
    return torch.compile(form, dynamic=False)


@cases
@dtypes
def test_forward(interleave: Callable[..., dict[str, float]], shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, ids, _ = make(shape, dtype)
    torch.testing.assert_close(token_logprobs(logits, ids, backend="cpu"), log_softmax(logits, ids), rtol=0, atol=2e-5)
    inductor = compiled(logsumexp)
    ratios = interleave(
        lambda: token_logprobs(logits, ids, backend="cpu"),
        {
            "log_softmax": lambda: log_softmax(logits, ids),
            "logsumexp": lambda: logsumexp(logits, ids),
            "inductor": lambda: inductor(logits, ids),
        },
        moved_bytes=logits.nbytes,
        op="token_logprobs forward",
        dtype=dtype,
        shape=shape,
    )
    assert min(ratios["log_softmax"], ratios["logsumexp"]) >= 2


@cases
@dtypes
def test_forward_with_entropy(interleave: Callable[..., dict[str, float]], shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, ids, _ = make(shape, dtype)
    rows = slice(0, 16)  # in float64: in float32 eager's entropy is off by 8e-5 at V = 151936
    actual = token_logprobs(logits[rows], ids[rows], entropy=True, backend="cpu")
    truth = token_logprobs(logits[rows].double(), ids[rows], entropy=True, backend="reference")
    torch.testing.assert_close(actual[:2], truth[:2], rtol=0, atol=5e-6, check_dtype=False)
    inductor = compiled(entropy_too)
    ratios = interleave(
        lambda: token_logprobs(logits, ids, entropy=True, backend="cpu"),
        {"eager": lambda: entropy_too(logits, ids), "inductor": lambda: inductor(logits, ids)},
        moved_bytes=logits.nbytes,
        op="token_logprobs forward with entropy",
        dtype=dtype,
        shape=shape,
    )
    assert ratios["eager"] >= 2


@cases
@dtypes
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in place"])
def test_forward_and_backward(
    interleave: Callable[..., dict[str, float]], shape: tuple[int, int], dtype: torch.dtype, inplace: bool
) -> None:
    values, ids, g = make(shape, dtype)
    leaf = values.clone().requires_grad_()

    def ours(logits: Tensor, ids: Tensor) -> Tensor:
        return token_logprobs(logits, ids, inplace_backward=inplace, backend="cpu")

    def gradient(form: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        logits = leaf.view_as(leaf) if form is ours else leaf  # only what is not a leaf may be overwritten
        return torch.autograd.grad(form(logits, ids), logits, g)[0]

    def reset() -> None:
        if inplace:
            leaf.data.copy_(values)

    expected = gradient(log_softmax)
    torch.testing.assert_close(gradient(ours), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    del expected
    inductor = compiled(logsumexp)
    ratios = interleave(
        lambda: gradient(ours),
        {
            "log_softmax": lambda: gradient(log_softmax),
            "logsumexp": lambda: gradient(logsumexp),
            "inductor": lambda: gradient(inductor),
        },
        reset=reset,
        moved_bytes=3 * values.nbytes,
        op=f"token_logprobs forward and backward, {'in place' if inplace else 'fresh gradient'}",
        dtype=dtype,
        shape=shape,
    )
    assert min(ratios["log_softmax"], ratios["logsumexp"]) >= 2
