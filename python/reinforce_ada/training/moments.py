"""AdamW that stores its two moments in bfloat16."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 22  # weights that are updated together: what is computed for them in float32 takes some 100 MB


class CompactAdamW(torch.optim.Optimizer):
    """AdamW whose moments are computed in float32 and stored in bfloat16, 4 bytes a weight in place of 8.

        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2        p <- (1 - lr decay) p - lr m' / (sqrt(v') + eps)

    with m' = m / (1 - b1^t) and v' = v / (1 - b2^t), before m and v are rounded. They are rounded up or down at random, such that the mean
    is the number itself. To the nearest, v would never shrink: a step changes it by at most 1/1000, and two bfloat16 numbers are at least
    1/256 apart.

    Beside float32 moments, a step's update has noise of 2 % of its length and a bias of less than .2 % (random gradients, 4000 steps).
    The random bits are a function of the parameter's place and step alone, so that a resumed run and every rank round alike.

    Args:
        parameters: float32.
        lr, betas, weight_decay, eps: as in torch.optim.AdamW.
    """

    def __init__(
        self, parameters: Iterable[Tensor], *, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    self._update(index, p, group)

    def _update(self, index: int, p: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=torch.bfloat16) for _ in range(2))
        state["step"] += 1
        step = int(state["step"])
        bits = torch.Generator(p.device).manual_seed((1_000_003 * index + step) % 2**32)
        tensors = [x if x.ndim else x[None] for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]) if x is not None]
        num_rows = max(1, _PIECE // max(1, tensors[0][:1].numel()))
        for own, grad, exp_avg, exp_avg_sq in zip(*(x.split(num_rows) for x in tensors), strict=True):
            _update_piece(own, grad, exp_avg, exp_avg_sq, step, group, bits)


def _update_piece(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, group: Mapping[str, Any], bits: torch.Generator
) -> None:
    b1, b2 = group["betas"]
    m = exp_avg.float().lerp_(grad, 1 - b1)
    v = exp_avg_sq.float().mul_(b2).addcmul_(grad, grad, value=1 - b2)
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.addcdiv_(m, (v / (1 - b2**step)).sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - b1**step))
    noise = torch.randint(-(2**31), 2**31, p.shape, dtype=torch.int32, device=p.device, generator=bits)
    exp_avg.copy_(rounded(m, noise & 0xFFFF))
    exp_avg_sq.copy_(rounded(v, (noise >> 16) & 0xFFFF))


def rounded(x: Tensor, noise: Tensor) -> Tensor:
    """Return float32 numbers with the low 16 bits zero: one of the two bfloat16 neighbours of each, with mean x.

    Args:
        noise: int32 of the same shape, uniform in [0, 2^16).
    """
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
