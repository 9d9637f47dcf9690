"""`policy_loss` is what trainers compute: their formulas spelled out on padded rows in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import padded
from policy_loss_truth import draw, every_form, run
from torch import Tensor

from reinforce_ada.ops.policy_loss import RolloutCorrection

# Other trainers: their formulas spelled out on padded rows in float64, and the arguments of docs/operators.md that mean them.


class Trainer:
    """The tensors of a padded batch under the names of losses.md, and the aggregations of verl and TRL."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        def clean(name: str) -> Tensor:
            return torch.where(batch["mask"], batch[name], 0)

        self.leaf = clean("logprobs").requires_grad_()
        self.m = batch["mask"].double()
        self.adv = batch["advantages"][:, None]
        self.rows = len(self.m)
        self.d = self.leaf - clean("old_logprobs")
        self.rho = clean("old_logprobs") - clean("rollout_logprobs")
        self.to_ref = clean("ref_logprobs") - self.leaf
        self.entropy = clean("entropy")

    def mean(self, x: Tensor) -> Tensor:
        return (x * self.m).sum() / self.m.sum()

    def row_mean(self, x: Tensor) -> Tensor:
        return (x * self.m).sum(1) / self.m.sum(1).clamp(min=1)

    def verl_ratio(self) -> Tensor:
        return self.d.clamp(-20, 20).exp()

    def verl_vanilla(self, low: float = 0.2, high: float = 0.2, c: float = 3.0) -> Tensor:
        r = self.verl_ratio()
        first = torch.maximum(-self.adv * r, -self.adv * r.clamp(1 - low, 1 + high))
        return torch.where(self.adv < 0, torch.minimum(first, -self.adv * c), first)

    def verl_seq_mean(self, x: Tensor) -> Tensor:
        counted = self.m.sum(1) > 0
        return ((x * self.m).sum(1) / (self.m.sum(1) + 1e-8))[counted].sum() / counted.sum()

    def verl_gspo(self) -> Tensor:
        s = self.row_mean(self.d)[:, None]
        q = (self.leaf - self.leaf.detach() + s.detach()).clamp(max=10).exp()
        return torch.maximum(-self.adv * q, -self.adv * q.clamp(1 - 3e-4, 1 + 4e-4))

    def sapo(self, r: Tensor) -> Tensor:
        tau = torch.where(self.adv > 0, 1.0, 1.05)
        return -torch.sigmoid(tau * (r - 1)) * 4 / tau * self.adv

    def verl_cispo(self) -> Tensor:
        return -self.verl_ratio().clamp(0.8, 1.2).detach() * self.adv * self.leaf

    def low_var_kl(self) -> Tensor:
        y = self.to_ref.clamp(-20, 20)
        return (y.exp() - y - 1).clamp(-10, 10)

    def trl_c1(self, level: str) -> Tensor:
        return (self.row_mean(self.d)[:, None] if level == "sequence" else self.d).exp()

    def trl_clipped(self, level: str = "token", high: float = 0.2, delta: float | None = None) -> Tensor:
        c1 = self.trl_c1(level)
        bounded = c1 if delta is None else c1.clamp(max=delta)
        return -torch.minimum(bounded * self.adv, c1.clamp(0.8, 1 + high) * self.adv)

    def trl_kl(self, level: str = "token") -> Tensor:
        return (self.to_ref.exp() - self.to_ref - 1) * self.trl_c1(level)

    def trl_weight(self, mode: str, low: float | None, high: float) -> Tensor:
        ratio = ((self.rho * self.m).sum(1, keepdim=True) if "sequence" in mode else self.rho).exp()
        if "truncate" in mode:
            return ratio.clamp(low, high)
        return ratio.masked_fill((ratio > high) | (ratio < (low or 0)), 0.0)


def tis(x: Tensor, level: str, high: float) -> Tensor:
    """verl's truncated weights of x, a log-ratio."""
    total = x.sum(1, keepdim=True).expand_as(x) if level == "sequence" else x
    return total.clamp(-20, 20).exp().clamp(max=high)


