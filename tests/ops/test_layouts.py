"""Any layout of any tensor argument: gaps, offsets, transposed, expanded, negated by a bit, in other dtypes. What a kernel reads by address
is what torch would read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from calls import LEAVES, Call, calls
from conformance import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import linear_policy_loss, policy_loss, token_logprobs
from reinforce_ada.ops._torch import address, row_address

CALLS = calls()
ROWS = ("logits", "hidden", "weight")  # documented: stride 1 within a row


def into(x: Tensor, memory: Tensor) -> Tensor:
    """`memory`, a view of the shape of x, with the values of x."""
    return memory.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "behind others": lambda x: into(x, x.new_zeros(x.numel() + 3)[3:].view(x.shape)),
    "rows apart": lambda x: into(x, x.new_zeros(2 * x.shape[0], *x.shape[1:])[::2]),
    "columns apart": lambda x: into(x, x.new_zeros(*x.shape[:-1], 3 * x.shape[-1])[..., 1::3]),
    "part of a wider one": lambda x: into(x, x.new_zeros(*x.shape[:-1], x.shape[-1] + 5)[..., 2:-3]),
    "transposed": lambda x: into(x, x.new_zeros(x.shape[::-1]).permute(*range(x.ndim - 1, -1, -1))),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded in a row": lambda x: x[..., :1].expand(x.shape),
    "negated": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
}
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "mask": (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "token_ids": (torch.int64, torch.int32),
    "cu_seqlens": (torch.int64, torch.int32),
    **dict.fromkeys(
        ("advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy", "temperature", "baseline", "class_weights"),
        (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    ),
}
INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": torch.ones_like,
    "expanded": lambda x: x.new_tensor(0.5).expand(x.shape),
    "apart": lambda x: torch.linspace(-1, 1, 2 * x.numel(), dtype=x.dtype)[::2].view(x.shape),
    "negated": lambda x: torch._neg_view(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)),
}


def needs_rows(name: str, x: Tensor) -> bool:
    return name in ROWS and x.stride(-1) != 1


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_layouts_do_not_matter(name: str, data: st.DataObject) -> None:
    """The same bits as from contiguous copies, and the reference's values."""

    def laid_out(argument: str, x: Tensor) -> Tensor:
        x = x.to(data.draw(st.sampled_from(DTYPES.get(argument, (x.dtype,))), f"dtype of {argument}"))
        kinds = ["as it is"] if argument == "cu_seqlens" or argument == "group_of" else list(LAYOUTS)
        if argument in ("cu_seqlens", "group_of"):
            kinds = ["as it is", "behind others", "rows apart"]
        y = LAYOUTS[data.draw(st.sampled_from(kinds), f"layout of {argument}")](x)
        return x if needs_rows(argument, y) else y

    call = CALLS[name].with_tensors(laid_out)
    incoming = INCOMING[data.draw(st.sampled_from(sorted(INCOMING)), "incoming gradients")]
    actual = call.evaluate("cpu", incoming)
    plain = call.with_tensors(lambda _, x: x.resolve_neg().clone(memory_format=torch.contiguous_format))
    assert_same_bits(plain.evaluate("cpu", lambda x: incoming(x).resolve_neg().clone(memory_format=torch.contiguous_format)), actual, name)
    for a, b in zip(actual, call.evaluate("reference", incoming), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["token_logprobs everything", "linear_token_logprobs plain", "linear_policy_loss ppo"])
@pytest.mark.parametrize("layout", ["columns apart", "transposed", "expanded in a row"])
def test_rows_with_gaps_are_refused(name: str, layout: str) -> None:
    call = CALLS[name]
    for argument in (x for x in ROWS if x in call.tensors):
        with pytest.raises(InputError, match="stride"):
            call.with_tensors(lambda n, x, argument=argument: LAYOUTS[layout](x) if n == argument else x).evaluate("cpu")


def test_no_kernel_is_handed_strides_it_does_not_know() -> None:
    x = torch.zeros(4, 6)
    for wrong in (x.T, x[:, ::2], x[:1].expand(3, 6), x[:, :3]):
        with pytest.raises(RuntimeError, match="strides"):
            address(wrong)
    assert address(x[1:]) == x.data_ptr() + 24
    assert row_address(x[::2, 1:3]) == x.data_ptr() + 4
    for wrong in (x.T, x[:, ::2]):
        with pytest.raises(RuntimeError, match="strides"):
            row_address(wrong)


