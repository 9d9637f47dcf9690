"""A prompt's pass rate, predicted from the policy's own state at the prompt's last token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from reinforce_ada.training.batching import Batch

_RIDGE = 2.0  # times the number of features: predictions start with a standard deviation of about .3, for outcomes of variance .2
_NAMES = ("moments", "targets")


class PassRatePredictor:
    """Ridge regression of outcomes, 0 or 1, on the states that predict the first token of a completion.

        m(h) = clip(1/2 + w . x, 0, 1),   x = (h / rms(h), 1)
        w = (S + ridge I)^-1 u,   S = sum decay^age x x^T,   u = sum decay^age x (outcome - 1/2)

    The sums run over all completions of finished steps, and age counts steps. The weights w are those of before the step, so that a
    prediction has seen no outcome of its own step: a baseline that contains it stays unbiased, and a poor one costs variance only. The
    states come from the forward pass that trains, so that a prediction costs one product with w, and a step two sums and the solution of
    one system of D + 1 equations.

    Args:
        width: D, the width of a state.
        decay: factor on the sums per step, in (0, 1]; that of the memory.
    """

    def __init__(self, width: int, decay: float, device: torch.device) -> None:
        self._decay = decay
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self._moments, self._targets, self._weights = zeros(width + 1, width + 1), zeros(width + 1), zeros(width + 1)
        self._new = [torch.zeros_like(self._moments), torch.zeros_like(self._targets)]
        self._errors = zeros(2)  # of this step: sum of squares, number of completions

    @torch.no_grad()
    def complete(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the advantages [N] fp32 of a batch less their part of the predicted pass rates, and note the outcomes for `update`.

        Args:
            hidden: [T, D] states that predict the batch's completion tokens. A completion without a token is left out.
        """
        has_token = batch.cu_seqlens[1:] > batch.cu_seqlens[:-1]
        x = features(hidden[batch.cu_seqlens[:-1][has_token]])
        outcomes = (batch.advantages[has_token] > 0).float()  # a correct completion's is above 0 whatever is remembered
        predicted = (x @ self._weights + 0.5).clamp(0, 1)
        self._new[0] += x.T @ x
        self._new[1] += x.T @ (outcomes - 0.5)
        self._errors += torch.stack([((outcomes - predicted) ** 2).sum(), has_token.sum()])
        advantages = batch.advantages.clone()
        advantages[has_token] -= batch.prediction_weights[has_token] * predicted
        return advantages

    @torch.no_grad()
    def update(self, add_up: Callable[[Tensor], None]) -> dict[str, float]:
        """End a step: add what all ranks noted, and return the mean squared error of the step's predictions."""
        for tensor in (*self._new, self._errors):
            add_up(tensor)
        for kept, new in zip((self._moments, self._targets), self._new, strict=True):
            kept.mul_(self._decay).add_(new)
            new.zero_()
        self._solve()
        total, count = self._errors.tolist()
        self._errors.zero_()
        return {"prediction_error": total / count} if count else {}

    def _solve(self) -> None:
        s = self._moments.double()
        s.diagonal().add_(_RIDGE * len(s))
        self._weights = torch.linalg.solve(s, self._targets.double()).float()

    def tensors(self) -> dict[str, Tensor]:
        """Return everything needed to resume, by name."""
        return {f"predictor/{name}": getattr(self, f"_{name}") for name in _NAMES}

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Return in a few words why `load` cannot take these tensors; "" if it can."""
        for name, own in self.tensors().items():
            found = tensors.get(name)
            if found is None:
                return f"{name} is missing"
            if found.shape != own.shape or found.dtype != own.dtype or not bool(found.isfinite().all()):
                return f"{name} is not a finite {list(own.shape)} float32"
        return ""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned (no `misfit`)."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
        self._solve()


def features(hidden: Tensor) -> Tensor:
    """Return the features [N, D + 1] fp32 of states [N, D]: scaled to a mean square of 1, and a constant.

    Those of a state that is not finite are 0, so that one bad step does not stay in the sums for ever.
    """
    h = hidden.detach().float()
    scaled = h * torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-6)
    found = torch.cat([scaled, torch.ones_like(h[:, :1])], dim=1)
    return torch.where(found.isfinite().all(dim=1, keepdim=True), found, 0.0)
