"""policy_loss on a GPU: what every form of it is held to."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import assert_repeatable, each, inside, interpreted
from conformance import assert_same_bits, padded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reinforce_ada.ops import policy_loss
from reinforce_ada.ops._dispatch import operator
from reinforce_ada.ops.policy_loss import LOSS_AGGS, LOSSES, RolloutCorrection
from reinforce_ada.ops.policy_loss.contract import Settings, arguments

NAN, INF = math.nan, math.inf
# A one-token sequence, an empty one, one that is fully masked (index 4), sequences over several blocks of the kernels.
LENGTHS = (1, 5, 0, 16, 3, 600, 41, 0, 17)
LONG = (1500, *[1] * 700, 0, 0, 40)
CORRECTIONS = {
    "token-truncate": RolloutCorrection("token", "truncate", high=1.1),
    "token-mask": RolloutCorrection("token", "mask", low=0.9, high=1.2, normalizer=1.5),
    "sequence-truncate": RolloutCorrection("sequence", "truncate", low=0.3, high=1.2),
    "sequence-mask": RolloutCorrection("sequence", "mask", high=1.3, allow_missing=True),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on-policy": {"old": False},
    "sequence": {"ratio_level": "sequence", "loss_agg": "seq-mean-token-mean"},
    "weighted-kl": {"kl": "k3", "kl_coef": 0.3, "kl_weighting": "ratio"},
    "weighted-kl-sequence": {"kl": "k2", "kl_coef": 0.3, "kl_weighting": "ratio", "ratio_level": "sequence"},
    "entropy": {"entropy_coef": 0.2, "loss_agg": "seq-mean-token-sum"},
    "bounded": {"log_ratio_bound": 0.25, "kl": "k3", "kl_coef": 0.3, "kl_bound": 0.2},
    "unbounded": {"log_ratio_bound": None, "kl": "k3", "kl_coef": 0.3, "kl_bound": None, "loss_agg": "seq-mean-token-sum-norm"},
    "global": {"num_tokens_global": 77.0},
}


def draw(lengths: tuple[int, ...] = LENGTHS, *, per_token: bool = False, missing: bool = False) -> dict[str, Tensor]:
    """A packed float32 batch; what lies under the mask is poison."""
    total = sum(lengths)
    logprobs = -torch.rand(total) - 0.1
    old = logprobs + 0.3 * torch.randn(total)
    rollout = old + 0.15 * torch.randn(total)
    if missing:
        rollout[::7] = NAN
    mask = torch.rand(total) < 0.8
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    mask[offsets[4] : offsets[5]] = False
    mask[0] = True
    batch = {"logprobs": logprobs, "old_logprobs": old, "rollout_logprobs": rollout, "ref_logprobs": logprobs + 0.4 * torch.randn(total)}
    batch["entropy"] = torch.rand(total)
    for i, (name, x) in enumerate(batch.items()):
        batch[name] = torch.where(mask, x, torch.tensor([NAN, INF, -INF])[(torch.arange(total) + i) % 3])
    batch["advantages"] = torch.randn(total if per_token else len(lengths))
    if per_token:
        batch["advantages"][~mask] = NAN
    return {**batch, "mask": mask, "cu_seqlens": offsets}


def evaluate(batch: dict[str, Tensor], device: str, dtype: torch.dtype | None, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Loss, metrics by name, gradients in logprobs and entropy. `dtype` is that of all values, None for what they are."""
    given = {"ref_logprobs": "kl", "entropy": "entropy_coef", "rollout_logprobs": "rollout_correction"}
    call = {k: v for k, v in batch.items() if given.get(k, k) in options or k not in given}
    options = dict(options)
    if not options.pop("old", True):
        call.pop("old_logprobs")
    if options.pop("rollout", False):
        call["rollout_logprobs"] = batch["rollout_logprobs"]
    call = {k: (v.to(dtype) if dtype is not None and v.is_floating_point() else v).to(device) for k, v in call.items()}
    leaves = [call["logprobs"].requires_grad_(), *([call["entropy"].requires_grad_()] if "entropy" in call else [])]
    value, metrics = policy_loss(**call, **options)
    grads = torch.autograd.grad(value * 3, leaves)
    return value.detach(), metrics, *grads


