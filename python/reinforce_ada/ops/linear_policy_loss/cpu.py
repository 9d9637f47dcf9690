"""linear_policy_loss on the CPU: the gradient is computed in the forward, chunk by chunk, while the logits of the chunk exist.

The derivative of the loss in a token's logprob is known as soon as the logprob is, and with it the gradient of its logits, which
overwrites them. This takes three products per token, as many as with all logits kept. If the derivative depends on more than the token, all
logprobs are computed first and the logits again, with four products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import IGNORED
from reinforce_ada.ops._products import LANES, Hidden, add_hidden_gradient, gradient_bytes, logits_dtype
from reinforce_ada.ops._torch import NativeOp, constant, dense, is_eager, once, parameters, refuse_transforms, resolved
from reinforce_ada.ops.linear_policy_loss.contract import WHERE, Inputs
from reinforce_ada.ops.linear_token_logprobs import cpu as linear
from reinforce_ada.ops.linear_token_logprobs.contract import Gradients, Head, ScoredTokens, empty_gradients, take
from reinforce_ada.ops.policy_loss import contract as policy
from reinforce_ada.ops.policy_loss import cpu as policy_cpu
from reinforce_ada.ops.policy_loss.checks import check_offsets
from reinforce_ada.ops.policy_loss.contract import Results, Settings, numbers, once_for
from reinforce_ada.ops.policy_loss.settings import METRICS
from reinforce_ada.ops.token_logprobs.contract import scoring
from reinforce_ada.ops.token_logprobs.cpu import check_values

_EXTRA_BYTES = 62_000_000  # 96 tokens of a vocabulary of 151936 in float32, up to D = 2048; fewer make the products slower
_MOST_TOKENS = 2048  # of a chunk: the products lay out 192 bytes for each, which `scratch_bytes` has to hold


class Fused(NamedTuple):
    """The arguments of the operator, as kernels read them; all tensors of tokens but the mask are [T]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    token_ids: Tensor
    temperatures: Tensor | None
    temperature: float
    logit_scale: float
    soft_cap: float
    advantages: Tensor
    mask: Tensor  # [T] with cu_seqlens, [N, L] without
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    cu_seqlens: Tensor | None
    advantages_per_token: bool
    numbers: list[float]  # of the loss
    before_aggregation: list[float]  # of each token's part of it; empty where a token has none
    aggregation: list[float]
    with_entropy: bool
    of_hidden: bool
    of_weight: bool
    of_bias: bool
    extra_bytes: int


def evaluate(x: Inputs) -> tuple[Tensor, Tensor]:
    """Return (loss, metrics in the order of `METRICS`). Raises: InputError for offsets, ids and temperatures out of range."""
    check_offsets(WHERE, x.cu_seqlens, x.mask.shape[0])
    wanted = [leaf is not None and leaf.requires_grad and torch.is_grad_enabled() for leaf in (x.hidden, x.weight, x.bias)]
    onto = x.weight_grad if wanted[1] else None
    run = _op if onto is None else partial(_onto_weight_grad, onto)
    value, metrics, *_ = run(
        *(resolved(x.hidden.flatten(0, -2)), resolved(x.weight), x.bias, constant(x.token_ids.flatten(), torch.int64)),
        *scoring(x.flat_temperature, x.logit_scale, x.soft_cap),
        *(constant(x.advantages, torch.float32), constant(x.mask != 0)),
        *(None if logprobs is None else constant(logprobs) for logprobs in (x.old_logprobs, x.rollout_logprobs, x.ref_logprobs)),
        None if x.cu_seqlens is None else constant(x.cu_seqlens, torch.int64),
        x.settings.advantages_per_token,
        *once_for(x.settings, _numbers_of_parts),
        *(x.settings.entropy_coef != 0, *wanted, _EXTRA_BYTES if x.max_extra_bytes is None else x.max_extra_bytes),
    )
    return value, metrics


def _numbers_of_parts(s: Settings) -> tuple[list[float], list[float], list[float]]:
    """Return the numbers of the loss, of each token's part of it if tokens have one, and of the aggregation."""
    return numbers(s), numbers(_before_aggregation(s)) if _of_each_token(s) else [], numbers(_aggregation(s))


def _of_each_token(s: Settings) -> bool:
    """Return whether the derivative of a token's loss depends on that token alone."""
    of_sequences = s.loss == "gspo" or s.ratio_level == "sequence"
    return not of_sequences and (s.rollout_correction is None or s.rollout_correction.level == "token")


def _before_aggregation(s: Settings) -> Settings:
    return replace(s, advantages_per_token=True, loss_agg="token-mean", num_tokens_global=1.0, num_seqs_global=None, norm_length=None)


