"""Inputs and outputs of every form of policy_loss, and the registration of native forms with torch. Device-independent.

A setting is a field of `Settings`; the numbers by which kernels know it stand there, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from reinforce_ada.ops._torch import DTYPE_CODES, NativeOp, constant, dense, is_eager, parameters
from reinforce_ada.ops.policy_loss.settings import (
    CORRECTION_LEVELS,
    CORRECTION_MODES,
    KL_BOUND,
    KL_ESTIMATORS,
    LOG_RATIO_BOUND,
    LOSS_AGGS,
    LOSSES,
    METRICS,
    WHERE,
    CustomLoss,
    RolloutCorrection,
)

_T = TypeVar("_T")

# -------------------- settings


def _or_zero(count: float | None) -> float:
    return float(count or 0)


def _or_infinity(bound: float | None) -> float:
    return math.inf if bound is None else float(bound)


def _correction_code(correction: RolloutCorrection | None) -> float:
    if correction is None:
        return 0.0
    return 1.0 + 2 * CORRECTION_LEVELS.index(correction.level) + CORRECTION_MODES.index(correction.mode)


_NO_CORRECTION = RolloutCorrection()


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked choices of one `policy_loss` call; the fields are named as its arguments.

    The metadata of a field are the numbers that a kernel gets for it, with their names and in their order in
    csrc/ops/policy_loss/policy_loss.h.
    """

    loss: str | CustomLoss = field(default="ppo", metadata={"loss": lambda loss: float(LOSSES.index(loss))})
    ratio_level: str = field(default="token", metadata={"sequence_ratio": lambda level: float(level == "sequence")})
    clip_low: float = field(default=0.2, metadata={"clip_low": float})
    clip_high: float = field(default=0.28, metadata={"clip_high": float})
    dual_clip: float | None = field(default=None, metadata={"dual_clip": _or_infinity})
    log_ratio_bound: float | None = field(default=LOG_RATIO_BOUND, metadata={"log_ratio_bound": _or_infinity})
    loss_agg: str = field(default="token-mean", metadata={"loss_agg": lambda agg: float(LOSS_AGGS.index(agg))})
    num_tokens_global: float | None = field(default=None, metadata={"num_tokens": _or_zero})
    num_seqs_global: float | None = field(default=None, metadata={"num_seqs": _or_zero})
    norm_length: float | None = field(default=None, metadata={"norm_length": _or_zero})
    rollout_correction: RolloutCorrection | None = field(
        default=None,
        metadata={
            "correction": _correction_code,
            "correction_low": lambda correction: _or_zero((correction or _NO_CORRECTION).low),
            "correction_high": lambda correction: float((correction or _NO_CORRECTION).high),
            "correction_scale": lambda correction: 1 / (correction or _NO_CORRECTION).normalizer,
            "allow_missing": lambda correction: float((correction or _NO_CORRECTION).allow_missing),
        },
    )
    kl: str | None = field(
        default=None,
        metadata={
            "kl": lambda kl: 0.0 if kl is None else float(KL_ESTIMATORS.index(kl.rstrip("+"))),
            "straight_through": lambda kl: float(kl is not None and kl.endswith("+")),
        },
    )
    kl_coef: float = field(default=0.0, metadata={"kl_coef": float})
    kl_weighting: str = field(default="none", metadata={"kl_weighted": lambda weighting: float(weighting == "ratio")})
    kl_bound: float | None = field(default=KL_BOUND, metadata={"kl_bound": _or_infinity})
    entropy_coef: float = field(default=0.0, metadata={"entropy_coef": float})
    advantages_per_token: bool = False
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def named(self, metrics: Tensor, *, has_old: bool, has_rollout: bool, has_entropy: bool) -> dict[str, Tensor]:
        """Return the metrics that mean something for these settings and inputs, by name; `metrics` is in the order of `METRICS`."""
        clips, corrected = has_old and self.loss in ("ppo", "cispo", "gspo"), self.rollout_correction is not None
        dual, kl = has_old and self.dual_clip is not None, self.kl is not None
        of_ratios, of_weights = (has_old, has_old, has_old, has_old, has_old, clips, clips, dual), (corrected, corrected, corrected)
        means = (True, True, *of_ratios, has_rollout, has_rollout, *of_weights, kl, has_entropy)
        return {name: x for name, x, meant in zip(METRICS, metrics.unbind(), means, strict=True) if meant}


_TABLE = tuple((f.name, number, of) for f in fields(Settings) for number, of in f.metadata.items())
NUMBERS = tuple(number for _, number, _ in _TABLE)


def numbers(settings: Settings) -> list[float]:
    """Return the settings as kernels take them, in the order of `NUMBERS`."""
    return once_for(settings, _numbers)


def _numbers(settings: Settings) -> list[float]:
    return [of(getattr(settings, name)) for name, _, of in _TABLE]