def assert_conforms(backend: str, device: str, batch: dict[str, Tensor], **options: Any) -> None:
    """Against float64 of the same numbers: loss and metrics within 2e-5, gradients as plain PyTorch and 1e-6 of the largest."""
    actual = evaluate(batch, device, None, {**options, "backend": backend})
    truth = evaluate(batch, "cpu", torch.float64, {**options, "backend": "reference"})
    plain = evaluate(batch, "cpu", None, {**options, "backend": "reference"})
    torch.testing.assert_close(actual[0].cpu().double(), truth[0], rtol=2e-5, atol=2e-5)
    assert actual[1].keys() == truth[1].keys()
    for name, x in truth[1].items():
        torch.testing.assert_close(actual[1][name].cpu(), x, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    for a, t, p in zip(actual[2:], truth[2:], plain[2:], strict=True):
        a, p = a.cpu(), p.double()
        assert a.dtype in (torch.float32, torch.bfloat16, torch.float16)
        size, info = t.abs().max().item(), torch.finfo(a.dtype)
        rounding = 0.0 if a.dtype == torch.float32 else info.eps * (1.01 if interpreted(backend) else 0.51)
        allowed = (p - t).abs().max() + 1e-6 * size + rounding * t.abs() + (0 if a.dtype == torch.float32 else info.tiny)
        assert ((a.double() - t).abs() <= allowed).all(), f"off by {(a.double() - t).abs().max():.3g} of {size:.3g}"
        assert (a[~batch["mask"]] == 0).all()


def check_loss(backend: str, device: str, loss: str, variant: str) -> None:
    assert_conforms(backend, device, draw(), loss=loss, **VARIANTS[variant])


def check_aggregation(backend: str, device: str, loss_agg: str, layout: str) -> None:
    batch = draw(LENGTHS, per_token=layout != "packed")
    assert_conforms(backend, device, padded(batch) if layout == "padded" else batch, loss_agg=loss_agg, dual_clip=2.0)


def check_correction(backend: str, device: str, name: str, layout: str) -> None:
    correction = CORRECTIONS[name]
    batch = draw(missing=correction.allow_missing)
    options: dict[str, Any] = {"loss_agg": "seq-mean-token-mean", "rollout_correction": correction, "log_ratio_bound": 0.5}
    assert_conforms(backend, device, padded(batch) if layout == "padded" else batch, **options)


def check_kl(backend: str, device: str, kl: str) -> None:
    batch = draw()
    equal = batch["mask"].nonzero()[::5, 0]
    batch["ref_logprobs"][equal] = batch["logprobs"][equal]  # where |x| has its corner
    assert_conforms(backend, device, batch, kl=kl, kl_coef=0.3, loss="reinforce")


def check_many_sequences(backend: str, device: str, lengths: tuple[int, ...]) -> None:
    """More than one program, or round of one, looks at; sequences of one token and of several blocks."""
    options: dict[str, Any] = {"loss": "gspo", "rollout_correction": CORRECTIONS["sequence-truncate"], "kl": "k3", "kl_coef": 0.1}
    for loss_agg in ("token-mean", "seq-mean-token-mean"):
        assert_conforms(backend, device, draw(lengths), loss_agg=loss_agg, **options)
    assert_conforms(backend, device, draw(lengths), ratio_level="sequence", loss_agg="seq-mean-token-sum-norm")


def check_half_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    """Read and written as it is; companions of another dtype, a float mask and int32 offsets too."""
    for names in (("logprobs", "old_logprobs", "ref_logprobs", "entropy"), ("logprobs", "rollout_logprobs")):
        batch = draw()
        batch = {k: v.to(dtype) if k in names else v for k, v in batch.items()}
        options: dict[str, Any] = {"kl": "k3", "kl_coef": 0.3, "entropy_coef": 0.1, "rollout_correction": CORRECTIONS["token-mask"]}
        assert_conforms(backend, device, batch, **options)
        results = [flat(evaluate(b, device, None, {**options, "backend": backend})) for b in (batch, as_floats(batch))]
        assert_same_bits(*results)


def as_floats(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "mask": batch["mask"].float(), "cu_seqlens": batch["cu_seqlens"].int()}


def flat(results: tuple[Any, ...]) -> list[Tensor]:
    value, metrics, *grads = results
    return [value, *metrics.values(), *grads]


def check_surroundings(backend: str, device: str) -> None:
    """Tensors at odd addresses, between numbers that would show: the same bits."""
    batch = {k: v.to(device) for k, v in draw().items()}
    options: dict[str, Any] = {"kl": "k1", "kl_coef": 0.3, "entropy_coef": 0.1, "rollout_correction": CORRECTIONS["sequence-mask"]}
    want = evaluate(batch, device, None, {**options, "backend": backend})
    fills: dict[str, Any] = {"mask": True, "cu_seqlens": 2**40}
    moved = {k: inside(v, fills.get(k, NAN))[0] for k, v in batch.items()}
    assert_same_bits(flat(evaluate(moved, device, None, {**options, "backend": backend})), flat(want))


def check_nothing(backend: str, device: str) -> None:
    """No token counted, no token, no sequence: loss, metrics and gradient 0."""
    for shape, cu in (((2, 3), None), ((0, 3), None), ((3, 0), None), ((0,), [0]), ((0,), [0, 0, 0]), ((4,), [0, 4, 4])):
        batch = {name: torch.full(shape, NAN) for name in ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy")}
        num_seqs = shape[0] if cu is None else len(cu) - 1
        batch |= {"advantages": torch.ones(num_seqs), "mask": torch.zeros(shape, dtype=torch.bool)}
        if cu is not None:
            batch["cu_seqlens"] = torch.tensor(cu)
        for loss, loss_agg in (("ppo", "token-mean"), ("gspo", "seq-mean-token-mean"), ("cispo", "seq-mean-token-sum-norm")):
            options: dict[str, Any] = {"kl": "k3", "kl_coef": 1.0, "rollout_correction": CORRECTIONS["sequence-mask"], "entropy_coef": 0.1}
            value, metrics, *grads = evaluate(batch, device, None, {**options, "loss": loss, "loss_agg": loss_agg, "backend": backend})
            assert value.item() == 0
            assert not any(grad.any() for grad in grads)
            assert {name for name, x in metrics.items() if x.item() != 0} <= {"num_masked"}
            assert metrics["num_masked"].item() == math.prod(shape)


def check_wrong_offsets(backend: str, device: str) -> None:
    """Not an error, which would wait for the device, and no read outside: everything is NaN."""
    total = sum(LENGTHS)
    good = torch.tensor([0, *LENGTHS]).cumsum(0)
    wrong = {"begins late": (0, 1), "begins early": (0, -5), "decreases": (3, 1), "ends early": (9, total - 1), "ends late": (9, total + 3)}
    wrong |= {"far away": (4, 2**40), "far before": (4, -(2**40)), "far end": (9, 2**40)}
    for what, (at, offset) in wrong.items():
        batch = draw()
        batch["cu_seqlens"] = good.clone()
        batch["cu_seqlens"][at] = offset
        options = {"ratio_level": "sequence", "entropy_coef": 0.1, "loss_agg": "seq-mean-token-sum-norm", "backend": backend}
        for result in flat(evaluate(batch, device, None, options)):
            assert result.isnan().all(), what
    batch = draw() | {"cu_seqlens": torch.tensor([0]), "advantages": torch.zeros(0)}
    assert all(x.isnan().all() for x in flat(evaluate(batch, device, None, {"backend": backend})))


def check_not_a_number(backend: str, device: str) -> None:
    """A counted NaN is seen in the loss and its metrics; a huge ratio is bounded."""
    batch = draw()
    batch["logprobs"][0] = NAN
    value, metrics, grad = evaluate(batch, device, None, {"backend": backend})
    assert value.isnan()
    assert grad[0].isnan()
    assert grad[1:].isfinite().all()
    for name in ("approx_kl_k1", "approx_kl_k3", "ratio_mean"):
        assert metrics[name].isnan()
    batch = draw()
    batch["old_logprobs"] = torch.where(torch.arange(len(batch["mask"])) % 2 == 0, batch["logprobs"] - 90, batch["logprobs"] + 90)
    for bound in (20.0, None):
        value, metrics, grad = evaluate(batch, device, None, {"log_ratio_bound": bound, "dual_clip": 3.0, "backend": backend})
        assert all(x.isfinite().all() for x in (value, grad, *metrics.values()))


def check_repeatable(backend: str, device: str, lengths: tuple[int, ...]) -> None:
    batch = {k: v.to(device) for k, v in draw(lengths).items()}
    options: dict[str, Any] = {"loss": "gspo", "rollout_correction": CORRECTIONS["sequence-mask"], "entropy_coef": 0.1, "backend": backend}
    assert_repeatable(lambda: flat(evaluate(batch, device, None, options)))


def check_torch(backend: str, device: str) -> None:
    """opcheck, and one graph under torch.compile: gradient and all."""
    cu = torch.tensor([0, 3, 3, 8], device=device)
    chosen = Settings(loss_agg="seq-mean-token-mean", kl="k3", kl_coef=0.1, entropy_coef=0.1)
    for leaf, wants in ((torch.randn(8, device=device).requires_grad_(), True), (torch.randn(8, device=device).half(), False)):
        entropy = torch.rand(8, device=device).requires_grad_(wants)
        others = [torch.randn(8, device=device), torch.randn(8, device=device).bfloat16(), torch.randn(8, device=device), entropy, cu]
        mask = torch.ones(8, dtype=torch.bool, device=device)
        args = arguments(leaf, torch.randn(3, device=device), mask, *others, chosen)
        torch.library.opcheck(operator("policy_loss", backend).op, args)

    batch = {k: v.nan_to_num(0, 0, 0).to(device) if v.is_floating_point() else v.to(device) for k, v in draw().items()}

    def step(logprobs: Tensor, rest: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = policy_loss(
            logprobs * 1.0, **rest, kl="k3+", kl_coef=0.1, rollout_correction=RolloutCorrection("sequence"), backend=backend
        )
        return value * 0.5, metrics

    rest = {k: v for k, v in batch.items() if k not in ("logprobs", "entropy")}
    torch.compiler.reset()
    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = batch["logprobs"].clone().requires_grad_()
        value, metrics = f(leaf, rest)
        value.backward()
        results.append([value.detach(), leaf.grad, *metrics.values()])
    torch.compiler.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-9)


def check_fake_tensors(backend: str, device: str) -> None:
    """Shapes without a kernel."""
    with FakeTensorMode():
        leaf = torch.empty(8, device=device, dtype=torch.bfloat16, requires_grad=True)
        offsets = torch.empty(4, device=device, dtype=torch.int64)
        mask = torch.empty(8, device=device, dtype=torch.bool)
        value, metrics = policy_loss(leaf, torch.empty(3, device=device), mask, cu_seqlens=offsets, backend=backend)
        assert (value.shape, value.dtype, metrics["num_tokens"].dtype) == ((), torch.float32, torch.float64)
        assert torch.autograd.grad(value, leaf)[0].dtype == torch.bfloat16


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


# The interpreter takes a second for each: every loss, every variant, and those that a loss has a branch of its own for.
PAIRS = [(loss, variant) for variant in VARIANTS for loss in LOSSES if not (loss == "gspo" and "sequence" in variant)]
FEW = [
    pair for pair in PAIRS if pair[0] == "ppo" or pair[1] == "bounded" or pair in (("sapo", "sequence"), ("cispo", "weighted-kl-sequence"))
]
LAYOUTS = ("packed", "packed-per-token", "padded")

CASES = [
    *each(check_loss, *FEW),
    *each(check_loss, *(pair for pair in PAIRS if pair not in FEW), large=True),
    *each(check_aggregation, *((loss_agg, layout) for loss_agg in LOSS_AGGS for layout in LAYOUTS)),
    *each(check_correction, *((name, layout) for name in CORRECTIONS for layout in ("packed", "padded"))),
    *each(check_kl, *((kl,) for kl in ("k1", "k2", "k3", "abs", "k1+", "k2+", "k3+", "abs+"))),
    *each(check_many_sequences, ((600, *[1] * 10, 0, 0, 40),), ((700, 0, 900, 800, 600),)),
    *each(check_many_sequences, (LONG,), ((3,) * 2500,), ((70000, 0, 1, 5, 33000),), large=True),
    *each(check_half_precision, dtypes=True),
    *each(check_surroundings),
    *each(check_nothing),
    *each(check_wrong_offsets),
    *each(check_not_a_number),
    *each(check_repeatable, (LENGTHS,)),
    *each(check_repeatable, (LONG,), large=True),
    *each(check_torch),
    *each(check_fake_tensors),
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
