"""`linear_policy_loss`: a hand-sized head, the float64 composition, every form against it, and what never matters."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from conformance import Peak, assert_no_worse, assert_repeatable, assert_same_bits, builds, threads
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import RolloutCorrection, _products, _torch, linear_policy_loss, policy_loss
from reinforce_ada.ops.linear_policy_loss import cpu as cpu_form
from reinforce_ada.ops.linear_token_logprobs import cpu as scoring
from reinforce_ada.ops.policy_loss import LOSS_AGGS, LOSSES

every_build = pytest.mark.parametrize("backend", builds("linear_policy_loss"), indirect=True)
every_form = pytest.mark.parametrize("backend", builds("linear_policy_loss", every_isa=False), indirect=True)
native_build = pytest.mark.parametrize("backend", builds("linear_policy_loss", reference=False), indirect=True)
native_form = pytest.mark.parametrize("backend", builds("linear_policy_loss", reference=False, every_isa=False), indirect=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

LENGTHS = (1, 4, 0, 7, 1, 11)
T, D, V = sum(LENGTHS), 19, 37
LEAVES = ("hidden", "weight", "bias")


def draw(dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = LENGTHS, width: int = D, vocab: int = V) -> dict[str, Tensor]:
    """Logits of a spread of 2, ratios of a spread of .3; the second sequence has no counted token."""
    num_tokens = sum(lengths)
    hidden, weight, bias = torch.randn(num_tokens, width), torch.randn(vocab, width) * 2 / max(width, 1) ** 0.5, torch.randn(vocab)
    hidden, weight, bias = (x.to(dtype) for x in (hidden, weight, bias))
    ids = torch.randint(vocab, (num_tokens,))
    cu = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(num_tokens) < 0.8
    if len(lengths) > 3:
        mask[cu[1] : cu[2]] = False
    mask[:1] = True
    head = (hidden.double() @ weight.double().T + bias.double()).log_softmax(-1)
    logprobs = head.gather(1, ids[:, None])[:, 0]
    others = {name: (logprobs + 0.3 * torch.randn(num_tokens)).float() for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")}
    if dtype == torch.float64:
        others = {name: x.double() for name, x in others.items()}
    advantages = torch.randn(len(lengths))
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    return {**leaves, "token_ids": ids, "advantages": advantages, "mask": mask, "cu_seqlens": cu, **others}


def evaluate(batch: dict[str, Tensor], dtype: torch.dtype | None = None, scale: float = 1.0, **options: Any) -> dict[str, Tensor]:
    """loss, metrics, and the gradients of scale * loss; tensors that no option reads are left out."""
    call = {k: v.to(dtype) if dtype and k in LEAVES else v for k, v in batch.items()}
    unread = {
        "bias": options.pop("bias", True),
        "old_logprobs": options.pop("old", True),
        "rollout_logprobs": "rollout_correction" in options,
        "ref_logprobs": "kl" in options,
    }
    call = {k: v for k, v in call.items() if unread.get(k, True)}
    leaves = {k: call[k].detach().requires_grad_() for k in LEAVES if k in call}
    loss, metrics = linear_policy_loss(**{**call, **leaves}, **options)
    grads = torch.autograd.grad(loss * scale, list(leaves.values()))
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True)), **metrics}


# The meaning


@every_form
def test_by_hand(backend: str) -> None:
    """Two tokens with odds 3:1; on-policy. The gradient of -log p is p - [j == y], the entropy's -p (log p + H)."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[math.log(3)], [0.0]], requires_grad=True)
    ids, cu = torch.tensor([0, 1]), torch.tensor([0, 2])
    loss, metrics = linear_policy_loss(
        hidden, weight, ids, torch.tensor([1.0, 2.0]), torch.ones(2), cu_seqlens=cu, loss="reinforce", entropy_coef=0.5, backend=backend
    )
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics["entropy"].item() == pytest.approx(entropy, rel=1e-6)
    assert set(metrics) == {"entropy", "num_tokens", "num_masked"}
    assert loss.item() == pytest.approx(-(math.log(0.75) + 2 * math.log(0.25)) / 2 - 0.5 * entropy, rel=1e-6)
    loss.backward()
    of_logits = [-0.25 * 1 + 0.75 * 2, 0.25 * 1 - 0.75 * 2]  # sum over tokens of A (p - [j == y])
    of_entropy = -0.75 * (math.log(0.75) + entropy)
    want = [of_logits[0] / 2 - 0.5 * of_entropy, of_logits[1] / 2 + 0.5 * of_entropy]
    torch.testing.assert_close(weight.grad.flatten(), torch.tensor(want), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_reference_is_the_composition(loss: str, loss_agg: str) -> None:
    """In float64 against matmul, log_softmax, gather, `policy_loss` and an entropy bonus with the same denominators."""
    batch = draw()
    options: dict[str, Any] = {"loss": loss, "loss_agg": loss_agg, "kl": "k3", "kl_coef": 0.1,
                               "rollout_correction": RolloutCorrection("sequence")}  # fmt: skip
    got = evaluate(batch, **options, logit_scale=0.7, soft_cap=3.0, temperature=1.3, entropy_coef=0.2)

    hidden, weight, bias = (batch[k].clone().requires_grad_() for k in LEAVES)
    logp = ((3 * torch.tanh(0.7 * (hidden @ weight.T + bias) / 3)) / 1.3).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp[torch.arange(T), batch["token_ids"]]
    rest = {k: batch[k] for k in ("old_logprobs", "rollout_logprobs", "ref_logprobs", "cu_seqlens")}
    value, metrics = policy_loss(chosen, batch["advantages"], batch["mask"], **rest, **options)
    # reinforce with advantage -1 on the entropies is their plain aggregate.
    bonus, _ = policy_loss(
        entropy, -torch.ones(len(LENGTHS)), batch["mask"], cu_seqlens=batch["cu_seqlens"], loss="reinforce", loss_agg=loss_agg
    )
    total = value - 0.2 * bonus
    torch.testing.assert_close(got.pop("loss"), total.detach(), rtol=1e-12, atol=1e-12)
    for name, plain in zip(LEAVES, torch.autograd.grad(total, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(got.pop(name), plain, rtol=1e-10, atol=1e-12)
    assert got.pop("entropy").item() == pytest.approx(entropy[batch["mask"]].mean().item())
    assert {k: v.item() for k, v in got.items()} == pytest.approx({k: v.item() for k, v in metrics.items()})


# The error against float64

EVERYTHING = {
    "kl": "k3", "kl_coef": 0.1, "kl_weighting": "ratio", "entropy_coef": 0.2, "rollout_correction": RolloutCorrection("token", high=1.1),
    "soft_cap": 4.0, "logit_scale": 0.8, "temperature": torch.linspace(0.6, 1.7, T),
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "on-policy": {"old": False},
    "old": {},
    "no bias, scaled": {"bias": False, "logit_scale": 0.25},
    "token truncate": {"rollout_correction": RolloutCorrection("token", high=1.2)},
    "token mask": {"rollout_correction": RolloutCorrection("token", "mask", low=0.8, high=1.2)},
    "sequence truncate": {"rollout_correction": RolloutCorrection("sequence", high=1.2, normalizer=0.9)},
    "sequence mask": {"rollout_correction": RolloutCorrection("sequence", "mask", low=0.5, high=2.0), "entropy_coef": 0.1},
    "k1": {"kl": "k1", "kl_coef": 0.3},
    "k2": {"kl": "k2", "kl_coef": 0.3, "kl_weighting": "ratio"},
    "k3": {"kl": "k3", "kl_coef": 0.3},
    "k3+": {"kl": "k3+", "kl_coef": 0.3, "old": False},
    "abs": {"kl": "abs", "kl_coef": 0.3, "kl_weighting": "ratio"},
    "entropy": {"entropy_coef": 0.2, "temperature": 0.8},
    "entropy on-policy": {"entropy_coef": -0.2, "old": False, "soft_cap": 3.0},
    "sequence ratio": {"ratio_level": "sequence", "entropy_coef": 0.1},
    "everything": EVERYTHING,
}


def options_of(case: str, loss: str, loss_agg: str) -> dict[str, Any] | None:
    """None where the loss has no such options."""
    options = {**CASES[case], "loss": loss, "loss_agg": loss_agg}
    if loss == "gspo" and "ratio_level" in options:
        return None
    return options


@lru_cache
def inputs_of(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return draw(dtype)


@lru_cache(None)
def truth_and_plain(dtype: torch.dtype, case: str, loss: str, loss_agg: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    options = options_of(case, loss, loss_agg)
    assert options is not None
    batch = inputs_of(dtype)
    return evaluate(batch, torch.float64, **options, backend="reference"), evaluate(batch, **options, backend="reference")


def largest_partial_sum(batch: dict[str, Tensor], **options: Any) -> float:
    """Of the weight's gradient over the first tokens, however many: what the addition of a chunk rounds."""
    hidden, weight, bias = (batch[k].double() for k in LEAVES)
    logits = hidden @ weight.T + (bias if options.get("bias", True) else 0)
    identity = {**batch, "hidden": logits, "weight": torch.eye(len(weight))}  # the gradient of these hidden states is that of the logits
    dz = evaluate(identity, torch.float64, **{**options, "bias": False}, backend="reference")["hidden"]
    return (dz[:, :, None] * hidden[:, None]).cumsum(0).abs().max().item()


def assert_as_good(got: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor], of_weight: float, what: str) -> None:
    """No further from float64 than plain torch plus 2e-6 (metrics 2e-5); `of_weight` is allowed to the weight's gradient besides."""
    assert got.keys() == truth.keys()
    for name, actual in got.items():
        tol = 2e-6 + of_weight if name == "weight" else 2e-6 if name in ("loss", *LEAVES) else 2e-5
        assert_no_worse(actual, truth[name].double(), plain[name], tol, f"{what}: {name}")


@native_build
@dtypes
@pytest.mark.parametrize("loss", LOSSES)
def test_no_worse_than_plain_torch(backend: str, dtype: torch.dtype, loss: str) -> None:
    for i, case in enumerate(CASES):
        for loss_agg in LOSS_AGGS[i % 2 :: 2]:
            options = options_of(case, loss, loss_agg)
            if options is not None:
                truth, plain = truth_and_plain(dtype, case, loss, loss_agg)
                got = evaluate(inputs_of(dtype), **options, backend=backend)
                assert_as_good(got, truth, plain, 0, f"{case}, {loss_agg}")


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many hidden states each chunk had, as the native form goes along."""
    seen: list[int] = []
    real = _products.Hidden.__init__

    def counted(self: Any, rows: Tensor) -> None:
        seen.append(len(rows))
        real(self, rows)

    monkeypatch.setattr(_products.Hidden, "__init__", counted)
    return seen


@native_build
@dtypes
@pytest.mark.parametrize("case", ["on-policy", "sequence truncate", "sequence ratio", "everything"])
def test_chunks_add_up(backend: str, dtype: torch.dtype, case: str, chunks: list[int]) -> None:
    """Chunks that end within sequences. Each of them rounds the weight's gradient once more: half an ulp of the largest partial sum."""
    batch = inputs_of(dtype)
    options = options_of(case, "ppo", "seq-mean-token-mean")
    assert options is not None
    truth, plain = truth_and_plain(dtype, case, "ppo", "seq-mean-token-mean")
    rounding = torch.finfo(dtype).eps / 2 * largest_partial_sum(batch, **options)
    for extra in (40 * V, 4000, 6000):
        chunks.clear()
        got = evaluate(batch, **options, max_extra_bytes=extra, backend=backend)
        assert len(chunks) > 1
        assert_as_good(got, truth, plain, len(chunks) * rounding, f"{extra}: chunks of {chunks}")


@native_build
def test_whole_tiles_and_pieces(backend: str, chunks: list[int]) -> None:
    """130 of 150 tokens in chunks of 48, a vocabulary of more than a strip of the products."""
    batch = draw(torch.float32, lengths=(3, 77, 70), width=50, vocab=1003)
    options: dict[str, Any] = {"entropy_coef": 0.1, "backend": backend}
    truth, plain = (
        evaluate(batch, torch.float64, entropy_coef=0.1, backend="reference"),
        evaluate(batch, **{**options, "backend": "reference"}),
    )
    rounding = torch.finfo(torch.float32).eps / 2 * largest_partial_sum(batch, entropy_coef=0.1)
    for extra, first in ((None, int(batch["mask"].sum())), (2 * 60 * 5200, 48)):
        chunks.clear()
        got = evaluate(batch, max_extra_bytes=extra, **options)
        assert chunks[0] == first
        assert_as_good(got, truth, plain, len(chunks) * rounding, f"{chunks}")


@native_build
@dtypes
@pytest.mark.parametrize(
    "shape",
    [((2, 3), 1, 1), ((2, 3), 1, 40), ((1, 1, 1), 17, 2), ((5,), 16, 16), ((5, 9), 48, 33), ((4,), 97, 3001), ((0, 0), 3, 5), ((), 3, 5)],
    ids=str,
)
def test_shapes(backend: str, dtype: torch.dtype, shape: tuple[tuple[int, ...], int, int]) -> None:
    """One-token sequences, no tokens, no sequences, V = 1, D = 1, and what is no multiple of a vector."""
    lengths, width, vocab = shape
    batch = draw(dtype, lengths, width, vocab)
    for options in ({}, {"loss": "gspo", "entropy_coef": 0.1}):
        truth, plain = evaluate(batch, torch.float64, **options, backend="reference"), evaluate(batch, **options, backend="reference")
        assert_as_good(evaluate(batch, **options, backend=backend), truth, plain, 0, str(options))


@native_build
@dtypes
def test_outlier_logits(backend: str, dtype: torch.dtype) -> None:
    batch = draw(dtype)
    batch["weight"][3] = 200 / D
    batch["hidden"][::3] = 1
    batch["hidden"][1::3] = -1
    truth, plain = evaluate(batch, torch.float64, backend="reference"), evaluate(batch, backend="reference")
    assert_as_good(evaluate(batch, backend=backend), truth, plain, 0, "")


@every_build
def test_nan_in_a_counted_token_is_not_hidden(backend: str) -> None:
    batch = draw(torch.float32)
    batch["hidden"][0] = math.nan
    assert batch["mask"][0]
    got = evaluate(batch, backend=backend)
    assert got["loss"].isnan()
    assert got["hidden"][0].isnan().all()
    assert got["weight"].isnan().any()
    assert not got["hidden"][1:].isnan().any()


# Layouts and masks


def padded(batch: dict[str, Tensor], lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """The same sequences as rows [N, L]; the padding is NaN, or an id outside the vocabulary."""
    rows = {k: batch[k] for k in ("weight", "bias", "advantages")}
    for name in ("hidden", "token_ids", "mask", "old_logprobs", "rollout_logprobs", "ref_logprobs"):
        x = batch[name]
        fill = math.nan if x.is_floating_point() else 0 if x.dtype == torch.bool else 10**6
        rows[name] = x.new_full((len(lengths), max(lengths), *x.shape[1:]), fill)
        for i, part in enumerate(x.split(lengths)):
            rows[name][i, : len(part)] = part
    return rows


@every_build
@pytest.mark.parametrize("case", ["old", "sequence truncate", "everything"])
def test_padded_is_packed(backend: str, case: str) -> None:
    batch = draw(torch.float64 if backend == "reference" else torch.float32)
    options = {**CASES[case], "loss_agg": "seq-mean-token-mean", "backend": backend}
    flat = evaluate(batch, **options)
    if isinstance(options.get("temperature"), Tensor):
        wide = torch.ones(len(LENGTHS), max(LENGTHS))
        for i, part in enumerate(options["temperature"].split(LENGTHS)):
            wide[i, : len(part)] = part
        options["temperature"] = wide
    rows = padded(batch)
    got = evaluate(rows, **options)
    padding = sum(LENGTHS) - rows["mask"].numel()
    got["hidden"] = torch.cat([got["hidden"][i, :n] for i, n in enumerate(LENGTHS)])
    got["num_masked"] = got["num_masked"] + padding
    for name, want in flat.items():
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@every_build
@pytest.mark.parametrize("case", ["old", "sequence truncate", "everything"])
def test_masked_positions_never_matter(backend: str, case: str) -> None:
    """NaN hidden states and ids outside the vocabulary under the mask reach neither the loss nor any gradient."""
    batch = draw(torch.float32)
    options = {**CASES[case], "backend": backend}
    want = evaluate(batch, **options)
    poisoned = dict(batch)
    poisoned["hidden"] = torch.where(batch["mask"][:, None], batch["hidden"], math.nan)
    poisoned["token_ids"] = torch.where(batch["mask"], batch["token_ids"], 10**6)
    for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs"):
        poisoned[name] = torch.where(batch["mask"], batch[name], math.inf)
    for mask in (batch["mask"], batch["mask"].float()):
        got = evaluate({**poisoned, "mask": mask}, **options)
        assert_same_bits(list(got.values()), list(want.values()))
        assert not got["hidden"][~batch["mask"]].any()
    nothing = evaluate({**poisoned, "hidden": torch.full((T, D), math.nan), "mask": torch.zeros(T)}, **options)
    assert nothing["loss"].item() == 0
    assert not any(nothing[name].any() for name in LEAVES)


@every_build
def test_advantages_of_tokens(backend: str) -> None:
    batch = draw(torch.float32)
    of_tokens = batch["advantages"].repeat_interleave(batch["cu_seqlens"].diff())
    for loss in ("ppo", "gspo"):
        got, want = (evaluate({**batch, "advantages": a}, loss=loss, backend=backend) for a in (of_tokens, batch["advantages"]))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-8)


@every_build
@dtypes
def test_strided_inputs_and_int32(backend: str, dtype: torch.dtype) -> None:
    batch = draw(dtype)
    want = evaluate(batch, backend=backend)
    wide, rows = torch.full((2 * T, D + 9), math.nan, dtype=dtype), torch.full((V, D + 3), math.nan, dtype=dtype)
    wide[::2, 4 : D + 4], rows[:, :D] = batch["hidden"], batch["weight"]
    views = {"hidden": wide[::2, 4 : D + 4], "weight": rows[:, :D], "token_ids": batch["token_ids"].int()}
    for name in ("mask", "old_logprobs", "bias", "advantages"):
        views[name] = torch.stack([batch[name]] * 2, 1)[:, 0]
    assert_same_bits(list(evaluate({**batch, **views}, backend=backend).values()), list(want.values()))
    three = {k: v[None] if len(v) == T else v for k, v in batch.items() if k != "cu_seqlens"}
    shifted = torch.cat([three["hidden"], three["hidden"][:, :1]], 1)[:, :-1]  # as the shift by one token leaves them
    one = {**three, "hidden": shifted, "advantages": torch.ones(1)}
    alone = evaluate({**batch, "advantages": torch.ones(1), "cu_seqlens": torch.tensor([0, T])}, backend=backend)
    got = evaluate(one, backend=backend)
    for name in ("loss", "weight", "bias"):
        torch.testing.assert_close(got[name], alone[name], rtol=1e-6, atol=1e-9)


# Gradients


@native_build
@pytest.mark.parametrize("case", ["on-policy", "sequence ratio"])
@dtypes
def test_frozen_parts_cost_nothing(backend: str, dtype: torch.dtype, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not wanted is neither computed nor allocated, and the others do not notice."""
    batch, options = inputs_of(dtype), {**CASES[case], "backend": backend}
    want = evaluate(batch, **options)
    rest = {k: batch[k] for k in ("token_ids", "advantages", "mask", "cu_seqlens")} | {"old": batch["old_logprobs"]}
    old = {} if options.pop("old", True) is False else {"old_logprobs": rest["old"]}
    del rest["old"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed a gradient that nobody wants")

    for frozen, product in (("weight", (_products.Hidden, "add_weight_gradient")), ("hidden", (None, "add_hidden_gradient"))):
        with monkeypatch.context() as patched:
            for module in (cpu_form, scoring) if product[0] is None else (product[0],):
                patched.setattr(module, product[1], refuse)
            leaves = {k: batch[k].detach().requires_grad_(k != frozen) for k in LEAVES}
            loss, _ = linear_policy_loss(**leaves, **rest, **old, **options)
            assert loss.grad_fn.saved_tensors[LEAVES.index(frozen)].numel() == 0
            loss.backward()
        assert leaves[frozen].grad is None
        assert_same_bits([leaves[k].grad for k in LEAVES if k != frozen], [want[k] for k in LEAVES if k != frozen])
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(scoring, "gradient_over_logits", refuse)
            for k in LEAVES:
                leaves[k].requires_grad_()
            loss, _ = linear_policy_loss(**leaves, **rest, **old, **options)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, want["loss"], rtol=1e-6, atol=1e-6)


@native_build
@dtypes
def test_the_incoming_gradient_scales(backend: str, dtype: torch.dtype) -> None:
    batch = draw(dtype)
    one, three = evaluate(batch, backend=backend), evaluate(batch, scale=3.0, backend=backend)
    for name in LEAVES:
        torch.testing.assert_close(three[name], 3 * one[name], rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def leaf_call(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    batch = inputs_of(dtype)
    leaves = {k: batch[k].detach().clone().requires_grad_() for k in LEAVES}
    rest = {k: batch[k] for k in ("token_ids", "advantages", "mask", "old_logprobs", "cu_seqlens")}
    return linear_policy_loss(**leaves, **rest, **options, backend=backend)[0], leaves


@native_form
def test_a_second_backward_is_right_or_raises(backend: str) -> None:
    """As often as wanted of the loss as it is; a scaled one was multiplied in place, and a second one finds that out."""
    loss, leaves = leaf_call(backend)
    loss.backward(retain_graph=True)
    first = {k: leaf.grad.clone() for k, leaf in leaves.items()}
    for times in (2, 3):
        loss.backward(retain_graph=True)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, times * first[name])
    handed_out = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    handed_out[1].mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    loss, leaves = leaf_call(backend)
    (3 * loss).backward(retain_graph=True)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 3 * first[name])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@native_form
def test_a_second_derivative_raises(backend: str) -> None:
    for power in (1, 2):
        loss, leaves = leaf_call(backend)
        (grad,) = torch.autograd.grad(loss**power, leaves["hidden"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.square().sum().backward()


@native_form
@dtypes
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_weight_takes_the_gradient_over(backend: str, dtype: torch.dtype, scale: float) -> None:
    """No copy of [V, D] on the way to `weight.grad`, nor where the loss is scaled."""
    loss, leaves = leaf_call(backend, dtype)
    held = [x.data_ptr() for x in loss.grad_fn.saved_tensors[:3]]
    (loss * scale).backward()
    assert [leaves[k].grad.data_ptr() for k in LEAVES] == held


@every_build
@pytest.mark.parametrize("onto", [False, True], ids=["autograd", "weight_grad"])
@pytest.mark.parametrize("case", ["old", "sequence truncate", "everything"])
def test_micro_batches_add_up(backend: str, case: str, onto: bool) -> None:
    """Each with the denominators of the whole."""
    batch = draw(torch.float32)
    options = {**CASES[case], "loss_agg": "seq-mean-token-mean", "backend": backend}
    temperature = options.pop("temperature", 1.0)
    seqs = [int(part.any()) for part in batch["mask"].split(LENGTHS)]
    want = evaluate(batch, temperature=temperature, **options)
    leaves = {k: batch[k].clone().requires_grad_() for k in LEAVES}
    into = torch.zeros(V, D) if onto else None
    total, cu = 0.0, batch["cu_seqlens"].tolist()
    for first, last in ((0, 3), (3, 4), (4, len(LENGTHS))):
        rows = slice(cu[first], cu[last])
        call = {k: v[rows] for k, v in batch.items() if len(v) == T and k != "hidden"} | {"hidden": leaves["hidden"][rows]}
        call |= {"weight": leaves["weight"], "bias": leaves["bias"], "advantages": batch["advantages"][first:last]}
        call["cu_seqlens"] = batch["cu_seqlens"][first : last + 1] - cu[first]
        call["temperature"] = temperature[rows] if isinstance(temperature, Tensor) else temperature
        if "rollout_correction" not in options:
            del call["rollout_logprobs"]
        if "kl" not in options:
            del call["ref_logprobs"]
        loss, _ = linear_policy_loss(**call, **options, num_seqs_global=sum(seqs), weight_grad=into)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(want["loss"].item(), rel=1e-5, abs=1e-6)
    got = {k: leaf.grad for k, leaf in leaves.items()}
    if onto:
        assert got["weight"] is None
        got["weight"] = into
    for name in LEAVES:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


@every_form
@dtypes
def test_weight_grad_is_added_to(backend: str, dtype: torch.dtype) -> None:
    """What is there stays, also where nothing but the weight has a gradient, nothing is counted, or the weight is frozen."""
    batch = inputs_of(dtype)
    want = evaluate(batch, backend=backend)["weight"]
    rest = {k: v for k, v in batch.items() if k not in ("weight", "rollout_logprobs", "ref_logprobs")}
    weight, into = batch["weight"].clone().requires_grad_(), torch.ones_like(batch["weight"])
    linear_policy_loss(weight=weight, **rest, weight_grad=into, backend=backend)[0].backward()
    assert weight.grad is None
    torch.testing.assert_close(into, 1 + want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    before = into.clone()
    linear_policy_loss(weight=weight, **{**rest, "mask": torch.zeros(T)}, weight_grad=into, backend=backend)[0].backward()
    linear_policy_loss(weight=weight.detach(), **rest, weight_grad=into, backend=backend)
    with torch.no_grad():
        linear_policy_loss(weight=weight, **rest, weight_grad=into, backend=backend)
    assert_same_bits([into], [before])


@native_form
def test_weight_grad_takes_one_backward_of_the_loss_as_it_is(backend: str) -> None:
    """It has been added in the forward, as it was, and once."""
    loss, _ = leaf_call(backend, weight_grad=torch.zeros(V, D))
    with pytest.raises(InputError, match=r"weight_grad and a loss that is multiplied by 3 afterwards; loss.backward"):
        (3 * loss).backward()
    loss, _ = leaf_call(backend, weight_grad=torch.zeros(V, D))
    loss.backward(retain_graph=True)
    with pytest.raises(InputError, match="weight_grad and a second backward; one"):
        loss.backward()
    into = torch.zeros(V, D)
    into.requires_grad_()
    with pytest.raises(InputError, match=r"weight_grad is .*without a gradient of its own"):
        leaf_call(backend, weight_grad=into)


@native_build
@pytest.mark.parametrize("case", ["on-policy", "sequence ratio"])
def test_tiny_shares_do_not_vanish_in_float16(backend: str, case: str) -> None:
    """Shares of 1e-6 are below half of the smallest float16 that has all its bits; the loss scale comes after the forward."""
    batch, scale = inputs_of(torch.float16), 65536.0
    options = {**CASES[case], "num_tokens_global": 1e6}
    truth = evaluate(batch, torch.float64, scale, **options, backend="reference")
    plain = evaluate(batch, None, scale, **options, backend="reference")
    got = evaluate(batch, None, scale, **options, backend=backend)
    assert all(got[name].any() for name in LEAVES)
    assert_as_good(got, truth, plain, 0, case)


@native_form
@pytest.mark.parametrize("case", ["on-policy", "sequence ratio"])
def test_sums_of_many_tokens_do_not_overflow_in_float16(backend: str, case: str) -> None:
    """8192 hidden states around 100 that pull at one token: a gradient of 64 for shares that add up to 1, 5e5 for shares of 1 each."""
    num_tokens = 8192
    options = {k: v for k, v in CASES[case].items() if k != "old"}
    batch = {
        "hidden": (torch.randn(num_tokens, 3).abs() * 100).half(), "weight": (torch.randn(5, 3) / 500).half(),
        "token_ids": torch.zeros(num_tokens, dtype=torch.int64), "advantages": torch.ones(1), "mask": torch.ones(num_tokens),
        "cu_seqlens": torch.tensor([0, num_tokens]),
    }  # fmt: skip
    got, want = (evaluate(batch, None, 64.0, **options, bias=False, old=False, backend=b) for b in (backend, "reference"))
    assert got["weight"].isfinite().all()
    torch.testing.assert_close(got["weight"], want["weight"], rtol=0.01, atol=10)


# Memory


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way of eager calls, which `Peak` looks into, even under it; the dispatcher's way shows only what comes out."""
    for module in (_torch, cpu_form):
        monkeypatch.setattr(module, "is_eager", lambda args: True)


@native_form
@dtypes
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("num_tokens", "vocab", "extra"),
    [(200, 151_936, None), (3, 151_936, None), (3, 151_936, 40 * 151_936), (3000, 512, 2_500_000)],
    ids=str,
)
def test_extra_memory_is_bounded(backend: str, dtype: torch.dtype, num_tokens: int, vocab: int, extra: int | None) -> None:
    """Beyond results, gradients and 128 bytes a token; the products have `scratch_bytes` of their own inside the bound."""
    hidden, weight, bias = torch.randn(num_tokens, 8).to(dtype), torch.randn(vocab, 8).to(dtype), torch.randn(vocab).to(dtype)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    ids, cu = torch.randint(vocab, (num_tokens,)), torch.tensor([0, num_tokens])
    for loss in ("ppo", "gspo"):
        with Peak() as measured:
            value, _ = linear_policy_loss(
                hidden, weight, ids, torch.ones(1), torch.ones(num_tokens), bias=bias, cu_seqlens=cu, loss=loss, entropy_coef=0.1,
                old_logprobs=torch.full(ids.shape, -9.0), soft_cap=5.0, max_extra_bytes=extra, backend=backend,
            )  # fmt: skip
            grads = torch.autograd.grad(value, leaves)
        kept = sum(x.nbytes for x in grads) + 128 * num_tokens
        assert measured.bytes > kept  # it looked inside
        assert measured.bytes - kept <= scoring.for_logits(extra or 62_000_000, dtype)


@native_form
@pytest.mark.usefixtures("eager")
def test_weight_grad_saves_the_second_gradient(backend: str) -> None:
    hidden, weight, into = torch.randn(40, 100).requires_grad_(), torch.randn(2000, 100).requires_grad_(), torch.zeros(2000, 100)
    ids, cu = torch.randint(2000, (40,)), torch.tensor([0, 40])
    with Peak() as measured:
        for _ in range(2):
            linear_policy_loss(
                hidden,
                weight,
                ids,
                torch.ones(1),
                torch.ones(40),
                cu_seqlens=cu,
                weight_grad=into,
                max_extra_bytes=1_200_000,
                backend=backend,
            )[0].backward()
    assert measured.bytes < into.nbytes


# Frozen in form: threads, memory, autocast, the dispatcher, the compiler


@native_build
@pytest.mark.parametrize("case", ["entropy", "sequence truncate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_repeatable(backend: str, dtype: torch.dtype, case: str) -> None:
    """Past the grain of the kernels: two threads share the work, and every product is our own."""
    batch = draw(dtype, lengths=(3, 77, 70), width=50, vocab=1003)
    assert_repeatable(lambda: list(evaluate(batch, **CASES[case], max_extra_bytes=1_400_000, backend=backend).values()))


@native_form
def test_bfloat16_depends_on_threads_no_more_than_torch(backend: str) -> None:
    """Its products are torch's: the same bits again with as many threads, and within its rounding with another number."""
    batch = draw(torch.bfloat16, lengths=(3, 77, 70), width=50, vocab=1003)
    with threads(2):
        two, again = evaluate(batch, backend=backend), evaluate(batch, backend=backend)
    assert_same_bits(list(two.values()), list(again.values()))
    truth, plain = evaluate(batch, torch.float64, backend="reference"), evaluate(batch, backend="reference")
    assert_as_good(two, truth, plain, 0, "two threads")


@native_form
@dtypes
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    batch = inputs_of(dtype)
    for case in ("old", "sequence ratio"):
        outside = evaluate(batch, **CASES[case], backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            inside = evaluate(batch, **CASES[case], backend=backend)
        assert_same_bits(list(inside.values()), list(outside.values()))


@native_form
@pytest.mark.parametrize("case", ["on-policy", "everything", "sequence truncate"])
def test_opcheck(backend: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a positive loss: opcheck differentiates its absolute value, and what is multiplied in place are outputs to it."""
    real, calls, batch = cpu_form._op, [], inputs_of(torch.float32)
    monkeypatch.setattr(cpu_form, "_op", lambda *args: calls.append(args) or real(*args))
    losses = [evaluate({**batch, "advantages": sign * batch["advantages"]}, **CASES[case], backend=backend)["loss"] for sign in (1, -1)]
    args = calls[int(losses[1] > 0)]
    torch.library.opcheck(real.op, tuple(x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args))


@every_form
@pytest.mark.parametrize("case", ["on-policy", "sequence truncate"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch's own, while it traces a Function
def test_compiles_in_one_graph(backend: str, case: str) -> None:
    batch = inputs_of(torch.float32)
    rest = {k: batch[k] for k in ("token_ids", "advantages", "mask", "old_logprobs", "rollout_logprobs", "cu_seqlens")}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        options = {k: v for k, v in CASES[case].items() if k != "old"}
        value, metrics = linear_policy_loss(hidden * 1.0, weight, bias=bias, **rest, **options, entropy_coef=0.1, backend=backend)
        return value * 0.5, metrics

    leaves = [batch[k].detach().requires_grad_() for k in LEAVES]
    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value, metrics = f(*leaves)
        results.append([value.detach(), *metrics.values(), *torch.autograd.grad(value, leaves)])
    for eager_result, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager_result, rtol=1e-6, atol=1e-8)


# Errors: one line each


@every_form
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": torch.zeros(T, D + 1)}, r"hidden is \[24, 20\] .*, weight \[37, 19\] .*; \[24, 19\] and \[V, 19\] of one dtype"),
        ({"hidden": torch.zeros(T, D).bfloat16()}, "hidden is .* bfloat16"),
        ({"token_ids": torch.full((T,), V)}, r"token_ids\[\d+\] = 37; ids in \[0, 37\)"),
        ({"token_ids": torch.zeros(T)}, r"token_ids is \[24\] float32"),
        ({"token_ids": torch.zeros(3, 8, dtype=torch.int64)}, r"token_ids of shape \[3, 8\] with cu_seqlens"),
        ({"bias": torch.zeros(V + 1)}, r"bias is \[38\]"),
        ({"temperature": 0.0}, "temperature=0.0; a positive finite number"),
        ({"temperature": torch.ones(T + 1)}, r"temperature is \[25\]"),
        ({"soft_cap": -1.0}, "soft_cap=-1.0"),
        ({"entropy_coef": math.nan}, "entropy_coef=nan"),
        ({"mask": torch.ones(T + 1)}, r"mask is \[25\]"),
        ({"cu_seqlens": torch.tensor([0, 1, 5, 5, 12, 13, 25])}, r"cu_seqlens\[6\] = 25"),
        ({"loss": "pppo"}, "unknown loss 'pppo'.*did you mean 'ppo'"),
        ({"kl": "k1"}, "kl='k1' without ref_logprobs"),
        ({"hidden": torch.zeros(D, T).T}, r"hidden has stride \(1, 24\); stride 1 in the last dimension; hidden.contiguous\(\)"),
        ({"weight": torch.zeros(D, V).T}, r"weight has stride \(1, 37\); stride 1 in the last dimension"),
        ({"max_extra_bytes": 40 * V - 1}, "max_extra_bytes=1479; at least 1480, for the logits of one token"),
        ({"weight_grad": torch.zeros(V, D + 1)}, r"weight_grad is \[37, 20\] .*; contiguous \[37, 19\] float32"),
        ({"weight_grad": torch.zeros(V, D).half()}, r"weight_grad is \[37, 19\] float16"),
        ({"weight_grad": torch.zeros(D, V).T}, "weight_grad is .*; contiguous"),
        ({"backend": "cuda"}, 'backend "cuda" cannot run here: this version has no such form. Usable: cpu, reference'),
    ],
)
def test_errors_are_one_line(backend: str, arguments: dict[str, Any], message: str) -> None:
    batch = draw(torch.float32)
    batch["mask"][:] = True
    call = {**batch, "backend": backend, **arguments}
    call.pop("ref_logprobs")
    with pytest.raises(InputError, match=f"^linear_policy_loss: .*{message}") as error:
        linear_policy_loss(**call)
    assert "\n" not in str(error.value)
