"""linear_policy_loss on a GPU: what every form of it is held to."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import assert_repeatable, each
from conformance import assert_no_worse, assert_same_bits
from torch import Tensor

from reinforce_ada.ops import linear_policy_loss, linear_token_logprobs, policy_loss
from reinforce_ada.ops.policy_loss import RolloutCorrection

NAN = math.nan
LENGTHS = [5, 0, 9, 1, 12]
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "entropy": {"entropy_coef": 0.1, "loss_agg": "seq-mean-token-mean"},
    "gspo": {"loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "loss_agg": "seq-mean-token-mean"},
    "sequence": {"ratio_level": "sequence", "kl": "k3", "kl_coef": 0.05, "kl_weighting": "ratio", "entropy_coef": 0.01},
    "corrected": {"rollout_correction": RolloutCorrection("sequence", "truncate", high=1.5), "soft_cap": 4.0, "temperature": 0.7},
    "cispo": {"loss": "cispo", "logit_scale": 0.5, "loss_agg": "seq-mean-token-sum", "num_seqs_global": 7.0},
}
OTHERS = ("old_logprobs", "rollout_logprobs", "ref_logprobs")


def make(dtype: torch.dtype, width: int = 24, vocab: int = 131, lengths: list[int] | None = None) -> dict[str, Tensor]:
    """Packed sequences; nothing that lies under the mask may matter, so it is NaN or outside the vocabulary."""
    lengths = LENGTHS if lengths is None else lengths
    num_tokens = sum(lengths)
    mask = torch.rand(num_tokens) < 0.7
    hidden, weight = torch.randn(num_tokens, width), torch.randn(vocab, width) * 3 / math.sqrt(width)
    ids = torch.randint(vocab, (num_tokens,))
    given = {
        "hidden": torch.where(mask[:, None], hidden, NAN).to(dtype),
        "weight": weight.to(dtype),
        "bias": torch.randn(vocab).to(dtype),
        "token_ids": torch.where(mask, ids, vocab + 5),
        "advantages": torch.randn(len(lengths)),
        "mask": mask,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }
    logprobs = linear_token_logprobs(hidden.to(dtype).float(), weight.to(dtype).float(), ids, backend="reference")
    for name in OTHERS:
        given[name] = torch.where(mask, logprobs + 0.2 * torch.randn(num_tokens), NAN)
    return given


def evaluate(given: dict[str, Tensor], backend: str, *, scale: float = 1.0, padded: bool = False, **settings: Any) -> dict[str, Tensor]:
    """Loss, metrics and gradients; with `padded` as [1, T] rows without cu_seqlens."""
    arguments: dict[str, Any] = dict(given)
    for name in ("hidden", "weight", "bias"):
        arguments[name] = given[name].detach().requires_grad_()
    if settings.get("kl") is None:
        del arguments["ref_logprobs"]
    if settings.get("rollout_correction") is None:
        del arguments["rollout_logprobs"]
    if padded:
        del arguments["cu_seqlens"]
        for name in ("token_ids", "mask", "old_logprobs"):
            arguments[name] = arguments[name][None]
    leaves = [arguments[name] for name in ("hidden", "weight", "bias")]
    if padded:
        arguments["hidden"] = leaves[0][None]
    loss, metrics = linear_policy_loss(**arguments, **settings, backend=backend)
    (loss * scale).backward()
    grads = zip(("hidden", "weight", "bias"), leaves, strict=True)
    return {"loss": loss.detach(), **{name: leaf.grad for name, leaf in grads if leaf.grad is not None}, **metrics}


def widened(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


def assert_conforms(actual: dict[str, Tensor], truth: dict[str, Tensor], plain: dict[str, Tensor], chunks: int = 0) -> None:
    """As for linear_token_logprobs, with errors in relation to the largest value; metrics within 2e-5."""
    assert list(actual) == list(truth)
    for name, t in truth.items():
        a, p = actual[name].cpu(), plain[name]
        assert a.dtype == p.dtype, name
        if name in ("loss", "hidden", "weight", "bias"):
            largest = t.abs().max().item()
            step = torch.finfo(a.dtype).eps / 2 * largest if a.dtype in (torch.bfloat16, torch.float16) else 0
            assert_no_worse(a, t, p, 2e-6 * max(1, largest) + (1 + chunks * (name == "weight")) * step, name)
        else:
            assert_no_worse(a, t, p, 2e-5 * max(1, t.abs().max().item()), name)


def on(device: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in given.items()}


def check_settings(backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    given, settings = make(dtype), SETTINGS[name]
    actual = evaluate(on(device, given), backend, **settings)
    assert_conforms(actual, evaluate(widened(given), "reference", **settings), evaluate(given, "reference", **settings))


def check_large(backend: str, device: str, dtype: torch.dtype) -> None:
    given = make(dtype, 256, 32_000, [700, 1, 300, 0, 1047])
    settings = SETTINGS["entropy"]
    actual = evaluate(on(device, given), backend, **settings)
    assert_conforms(actual, evaluate(widened(given), "reference", **settings), evaluate(given, "reference", **settings))


def check_pieces(backend: str, device: str, dtype: torch.dtype) -> None:
    """A bound for a few tokens and entries at a time, and a loss that is scaled."""
    given = make(dtype)
    actual = evaluate(on(device, given), backend, scale=8.0, max_extra_bytes=131 * 40)
    assert_conforms(actual, *(evaluate(x, "reference", scale=8.0) for x in (widened(given), given)), chunks=3)


def check_is_the_composition(backend: str, device: str) -> None:
    """Of the two operators, in the same form: the same bits. A batch of one padded row is the same sequence."""
    given = on(device, make(torch.float32, lengths=[27]))
    ids = torch.where(given["mask"], given["token_ids"], -100)
    hidden = given["hidden"].detach().requires_grad_()
    scored = linear_token_logprobs(hidden, given["weight"], ids, bias=given["bias"], temperature=0.9, backend=backend)
    rest = {name: given[name] for name in ("old_logprobs", "cu_seqlens")}
    loss, _ = policy_loss(scored, given["advantages"], given["mask"], **rest, backend=backend)
    loss.backward()
    for padded in (False, True):
        result = evaluate(given, backend, temperature=torch.full((1, 27) if padded else (27,), 0.9, device=device), padded=padded)
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result["hidden"], hidden.grad, rtol=1e-5, atol=1e-7)


def check_weight_grad(backend: str, device: str, dtype: torch.dtype) -> None:
    """The gradients of micro-batches add up in the memory that is given, once a backward, times whatever the loss is multiplied by."""
    given = on(device, make(dtype))
    before = torch.randn(given["weight"].shape, device=device).to(dtype)
    alone = evaluate(given, backend, scale=2.0)
    onto = before.clone()
    result = evaluate(given, backend, scale=2.0, weight_grad=onto)
    assert "weight" not in result
    assert_same_bits([result["hidden"], result["bias"], result["loss"]], [alone["hidden"], alone["bias"], alone["loss"]])
    step = torch.finfo(dtype).eps * (before.abs() + alone["weight"].abs()).max().item()
    torch.testing.assert_close(onto, before + alone["weight"], rtol=0, atol=step)
    again = onto.clone()
    evaluate(given, backend, scale=2.0, weight_grad=again)
    torch.testing.assert_close(again, onto + alone["weight"], rtol=0, atol=step)
    frozen = {**given, "hidden": given["hidden"].detach().requires_grad_()}
    for name in ("ref_logprobs", "rollout_logprobs"):
        del frozen[name]
    linear_policy_loss(**frozen, weight_grad=onto, backend=backend)[0].backward()  # a weight that needs no gradient adds none
    torch.testing.assert_close(again - onto, again - before - alone["weight"], rtol=0, atol=step)


def check_what_is_masked_does_not_matter(backend: str, device: str) -> None:
    """NaN and ids outside the vocabulary under the mask; nothing counted at all; no tokens at all."""
    given = on(device, make(torch.float32))
    clean = dict(given)
    clean["hidden"] = given["hidden"].nan_to_num(1.0)
    clean["token_ids"] = given["token_ids"].clamp(max=130)
    for a, b in zip(evaluate(given, backend).values(), evaluate(clean, backend).values(), strict=True):
        assert_same_bits([a], [b])
    nothing = {**given, "mask": torch.zeros_like(given["mask"])}
    result = evaluate(nothing, backend)
    assert [float(result[name].abs().max()) for name in ("loss", "hidden", "weight", "bias")] == [0.0] * 4
    empty = on(device, make(torch.float32, lengths=[0, 0]))
    result = evaluate(empty, backend)
    assert float(result["loss"]) == 0
    assert not result["weight"].any()


def check_wrong_values(backend: str, device: str) -> None:
    """Not an error, which would wait for the device: NaN in what depends on the value."""
    given = on(device, make(torch.float32))
    first = int(given["mask"].nonzero()[0])
    ids = given["token_ids"].clone()
    ids[first] = -3
    result = evaluate({**given, "token_ids": ids}, backend)
    assert result["loss"].isnan()
    assert result["hidden"][first].isnan().all()
    offsets = given["cu_seqlens"].clone()
    offsets[2] += 30
    result = evaluate({**given, "cu_seqlens": offsets}, backend)
    assert result["loss"].isnan()
    assert result["hidden"][first].isnan().all()


def check_repeatable(backend: str, device: str) -> None:
    given = on(device, make(torch.bfloat16, 16, 70))
    assert_repeatable(lambda: list(evaluate(given, backend, **SETTINGS["entropy"]).values()))


def check_compiles(backend: str, device: str) -> None:
    given = on(device, make(torch.float32, 16, 70))
    hidden, weight = (given[name].detach().requires_grad_() for name in ("hidden", "weight"))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        rest = {name: given[name] for name in ("token_ids", "advantages", "mask", "old_logprobs", "cu_seqlens")}
        return linear_policy_loss(h * 1, w, **rest, entropy_coef=0.1, backend=backend)[0]

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected)
    torch.compiler.reset()


HALF = (torch.bfloat16, torch.float16)

CASES = [
    *each(check_settings, ("ppo",), dtypes=True),
    *each(check_settings, *((torch.float32, name) for name in SETTINGS if name != "ppo")),
    *each(check_settings, *((dtype, name) for dtype in HALF for name in SETTINGS if name != "ppo"), large=True),
    *each(check_large, dtypes=True, large=True),
    *each(check_pieces, (torch.bfloat16,)),
    *each(check_pieces, (torch.float32,), (torch.float16,), large=True),
    *each(check_is_the_composition),
    *each(check_weight_grad, (torch.float32,), (torch.bfloat16,)),
    *each(check_weight_grad, (torch.float16,), large=True),
    *each(check_what_is_masked_does_not_matter),
    *each(check_wrong_values),
    *each(check_repeatable),
    *each(check_compiles),
]