def _aggregation(s: Settings) -> Settings:
    """Return the settings of a loss whose derivative, with advantages of -1, is each token's share in the aggregate."""
    names = ("loss_agg", "num_tokens_global", "num_seqs_global", "norm_length")
    return Settings(loss="reinforce", **{name: getattr(s, name) for name in names})


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The inputs of the loss besides logprobs and entropy."""

    advantages: Tensor
    per_token: bool
    mask: Tensor  # [T] with cu_seqlens, [N, L] without
    old: Tensor | None
    rollout: Tensor | None
    ref: Tensor | None
    cu_seqlens: Tensor | None

    def evaluate(self, logprobs: Tensor, entropy: Tensor | None, numbers: list[float]) -> Results:
        """Value, metrics and derivatives."""
        entropy = None if entropy is None else entropy.view(self.mask.shape)
        others = (self.old, self.rollout, self.ref, entropy, self.cu_seqlens, self.per_token, entropy is not None)
        return policy_cpu.evaluate(policy.Inputs(logprobs.view(self.mask.shape), self.advantages, self.mask, *others, numbers))

    def shares(self, aggregation: list[float]) -> Tensor:
        """Return each token's share in the aggregate, [T]."""
        plain = replace(self, advantages=torch.full_like(self.advantages, -1), old=None, rollout=None, ref=None)
        zeros = self.advantages.new_zeros(self.mask.shape)
        return plain.evaluate(zeros, None, aggregation)[2].flatten()

    def tokens(self, index: Tensor) -> LossInputs:
        """Return the inputs of these tokens, as one sequence."""
        old, rollout, ref = (None if x is None else take(x.flatten(), index) for x in (self.old, self.rollout, self.ref))
        mask, cu_seqlens = self.mask.new_ones(len(index)), index.new_tensor([0, len(index)])
        return LossInputs(take(self.advantages, index), True, mask, old, rollout, ref, cu_seqlens)

    def each_token(self) -> LossInputs:
        """Return the inputs with one advantage per token, [T]."""
        if self.per_token:
            return replace(self, advantages=self.advantages.flatten())
        if self.cu_seqlens is None:
            return replace(self, advantages=self.advantages.repeat_interleave(self.mask.shape[1]), per_token=True)
        of_token = self.advantages.repeat_interleave(self.cu_seqlens.diff(), output_size=len(self.mask))
        return replace(self, advantages=of_token, per_token=True)