TRL: dict[str, Any] = {"clip_high": 0.2, "log_ratio_bound": None}
ROWS: dict[str, Any] = {"num_seqs_global": 5}  # TRL averages over every row, whatever its mask
LOSSES_OF_TRAINERS: list[tuple[str, dict[str, Any], Callable[[Trainer], Tensor]]] = [
    ("verl vanilla", {"clip_high": 0.2, "dual_clip": 3.0}, lambda t: t.mean(t.verl_vanilla())),
    ("verl gspo", {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "loss_agg": "seq-mean-token-mean"},
     lambda t: t.verl_seq_mean(t.verl_gspo())),
    ("verl sapo", {"loss": "sapo", "loss_agg": "seq-mean-token-mean"}, lambda t: t.verl_seq_mean(t.sapo(t.verl_ratio()))),
    ("verl cispo", {"loss": "cispo", "clip_high": 0.2}, lambda t: t.mean(t.verl_cispo())),
    ("verl kl loss and entropy", {"clip_high": 0.2, "dual_clip": 3.0, "kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.1},
     lambda t: t.mean(t.verl_vanilla()) - 0.1 * t.mean(t.entropy) + 0.3 * t.mean(t.low_var_kl())),
    ("verl token-mean over 2 ranks", {"clip_high": 0.2, "dual_clip": 3.0, "num_tokens_global": 90 / 2},
     lambda t: 2 * (t.verl_vanilla() * t.m).sum() / 90),
    ("verl token-level TIS", {"clip_high": 0.2, "dual_clip": 3.0, "rollout_correction": RolloutCorrection("token", high=1.1)},
     lambda t: t.mean(t.verl_vanilla() * tis(t.rho, "token", 1.1))),
    ("verl sequence-level TIS", {"clip_high": 0.2, "dual_clip": 3.0, "rollout_correction": RolloutCorrection("sequence", high=1.2)},
     lambda t: t.mean(t.verl_vanilla() * tis(t.rho, "sequence", 1.2))),
    ("verl IcePop", {"clip_high": 0.2, "dual_clip": 3.0, "rollout_correction": RolloutCorrection("token", "mask", low=0.9, high=1.1)},
     lambda t: t.mean(t.verl_vanilla() * t.rho.exp() * ((t.rho.exp() >= 0.9) & (t.rho.exp() <= 1.1)))),
    ("TRL grpo", {**TRL, **ROWS, "loss_agg": "seq-mean-token-mean"}, lambda t: t.row_mean(t.trl_clipped()).mean()),
    ("TRL bnpo", TRL, lambda t: t.mean(t.trl_clipped())),
    ("TRL dr_grpo", {**TRL, **ROWS, "loss_agg": "seq-mean-token-sum-norm", "norm_length": 32},
     lambda t: (t.trl_clipped() * t.m).sum() / (t.rows * 32)),
    ("TRL dapo", {**TRL, "num_tokens_global": 90 / 2 * 4 / 8},  # gradient_accumulation_steps=4, steps_per_generation=8
     lambda t: (t.trl_clipped() * t.m).sum() / (90 / 2 * (4 / 8))),
    ("TRL luspo", {**TRL, **ROWS, "ratio_level": "sequence", "loss_agg": "seq-mean-token-sum"},
     lambda t: (t.trl_clipped("sequence") * t.m).sum(1).mean()),
    ("TRL cispo", {"loss": "cispo", "clip_low": 1.0, "clip_high": 0.1, "log_ratio_bound": None},  # epsilon_high=1.1
     lambda t: t.mean(-t.trl_c1("token").detach().clamp(max=1.1) * t.adv * t.leaf)),
    ("TRL sapo", {**ROWS, "loss": "sapo", "loss_agg": "seq-mean-token-mean", "log_ratio_bound": None},
     lambda t: t.row_mean(t.sapo(t.trl_c1("token"))).mean()),
    ("TRL gspo", {**TRL, **ROWS, "ratio_level": "sequence", "loss_agg": "seq-mean-token-mean"},
     lambda t: t.row_mean(t.trl_clipped("sequence").expand_as(t.m)).mean()),
    ("TRL delta", {**TRL, **ROWS, "dual_clip": 1.3, "loss_agg": "seq-mean-token-mean"},
     lambda t: t.row_mean(t.trl_clipped(delta=1.3)).mean()),
    ("TRL beta", {**TRL, "kl": "k3", "kl_coef": 0.3, "kl_weighting": "ratio", "kl_bound": None},
     lambda t: t.mean(t.trl_clipped() + 0.3 * t.trl_kl())),
    ("TRL beta, sequence level", {**TRL, "ratio_level": "sequence", "kl": "k3", "kl_coef": 0.3, "kl_weighting": "ratio", "kl_bound": None},
     lambda t: t.mean(t.trl_clipped("sequence") + 0.3 * t.trl_kl("sequence"))),
    ("TRL sequence_mask", {**TRL, "rollout_correction": RolloutCorrection("sequence", "mask", high=1.2, allow_missing=True)},
     lambda t: t.mean(t.trl_clipped() * t.trl_weight("sequence_mask", None, 1.2))),
    ("TRL token_truncate, sequence level", {**TRL, "ratio_level": "sequence",
                                            "rollout_correction": RolloutCorrection("token", "truncate", low=0.9, high=1.1)},
     lambda t: t.mean(t.trl_clipped("sequence") * t.trl_weight("token_truncate", 0.9, 1.1))),
    ("OpenRLHF gspo", {"clip_high": 0.2, "ratio_level": "sequence", "loss_agg": "seq-mean-token-mean"},
     lambda t: t.row_mean(t.trl_clipped("sequence").expand_as(t.m))[t.m.any(1)].mean()),
    ("Reinforce-Ada", {"dual_clip": 10.0}, lambda t: t.mean(t.verl_vanilla(0.2, 0.28, 10.0))),
]  # fmt: skip


@every_form
@pytest.mark.parametrize(("name", "options", "formula"), LOSSES_OF_TRAINERS, ids=[name for name, _, _ in LOSSES_OF_TRAINERS])
def test_losses_of_trainers(backend: str, name: str, options: dict[str, Any], formula: Callable[[Trainer], Tensor]) -> None:
    batch = padded(draw(3, (4, 7, 2, 9, 30)))
    trainer = Trainer(batch)
    want = formula(trainer)
    (grad,) = torch.autograd.grad(want, trainer.leaf)
    dtype, rtol = (torch.float64, 1e-7) if backend == "reference" else (torch.float32, 3e-6)
    got = run(batch, dtype, backend=backend, **options)
    assert got[0].item() == pytest.approx(want.item(), rel=rtol, abs=rtol)
    torch.testing.assert_close(got[2].double(), grad, rtol=rtol, atol=rtol * grad.abs().max().item())


def test_the_documentation_lists_these_trainers() -> None:
    page = (Path(__file__).parents[2] / "docs/operators.md").read_text()
    for name, _, _ in LOSSES_OF_TRAINERS:
        assert f"| {name} |" in page, name


@every_form
def test_batch_normalised_weights(backend: str) -> None:
    """verl divides the weights by their mean over the batch, which the metric of a first call over all of it is."""
    batch = padded(draw(3, (4, 7, 2, 9)))
    trainer = Trainer(batch)
    weight = tis(trainer.rho, "token", 1.1)
    want = trainer.mean(trainer.verl_vanilla() * weight / trainer.mean(weight))
    options: dict[str, Any] = {"clip_high": 0.2, "dual_clip": 3.0, "backend": backend}
    _, metrics, _ = run(batch, torch.float32, rollout_correction=RolloutCorrection("token", high=1.1), **options)
    mean = metrics["rollout_weight_mean"].item()
    value, metrics, _ = run(batch, torch.float32, rollout_correction=RolloutCorrection("token", high=1.1, normalizer=mean), **options)
    assert value.item() == pytest.approx(want.item(), rel=1e-5)
    assert metrics["rollout_weight_mean"].item() == pytest.approx(1, rel=1e-6)
