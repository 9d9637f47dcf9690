"""`linear_policy_loss`: a hand-sized head, the float64 composition, every form against it, and what never matters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance import assert_repeatable, assert_same_bits, threads
from linear_policy_loss_scene import (
    CASES,
    LEAVES,
    LENGTHS,
    D,
    T,
    V,
    assert_as_good,
    draw,
    dtypes,
    evaluate,
    every_build,
    every_form,
    inputs_of,
    largest_partial_sum,
    native_build,
    native_form,
    options_of,
    truth_and_plain,
)
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import RolloutCorrection, _products, linear_policy_loss, policy_loss
from reinforce_ada.ops.linear_policy_loss import cpu as cpu_form
from reinforce_ada.ops.policy_loss import LOSS_AGGS, LOSSES

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
