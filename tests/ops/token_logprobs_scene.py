"""Shapes, heads and comparisons for the tests of `token_logprobs`."""

import math

import pytest
import torch
from conformance import assert_no_worse, builds
from torch import Tensor

from reinforce_ada.ops import token_logprobs

every_build = pytest.mark.parametrize("backend", builds("token_logprobs"), indirect=True)
native_builds = pytest.mark.parametrize("backend", builds("token_logprobs", reference=False), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("token_logprobs", every_isa=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("token_logprobs", reference=False, every_isa=False), indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])

LN2, LN3 = math.log(2), math.log(3)
# One, less than any vector, one short of, exactly and one past the vectors and blocks of the kernels, and a real vocabulary.
SHAPES = [(0, 7), (1, 1), (3, 2), (5, 15), (4, 16), (3, 17), (2, 64), (7, 1003), (3, 2047), (2, 2048), (2, 2049), (1, 151936)]


def evaluate(logits: Tensor, ids: Tensor, temperature: float | Tensor, g: Tensor, h: Tensor, **options: object) -> list[Tensor]:
    """Results and the gradient of g . logprobs + h . entropy."""
    leaf = logits.detach().requires_grad_()
    out = token_logprobs(leaf, ids, temperature=temperature, entropy=True, sum_p2=True, **options)
    (grad,) = torch.autograd.grad((out.logprobs.to(g.dtype) * g).sum() + (out.entropy.to(h.dtype) * h).sum(), leaf)
    return [x.detach() for x in (*out, grad)]


def assert_conforms(logits: Tensor, ids: Tensor, backend: str, temperature: float | Tensor = 1.0, **head: float | None) -> None:
    """Results and gradients are no further from float64 than plain PyTorch's; `plain` is what a trainer writes without this op."""
    g, h = torch.randn(2, len(ids))
    g[::3] = 0
    actual = evaluate(logits, ids, temperature, g, h, backend=backend, **head)
    truth = evaluate(logits.double(), ids, temperature, g.double(), h.double(), backend="reference", **head)
    plain = evaluate(logits, ids, temperature, g, h, backend="reference", **head)
    for name, a, t, p in zip(("logprobs", "entropy", "sum_p2", "gradient"), actual, truth, plain, strict=True):
        assert a.dtype == (logits.dtype if name == "gradient" else torch.float32)
        assert_no_worse(a, t, p, 2e-6, name)