def once_for(settings: Settings, make: Callable[[Settings], _T]) -> _T:
    """Return what `make` makes of the settings; a record keeps it, since a run uses the same record at every call."""
    if torch.compiler.is_compiling():
        return make(settings)
    if make not in settings._kept:
        settings._kept[make] = make(settings)
    return settings._kept[make]  # type: ignore[no-any-return]


def by_name(numbers: Sequence[float]) -> Any:
    """Return `numbers` with each as an attribute."""
    return SimpleNamespace(**dict(zip(NUMBERS, numbers, strict=True)))


# -------------------- what a kernel reads and writes


class Inputs(NamedTuple):
    """The arguments of a native form: contiguous, of dtypes that kernels read. [T] with cu_seqlens, or [N, L] without."""

    logprobs: Tensor  # float32, bfloat16 or float16, as the next ones but advantages
    advantages: Tensor  # float32, [N] or one a token
    mask: Tensor  # bool or float32
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    entropy: Tensor | None
    cu_seqlens: Tensor | None  # int64, [N + 1]
    advantages_per_token: bool
    entropy_grad: bool  # whether the derivative in the entropy is wanted
    numbers: list[float]  # of `NUMBERS`

    @property
    def num_sequences(self) -> int:
        """Return the number of packed sequences or of rows."""
        return self.logprobs.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


Results: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, metrics, derivative in logprobs, derivative in entropy or empty


def arguments(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    cu_seqlens: Tensor | None,
    settings: Settings,
) -> Inputs:
    """Return the inputs of a native form for the checked arguments of the public function."""
    return Inputs(
        dense(logprobs),
        constant(advantages, torch.float32),
        constant(mask if mask.dtype in (torch.bool, torch.float32) else mask != 0),
        _constant(old_logprobs),
        _constant(rollout_logprobs),
        _constant(ref_logprobs),
        None if entropy is None else dense(entropy, _readable(entropy)),
        None if cu_seqlens is None else constant(cu_seqlens, torch.int64),
        settings.advantages_per_token,
        entropy is not None and entropy.requires_grad and settings.entropy_coef != 0,
        numbers(settings),
    )


def _constant(x: Tensor | None) -> Tensor | None:
    return None if x is None else constant(x, _readable(x))


def _readable(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in DTYPE_CODES else torch.float32


def empty_results(logprobs: Tensor, entropy: Tensor | None, entropy_grad: bool) -> Results:
    """Return memory for the results."""
    return (
        logprobs.new_empty((), dtype=torch.float32),
        logprobs.new_empty(len(METRICS), dtype=torch.float64),
        torch.empty_like(logprobs),
        logprobs.new_empty(0) if entropy is None or not entropy_grad else torch.empty_like(entropy),
    )


class Kernels(Protocol):
    """The function that the module of a backend provides."""

    def evaluate(self, x: Inputs) -> Results:
        """Return value [] float32, metrics float64 as METRICS lists them, the derivatives in logprobs and, with entropy_grad, in entropy.

        If a cu_seqlens does not go from 0 to T without decreasing, the cpu form raises InputError; a GPU form, which never waits for the
        device, makes everything NaN. Nothing outside of the tensors is read.
        """


def torch_operator(backend: str, kernels: Kernels) -> NativeOp:
    """Return the operator of a backend's kernels: `Results` of `Inputs`, differentiable in logprobs and entropy."""

    def fake(*given: Any) -> Results:
        x = Inputs(*given)
        return empty_results(x.logprobs, x.entropy, x.entropy_grad)

    schema = f"({parameters(Inputs)}) -> (Tensor, Tensor, Tensor, Tensor)"
    forward = lambda *given: kernels.evaluate(Inputs(*given))  # noqa: E731
    return NativeOp(WHERE, backend, schema, forward, fake, setup_context=_setup_context, backward=_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    _, metrics, grad, grad_entropy = output
    ctx.mark_non_differentiable(metrics, grad, grad_entropy)
    ctx.save_for_backward(grad, grad_entropy)
    ctx.set_materialize_grads(False)
    ctx.wants_entropy = Inputs(*inputs).entropy_grad


_BEFORE_ENTROPY = (None,) * (Inputs._fields.index("entropy") - 1)
_AFTER_ENTROPY = (None,) * (len(Inputs._fields) - len(_BEFORE_ENTROPY) - 2)


def _backward(ctx: Any, grad_value: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, grad_entropy = ctx.saved_tensors
    if grad_value is None:
        return (None,) * len(Inputs._fields)
    # loss.backward() takes no second array of the size of logprobs. On a GPU, to see that the factor is 1 would be to wait for the device.
    if not (grad_value.is_cpu and is_eager((grad, grad_value)) and grad_value.item() == 1):
        grad, grad_entropy = grad * grad_value, grad_entropy * grad_value
    return grad, *_BEFORE_ENTROPY, grad_entropy if ctx.wants_entropy else None, *_AFTER_ENTROPY
