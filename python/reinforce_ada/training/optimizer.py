"""AdamW on an fp32 master copy, so that updates far below bf16's 8 bits of mantissa are not lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reinforce_ada.config import TrainingConfig
from reinforce_ada.training.moments import CompactAdamW


class MasterAdamW:
    """AdamW over fp32 copies of the parameters; gradients of all micro-batches are summed in fp32 as well.

    At lr 1e-5 an update is about 1e-5 and a bf16 weight of .05 has a spacing of 2.4e-4: without the copy nearly every step rounds to
    nothing. fp32 parameters are their own master. Tied parameters are given once. Gradients are clipped by their global norm.

    Args:
        moments: dtype in which the two moments are stored, float32 or bfloat16 (see `CompactAdamW`).
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, max_grad_norm: float,
        moments: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self._parameters = {name: p for name, p in parameters if p.requires_grad}
        self._masters = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for name, p in self._parameters.items()
        }
        self._moments = moments
        settings: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.999), "weight_decay": weight_decay}
        self._adam = (
            torch.optim.AdamW(self._masters.values(), **settings, fused=True)
            if moments == torch.float32
            else CompactAdamW(self._masters.values(), **settings)
        )
        self._max_grad_norm = max_grad_norm

    def accumulate(self) -> None:
        """Move the gradients of a backward pass into the masters."""
        for name, p in self._parameters.items():
            master = self._masters[name]
            if master is p or p.grad is None:
                continue
            grad = p.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            p.grad = None

    def touched(self) -> set[str]:
        return {name for name, master in self._masters.items() if master.grad is not None}

    def add_up(self, add_up: Callable[[Tensor], None], names: Collection[str]) -> None:
        """Replace the gradients of these parameters by their sums over all ranks; one that is absent here counts as zero."""
        for name, master in self._masters.items():  # in the same order on every rank
            if name in names:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                add_up(master.grad)

    def step(self, learning_rate: float) -> float:
        """Clip, update, round into the parameters, and clear the gradients.

        Returns: the gradient norm before clipping. With a norm of 0 (no signal) or one that is not finite nothing changes.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._masters.values()), self._max_grad_norm))
        if norm > 0 and math.isfinite(norm):
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
            self._adam.step()
            self._round()
        self._adam.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _round(self) -> None:
        for name, p in self._parameters.items():
            if self._masters[name] is not p:
                p.copy_(self._masters[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything needed to resume: masters and moments, by name."""
        out: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            out[f"master/{name}"] = master.detach()
            for key, value in self._adam.state.get(master, {}).items():
                out[f"{key}/{name}"] = value
        return out

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Return in a few words why `load` cannot take these tensors; "" if it can."""
        own = {f"master/{name}": (master.shape, torch.float32) for name, master in self._masters.items()}
        for name, master in self._masters.items():
            moments = {f"{key}/{name}": (master.shape, self._moments) for key in ("exp_avg", "exp_avg_sq")}
            moments[f"step/{name}"] = (torch.Size([]), torch.float32)
            if moments.keys() & tensors.keys():  # a parameter that never had a gradient has no moments
                own |= moments
        if missing := sorted(own.keys() - tensors.keys()):
            return f"{missing[0]} is missing"
        if unknown := sorted(tensors.keys() - own.keys()):
            return f"{unknown[0]} is of no parameter"
        for name, (shape, dtype) in own.items():
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                return f"{name} is {list(tensor.shape)} {_named(tensor.dtype)}, not {list(shape)} {_named(dtype)}"
            if not bool(tensor.isfinite().all()):
                return f"{name} has values that are not finite"
        return ""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned (no `misfit`); the parameters are rounded from the masters."""
        for name, master in self._masters.items():
            master.copy_(tensors[f"master/{name}"])
            state = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            if state:
                self._adam.state[master] = {key: value.to(master.device, copy=True) for key, value in state.items()}
        self._round()


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rate_at(training: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1.

    Warm-up is linear: of w warm-up steps, step t gets t/(w+1) of the rate. Then, with N steps in all, m = lr_min_fraction and the share
    p = (t-w-1)/(N-w) of the way, the rate is multiplied by

        constant  1
        linear    m + (1-m) (1-p)
        cosine    m + (1-m) (1+cos(pi p))/2

    so step w+1 gets the whole rate, and m itself would be reached at step N+1: no step is sampled for an update of size 0.
    Source: the schedules of the same names in transformers, which these equal after warm-up.
    """
    warm = training.learning_rate * min(1.0, step / (training.warmup_steps + 1))
    after = step - training.warmup_steps - 1
    if training.lr_schedule == "constant" or after <= 0:
        return warm
    share = min(1.0, after / max(1, training.steps - training.warmup_steps))
    shape = 1 - share if training.lr_schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return warm * (training.lr_min_fraction + (1 - training.lr_min_fraction) * shape)
