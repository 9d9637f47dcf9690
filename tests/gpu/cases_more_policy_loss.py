"""policy_loss on a GPU: what its mutants asked for beside cases_policy_loss."""

from __future__ import annotations

from typing import Any

import torch
from cases import each
from cases_policy_loss import assert_conforms, draw, evaluate, flat

from reinforce_ada.ops.policy_loss import RolloutCorrection

GIVEN: dict[str, dict[str, Any]] = {
    "seqs": {"loss_agg": "seq-mean-token-sum", "num_seqs_global": 13.0},
    "length": {"loss_agg": "seq-mean-token-sum-norm", "norm_length": 25.0},
    "both": {"loss_agg": "seq-mean-token-sum-norm", "norm_length": 25.0, "num_seqs_global": 13.0},
}


def check_given_denominators(backend: str, device: str, which: str) -> None:
    assert_conforms(backend, device, draw(), **GIVEN[which])


def check_the_longest_comes_first(backend: str, device: str) -> None:
    """Of more sequences than a block has threads."""
    assert_conforms(backend, device, draw((40, *[1] * 1100)), loss_agg="seq-mean-token-sum-norm")


def check_kl_far_away(backend: str, device: str, kl_bound: float | None) -> None:
    """Where x is past what k3 is computed from, its gradient is 0, whether or not the bound of its value is met."""
    batch = draw()
    far = batch["mask"].nonzero()[:, 0]
    batch["ref_logprobs"][far[::3]] = batch["logprobs"][far[::3]] - 25
    batch["ref_logprobs"][far[1::3]] = batch["logprobs"][far[1::3]] + 4
    assert_conforms(backend, device, batch, kl="k3", kl_coef=1.0, kl_bound=kl_bound, loss="reinforce", old=False)


def check_far_sequences(backend: str, device: str) -> None:
    """A sequence whose ratio is at its bound has no gradient, on either side."""
    batch = draw()
    begin = batch["cu_seqlens"]
    for i, shift in ((3, 3.0), (6, -3.0)):
        tokens = slice(int(begin[i]), int(begin[i + 1]))
        batch["old_logprobs"][tokens] = batch["logprobs"][tokens] + shift
    batch["advantages"] = batch["advantages"].abs() * torch.tensor([-1.0, 1.0]).repeat(len(begin))[: len(begin) - 1]
    for sign in (1, -1):
        flipped = {**batch, "advantages": sign * batch["advantages"]}
        for loss in ("ppo", "sapo"):
            assert_conforms(backend, device, flipped, loss=loss, ratio_level="sequence", log_ratio_bound=2.0, clip_low=1.0, clip_high=1e3)


def check_weights_of_sequences_alone(backend: str, device: str) -> None:
    """No ratio of sequences beside them, and then no old logprobs either."""
    correction = RolloutCorrection(level="sequence", mode="truncate", high=1.5)
    assert_conforms(backend, device, draw(), loss="ppo", rollout_correction=correction)
    assert_conforms(backend, device, draw(), loss="reinforce", rollout_correction=correction, old=False)


def check_ratios_on_one_side(backend: str, device: str, shift: float) -> None:
    """All ratios and weights above 1, or all below: no other number is their smallest or largest."""
    batch = draw()
    for name, by in (("old_logprobs", -shift), ("rollout_logprobs", -2 * shift)):
        batch[name] = torch.where(batch["mask"], batch["logprobs"] + by, batch[name])
    assert_conforms(backend, device, batch, rollout_correction=RolloutCorrection(level="token", mode="truncate", high=5.0))


def check_extremes_come_first(backend: str, device: str) -> None:
    """More parts than one round of the last stage, the extreme ratios in the first."""
    batch = draw((20_000, 9, 1, 1, 1))
    some = batch["mask"].nonzero()[:2, 0]
    batch["old_logprobs"][some] = batch["logprobs"][some] + torch.tensor([4.0, -4.0])
    assert_conforms(backend, device, batch)


def check_reference_that_is_no_number(backend: str, device: str) -> None:
    """Its token's gradient is none, under k3 too; the others' are."""
    batch = draw()
    batch["ref_logprobs"][0] = float("nan")
    value, _, grad = evaluate(batch, device, None, {"kl": "k3", "kl_coef": 0.5, "backend": backend})
    assert value.isnan()
    assert grad[0].isnan()
    assert not grad[1:].isnan().any()


def check_small_kl(backend: str, device: str) -> None:
    """k3 of a difference of 1e-3 is 5e-7: as a difference of numbers near 1 a tenth of it would be noise."""
    batch = draw()
    batch["old_logprobs"] = torch.where(batch["mask"], batch["logprobs"] + 1e-3, batch["old_logprobs"])
    kl = evaluate(batch, device, None, {"backend": backend})[1]["approx_kl_k3"]
    x = (batch["logprobs"].double() - batch["old_logprobs"].double())[batch["mask"]]
    torch.testing.assert_close(kl.cpu(), (x.expm1() - x).mean(), rtol=1e-3, atol=0.0)


def check_ratio_that_is_no_number(backend: str, device: str) -> None:
    """It is the smallest and the largest, wherever it is met."""
    for at in draw((3000, 9, 1, 1, 1))["mask"].nonzero()[[0, 5, 1000, -1], 0]:
        batch = draw((3000, 9, 1, 1, 1))
        batch["mask"][at] = True
        batch["logprobs"][at] = float("nan")
        metrics = evaluate(batch, device, None, {"backend": backend})[1]
        assert metrics["ratio_min"].isnan()
        assert metrics["ratio_max"].isnan()


def check_missing_without_leave(backend: str, device: str) -> None:
    """A NaN among the rollout logprobs is one unless the correction allows it."""
    batch = draw()
    batch["rollout_logprobs"][0] = float("nan")
    for level in ("token", "sequence"):
        correction = RolloutCorrection(level=level, high=1.5)
        value, metrics, _ = evaluate(batch, device, None, {"rollout_correction": correction, "backend": backend})
        assert value.isnan()
        assert metrics["rollout_kl_k1"].isnan()


def check_offsets_without_tokens(backend: str, device: str) -> None:
    """Nothing at all, but for offsets that are not 0."""
    for offsets in ((0,), (0, 0, 0), (3,), (0, 3, 0), (0, 0, 3)):
        nothing = {name: x[:0] for name, x in draw().items()} | {"cu_seqlens": torch.tensor(offsets)}
        nothing["advantages"] = torch.ones(len(offsets) - 1)
        for result in flat(evaluate(nothing, device, None, {"backend": backend})):
            assert (result.isnan() if any(offsets) else result == 0).all(), offsets


CASES = [
    *each(check_given_denominators, *((which,) for which in GIVEN)),
    *each(check_the_longest_comes_first),
    *each(check_kl_far_away, (10.0,), (100.0,), (None,)),
    *each(check_far_sequences),
    *each(check_weights_of_sequences_alone),
    *each(check_small_kl),
    *each(check_ratios_on_one_side, (0.5,), (-0.5,)),
    *each(check_extremes_come_first),
    *each(check_reference_that_is_no_number),
    *each(check_ratio_that_is_no_number),
    *each(check_missing_without_leave),
    *each(check_offsets_without_tokens),
]