def _forward(*given: Any, onto: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (loss, metrics, gradients of hidden, weight and bias times a factor, the factor)."""
    x = Fused(*given)
    ids = x.token_ids.masked_fill(~x.mask.flatten(), IGNORED)
    check_values(WHERE, ids, x.weight.shape[0], x.temperatures)
    bias = None if x.bias is None else dense(x.bias, logits_dtype(x.weight.dtype))
    head = Head(x.weight, bias, x.temperatures, x.temperature, x.logit_scale, x.soft_cap)
    others = (x.old_logprobs, x.rollout_logprobs, x.ref_logprobs, x.cu_seqlens)
    inputs = LossInputs(x.advantages, x.advantages_per_token, x.mask, *others)
    grads = empty_gradients(x.hidden, x.weight, x.of_hidden, x.of_weight and onto is None, x.of_bias)
    wanted = x.of_hidden or x.of_weight or x.of_bias
    factor = x.hidden.new_ones((), dtype=torch.float64)
    with torch.autocast("cpu", enabled=False):
        if wanted and x.before_aggregation:
            shares = inputs.shares(x.aggregation)
            factor = factor if onto is not None else _factor(shares, x.hidden.dtype)
            logprobs, entropy = _score_with_gradients(x, head, ids, inputs.each_token(), (shares * factor).float(), grads, onto)
            value, metrics, _, _ = inputs.evaluate(logprobs, entropy, x.numbers)
            return value, metrics, *grads, factor
        scores, normalizers = linear.score(x.hidden, head, ids, x.with_entropy, False, x.extra_bytes)
        value, metrics, g, h = inputs.evaluate(scores.logprobs, scores.entropy if x.with_entropy else None, x.numbers)
        if wanted:
            factor = factor if onto is not None else _factor(g, x.hidden.dtype)
            slopes = [(slope.flatten() * factor).float() if slope.numel() else None for slope in (g, h)]
            linear.add_gradients(x.hidden, head, ScoredTokens(ids, (normalizers,), scores.entropy, *slopes), grads, x.extra_bytes, onto)
        return value, metrics, *grads, factor


def _factor(derivatives: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor that multiplies float16 gradients until the backward, a power of 2 that keeps a token's share from vanishing.

    The shares then add up to 8 to 16. Shares of 1 would overflow the weight's gradient, which sums them: 8192 tokens with hidden
    states of 20 reach 1.3e5, and no smaller loss scale could help.
    """
    total = derivatives.abs().sum(dtype=torch.float64).item() if dtype == torch.float16 else 0
    exponent = 4 - math.ceil(math.log2(total)) if 0 < total < math.inf else 0
    return derivatives.new_tensor(2.0**exponent, dtype=torch.float64)


def _score_with_gradients(
    x: Fused, head: Head, token_ids: Tensor, inputs: LossInputs, shares: Tensor, grads: Gradients, onto: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Write the gradients, and return logprobs and entropy [T], 0 where a token is ignored."""
    hidden = x.hidden
    grad_hidden, grad_weight, grad_bias = grads if onto is None else (grads[0], onto, grads[2])
    grad_hidden.zero_()
    bias_sums = grad_bias.new_zeros(len(grad_bias), dtype=torch.float64)
    logprobs = shares.new_zeros(len(token_ids))
    entropy = torch.zeros_like(logprobs) if x.with_entropy else None
    active = (token_ids != IGNORED).nonzero().squeeze(1)
    room = linear.for_logits(x.extra_bytes, hidden.dtype, bias_sums.nbytes + linear.bias_bytes(head))
    tokens = _tokens_of_chunk(len(active), head.weight, room)
    buffer = linear.buffer_for(hidden, tokens, head.vocab)
    for chunk, index in enumerate(linear.chunks(active, tokens)):
        rows, ids, head_at = Hidden(take(hidden, index)), take(token_ids, index), head.at(index)
        dz = rows.logits(head.weight, head.bias, buffer)
        (logp, h, _), normalizers = linear.score_logits(dz, ids, head_at, x.with_entropy)
        _, _, *slopes = inputs.tokens(index).evaluate(logp, h if x.with_entropy else None, x.before_aggregation)
        incoming = [slope * take(shares, index) if slope.numel() else None for slope in slopes]
        linear.gradient_over_logits(dz, slice(0, head.vocab), ScoredTokens(ids, (normalizers,), h, *incoming), head_at, bias_sums)
        if len(grad_weight):
            rows.add_weight_gradient(dz, grad_weight, first=chunk == 0 and onto is None)
        if len(grad_hidden):
            sums = rows.rows.new_zeros(rows.rows.shape, dtype=torch.float32)
            add_hidden_gradient(dz, head.weight, sums)
            grad_hidden[index] = sums.to(grad_hidden.dtype)
        logprobs[index] = logp
        if entropy is not None:
            entropy[index] = h
    if not len(active) and onto is None:
        grad_weight.zero_()
    grad_bias.copy_(bias_sums)
    return logprobs, entropy


def _tokens_of_chunk(num_tokens: int, weight: Tensor, room: int) -> int:
    """Return how many tokens' logits fit, in whole tiles."""
    vocab, width = weight.shape
    dtype = weight.dtype
    # Beside the logits: what the products hold, the gathered hidden states, the sum of their gradient, and that rounded to half.
    token = vocab * gradient_bytes(dtype, vocab) + Hidden.bytes_per_token(dtype, width) + 8 * width
    tokens = max(1, min(num_tokens, _MOST_TOKENS, room // token))
    tile = LANES if dtype == torch.bfloat16 else 3 * LANES  # tokens that the products take at a time
    return tokens if tokens < tile or tokens == num_tokens else tokens // tile * tile


def _fake(*given: Any) -> tuple[Tensor, ...]:
    x = Fused(*given)
    value, metrics = x.hidden.new_empty((), dtype=torch.float32), x.hidden.new_empty(len(METRICS), dtype=torch.float64)
    grads = empty_gradients(x.hidden, x.weight, x.of_hidden, x.of_weight, x.of_bias)
    return value, metrics, *grads, x.hidden.new_empty((), dtype=torch.float64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *others = output
    ctx.mark_non_differentiable(*others)
    ctx.save_for_backward(*others[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_value: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(Fused._fields) - 3)
    if grad_value is None:
        return None, None, None, *nothing
    *grads, factor = ctx.saved_tensors
    scale = grad_value.double() / factor
    if not is_eager((grad_value,)):
        grads = [grad * scale for grad in grads]
    elif scale != 1:
        # In place: a second [V, D] is what this operator is there to avoid. A second backward finds them changed, and raises.
        for grad in grads:
            grad.mul_(scale)
    return *(grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[:3], strict=True)), *nothing


class _OntoWeightGrad(torch.autograd.Function):
    """The operator that adds the weight's gradient to a tensor in the forward and gives autograd none for the weight."""

    @staticmethod
    def forward(ctx: Any, onto: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        output = _forward(*inputs, onto=onto)
        torch.autograd.graph.increment_version(onto)
        _setup_context(ctx, inputs, output)
        ctx.spent = False
        return output

    @staticmethod
    @partial(once, WHERE)
    def backward(ctx: Any, grad_value: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_value is not None and grad_value != 1:
            given = f"weight_grad and a loss that is multiplied by {grad_value.item():g} afterwards"
            raise InputError(WHERE, given, "loss.backward() on the loss as it is: the gradient has been added", "use num_tokens_global")
        if ctx.spent:
            raise InputError(WHERE, "weight_grad and a second backward", "one: the gradient has been added once")
        ctx.spent = True
        grad_hidden, _, grad_bias, _ = ctx.saved_tensors
        of_hidden, of_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        return None, grad_hidden if of_hidden else None, None, grad_bias if of_bias else None, *(None,) * (len(Fused._fields) - 3)


def _onto_weight_grad(onto: Tensor, *inputs: Any) -> Any:
    refuse_transforms(WHERE, inputs)
    run: Any = _OntoWeightGrad.apply
    return run(onto, *inputs)


_op = NativeOp(
    WHERE,
    "cpu",
    f"({parameters(Fused)}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