def test_transposed_mask_by_hand() -> None:
    """[2, 3] with -A l = 1, 2, 3 and 4, 5, 6 under the mask 1 0 1, 1 1 0, stored column by column: (1 + 3 + 4 + 5) / 4."""
    logprobs = -torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    mask = torch.tensor([[1, 1], [0, 1], [1, 0]])
    for form in ("cpu", "reference"):
        for dtype in DTYPES["mask"]:
            value, _ = policy_loss(logprobs, torch.ones(2), mask.to(dtype).T, loss="reinforce", backend=form)
            assert value.item() == 3.25


@pytest.mark.parametrize("form", ["cpu", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e-30, -0.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_a_mask_counts_where_it_is_not_zero(form: str, value: float, dtype: torch.dtype) -> None:
    mask = torch.tensor([[value, 0, 1]], dtype=dtype)
    _, metrics = policy_loss(torch.zeros(1, 3), torch.ones(1), mask, backend=form)
    assert metrics["num_tokens"] == (1 if value == 0 else 2)


@pytest.mark.parametrize("operator", [policy_loss, linear_policy_loss])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn])
def test_masks_of_other_dtypes_are_refused(operator: Callable[..., Tensor], dtype: torch.dtype) -> None:
    call = CALLS[f"{operator.__name__} ppo"]
    with pytest.raises(InputError, match="mask is"):
        call.with_tensors(lambda name, x: x.to(dtype) if name == "mask" else x).evaluate("cpu")


@pytest.mark.parametrize("form", ["cpu", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_only_leaves_get_gradients(name: str, form: str) -> None:
    """Old logprobs, masks, rewards, ... that require a gradient are constants, and alone make no result require one."""
    call = CALLS[name]
    tensors = {
        n: x.clone().requires_grad_() if x.is_floating_point() and n not in (*LEAVES, "temperature") else x for n, x in call.tensors.items()
    }
    assert not any(x.requires_grad for x in call.results(form, tensors))


@pytest.mark.parametrize("form", ["cpu", "reference"])
def test_gradient_in_the_memory_of_the_logits_is_refused(form: str) -> None:
    """Side by side in one larger matrix they have no element in common."""
    memory, ids = torch.randn(6, 10), torch.tensor([0, 1, 2, 3])
    logits = memory[:4, :5].requires_grad_()
    for wrong in (memory[:4, :5], memory[1:5, :5], memory[:4, 4:9], memory[2:, :5], memory[1:5, 3:8]):
        with pytest.raises(InputError, match="memory"):
            token_logprobs(logits, ids, grad_out=wrong.detach(), backend=form)
    beside = memory.detach()[:4, 5:]
    token_logprobs(logits, ids, grad_out=beside, backend=form).sum().backward()
    torch.testing.assert_close(beside.sum(1), torch.zeros(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["cpu", "reference"])
@pytest.mark.parametrize("operator", ["policy_loss", "linear_policy_loss"])
def test_as_many_packed_advantages_as_tokens(form: str, operator: str) -> None:
    """Three sequences of 1, 0 and 2 tokens: [1, 2, 5] is one each, or one for each token; only the caller knows."""
    call = CALLS[f"{operator} reinforce on policy"]
    tensors = {n: x[:3] if x.shape[0] == 9 else x for n, x in call.tensors.items()}
    tensors |= {"advantages": torch.tensor([1.0, 2, 5]), "cu_seqlens": torch.tensor([0, 1, 1, 3]), "mask": torch.ones(3, dtype=torch.bool)}
    call = Call(operator, tensors, {"loss": "reinforce"})
    with pytest.raises(InputError, match='advantages_per="sequence"'):
        call.evaluate(form)
    values = []
    for per, advantages in (("sequence", [1.0, 5, 5]), ("token", [1.0, 2, 5])):
        named = call._replace(options={**call.options, "advantages_per": per}).evaluate(form)
        padded = {**tensors, "advantages": torch.tensor(advantages).double().float(), "cu_seqlens": torch.tensor([0, 3])}
        torch.testing.assert_close(named[0], Call(operator, padded, {"loss": "reinforce"}).evaluate(form)[0])
        values.append(named[0].item())
    assert values[0] != values[1]
    alone = call._replace(tensors={**tensors, "cu_seqlens": torch.tensor([0, 1, 2, 3])})
    assert alone.evaluate(form)[0].item() == pytest.approx(values[1])
    for per, size in (("token", 2), ("sequence", 3), ("turn", 3)):
        wrong = {**tensors, "advantages": torch.ones(size), "cu_seqlens": torch.tensor([0, 1, 3])}
        with pytest.raises(InputError, match="advantages"):
            Call(operator, wrong, {"advantages_per": per}).evaluate(form)
