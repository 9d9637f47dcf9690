"""group_advantages on a GPU: what every form of it is held to."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import assert_repeatable, assert_rounded_no_worse, each, inside
from conformance import assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reinforce_ada.ops import group_advantages
from reinforce_ada.ops.group_advantages import BASELINES, CONVENTIONS, SCALES
from reinforce_ada.ops.group_advantages.contract import arguments
from reinforce_ada.types import PoolStats

NAN = math.nan
# One completion, none, all equal, one block of rows and its neighbours, several blocks.
SIZES = (1, 0, 4, 33, 32, 7, 0)


def draw(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Shuffled rewards of groups, one of them without spread, one at 1e4 with little of it."""
    group_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rewards = torch.randn(len(group_of))
    rewards[group_of == 2] = 0.7
    if dtype == torch.float32:
        rewards[group_of == 5] = 1e4 + rewards[group_of == 5] / 100
    shuffled = torch.randperm(len(group_of))
    return {"rewards": rewards.to(dtype)[shuffled], "group_of": group_of[shuffled]}


def pool_of(num_groups: int) -> PoolStats:
    """Of other rewards: a pool of one, one without spread, some larger."""
    count = torch.tensor([float(2 + i % 7) for i in range(num_groups)], dtype=torch.float64)
    count[0], low = 1, -torch.rand(num_groups, dtype=torch.float64) - 0.5
    high = low + 2
    high[0], high[2 % num_groups] = low[0], low[2 % num_groups]
    return PoolStats(count, (low + high) / 2, torch.rand(num_groups, dtype=torch.float64), low, high)


def there(x: Any, device: str) -> Any:
    return x.to(device) if isinstance(x, Tensor) else PoolStats(*(y.to(device) for y in x)) if isinstance(x, PoolStats) else x


def assert_conforms(backend: str, device: str, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """No further from float64 of the same numbers than plain PyTorch in the dtype of the rewards, which rounds once, and 1e-6."""
    actual = group_advantages(
        **{k: v.to(device) for k, v in batch.items()}, **{k: there(v, device) for k, v in options.items()}, backend=backend
    )
    truth = group_advantages(**{**batch, "rewards": batch["rewards"].double()}, **options, backend="reference")
    plain = group_advantages(**batch, **options, backend="reference")
    assert (actual.dtype, actual.device.type) == (batch["rewards"].dtype, device)
    assert_rounded_no_worse(backend, actual.cpu(), truth, plain, 1e-6)
    assert torch.equal(actual.cpu() == 0, truth.to(actual.dtype) == 0)
    return actual


def sorted_batch(batch: dict[str, Tensor], num_groups: int) -> dict[str, Tensor]:
    """The same groups with their rows together."""
    group_of, order = batch["group_of"].sort(stable=True)
    offsets = torch.searchsorted(group_of, torch.arange(num_groups + 1))
    return {"rewards": batch["rewards"][order], "cu_seqlens": offsets}


def check_convention(backend: str, device: str, name: str) -> None:
    batch = draw()
    pool = pool_of(len(SIZES)) if CONVENTIONS[name]["baseline"] == "pool" else None
    assert_conforms(backend, device, batch, **CONVENTIONS[name], pool=pool)


def check_choice(backend: str, device: str, dtype: torch.dtype, baseline: str, scale: str) -> None:
    """With and without a pool, rows together or not, with weights of classes."""
    batch, groups = draw(dtype=dtype), len(SIZES)
    weights = torch.rand(groups, 2, dtype=torch.float64) + 0.5
    for singleton, ddof in (("zero", 1), ("reward", 0)):
        options: dict[str, Any] = {"baseline": baseline, "scale": scale, "singleton": singleton, "ddof": ddof, "eps": 1e-4}
        assert_conforms(backend, device, batch, **options)
        assert_conforms(backend, device, sorted_batch(batch, groups), pool=pool_of(groups), class_weights=weights, **options)


def check_given_baseline(backend: str, device: str) -> None:
    values = torch.randn(len(SIZES))
    for scale in SCALES:
        for pool in (None, pool_of(len(SIZES))):
            assert_conforms(backend, device, draw(), baseline=values, scale=scale, pool=pool, class_weights=torch.rand(len(SIZES), 2))


def check_long_groups(backend: str, device: str, sizes: tuple[int, ...]) -> None:
    """More rows than a program takes at once; a batch that many programs look at."""
    weights = torch.ones(len(sizes), 2)  # which say how many groups there are
    for scale in ("group", "batch"):
        assert_conforms(backend, device, draw(sizes), scale=scale, class_weights=weights)
        assert_conforms(backend, device, sorted_batch(draw(sizes), len(sizes)), scale=scale)


def check_same_groups(backend: str, device: str) -> None:
    """Numbered without gaps, with large gaps, or by offsets; int32 offsets: the same bits."""
    batch = {k: v.to(device) for k, v in draw().items()}
    options: dict[str, Any] = {"scale": "group", "backend": backend}
    want = group_advantages(**batch, **options)
    assert_same_bits([group_advantages(batch["rewards"], batch["group_of"] * 10**12, **options)], [want])
    numbers, order = batch["group_of"].sort(stable=True)
    offsets = torch.searchsorted(numbers, torch.arange(len(SIZES) + 1, device=device))
    for cu in (offsets, offsets.int()):
        assert_same_bits([group_advantages(batch["rewards"][order], cu_seqlens=cu, **options)], [want[order]])


def check_surroundings(backend: str, device: str, dtype: torch.dtype) -> None:
    """Rewards and numbers at odd addresses between others that would show: the same bits."""
    batch = {k: v.to(device) for k, v in draw(dtype=dtype).items()}
    for options in ({"scale": "batch"}, {"scale": "group", "pool": pool_of(len(SIZES)), "baseline": "leave-one-out"}):
        options = {k: there(v, device) for k, v in options.items()}
        want = group_advantages(**batch, **options, backend=backend)
        moved = {"rewards": inside(batch["rewards"], NAN)[0], "group_of": inside(batch["group_of"], 2**40)[0]}
        assert_same_bits([group_advantages(**moved, **options, backend=backend)], [want])
        cu = sorted_batch({k: v.cpu() for k, v in batch.items()}, len(SIZES))
        cu = {k: v.to(device) for k, v in cu.items()}
        want = group_advantages(**cu, **options, backend=backend)
        moved = {"rewards": inside(cu["rewards"], NAN)[0], "cu_seqlens": inside(cu["cu_seqlens"], 2**40)[0]}
        assert_same_bits([group_advantages(**moved, **options, backend=backend)], [want])


def check_wrong_groups(backend: str, device: str) -> None:
    """Not an error, which would wait for the device: NaN in that row, and the others as without it."""
    batch, pool = draw(), there(pool_of(len(SIZES)), device)
    for wrong, known in ((-1, False), (-(2**40), True), (len(SIZES), True), (2**40, True)):
        options: dict[str, Any] = {"pool": pool} if known else {"scale": "group"}
        rewards, group_of = batch["rewards"].to(device), batch["group_of"].to(device).clone()
        group_of[[3, 60]] = wrong
        right = torch.ones(len(rewards), dtype=torch.bool, device=device)
        right[[3, 60]] = False
        actual = group_advantages(rewards, group_of, **options, backend=backend)
        assert actual[~right].isnan().all()
        assert_same_bits([actual[right]], [group_advantages(rewards[right], group_of[right], **options, backend=backend)])


def check_wrong_offsets(backend: str, device: str) -> None:
    """NaN everywhere, and no read outside."""
    batch = sorted_batch(draw(), len(SIZES))
    total = len(batch["rewards"])
    for at, offset in ((0, 1), (0, -1), (4, 0), (7, total - 1), (7, total + 1), (3, 2**40), (3, -(2**40)), (7, 2**40)):
        offsets = batch["cu_seqlens"].clone()
        offsets[at] = offset
        for scale in ("group", "batch"):
            actual = group_advantages(batch["rewards"].to(device), cu_seqlens=offsets.to(device), scale=scale, backend=backend)
            assert actual.isnan().all(), (at, offset)
    nobody = torch.zeros(1, dtype=torch.int64, device=device)
    assert group_advantages(batch["rewards"].to(device), cu_seqlens=nobody, backend=backend).isnan().all()


def check_nothing(backend: str, device: str) -> None:
    """No row; a row whose reward is not a number says so in its group, and where the batch is divided by, everywhere."""
    empty, offsets = torch.empty(0, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    for scale in SCALES:
        assert group_advantages(empty, none, scale=scale, backend=backend).shape == (0,)
        assert group_advantages(empty, cu_seqlens=offsets, scale=scale, backend=backend).shape == (0,)
    rewards, group_of = torch.tensor([1.0, NAN, 3, 4, 6], device=device), torch.tensor([0, 0, 1, 1, 1], device=device)
    actual = group_advantages(rewards, group_of, backend=backend)
    assert actual.isnan().tolist() == [True, True, False, False, False]
    assert group_advantages(rewards, group_of, scale="batch", backend=backend).isnan().all()


def check_repeatable(backend: str, device: str) -> None:
    batch = {k: v.to(device) for k, v in draw((5, 0, 9)).items()}
    for scale in ("group", "batch"):
        assert_repeatable(lambda scale=scale: [group_advantages(**batch, scale=scale, backend=backend)])


def check_torch(backend: str, device: str) -> None:
    """opcheck, fake tensors, and one graph under torch.compile."""
    rewards, group_of = torch.randn(7, device=device), torch.tensor([0, 1, 0, 2, 1, 1, 0], device=device)
    offsets = torch.tensor([0, 3, 3, 7], device=device)
    for groups, cu, count in ((group_of, None, None), (group_of, None, 3), (None, offsets, 3)):
        pool = None if count is None else there(pool_of(3), device)
        args = arguments(rewards, groups, cu, count, pool, "pool", "pool", None, 1, 1e-6, "zero")
        torch.library.opcheck(getattr(torch.ops.reinforce_ada, f"group_advantages_{backend}").default, args)
    with FakeTensorMode():
        fake = torch.empty(7, dtype=torch.float16, device=device)
        assert group_advantages(fake, torch.empty(7, dtype=torch.int64, device=device), backend=backend).dtype == torch.float16

    def scaled(r: Tensor, groups: Tensor) -> Tensor:
        return group_advantages(r * 2, groups, scale="group", backend=backend) * 3

    torch.compiler.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rewards, group_of), scaled(rewards, group_of))
    torch.compiler.reset()


def check_more_degrees_than_rewards(backend: str, device: str, scale: str) -> None:
    """With ddof = 7 no variance is left in groups of 7, pools of 2 to 8 and a batch of 7: nothing is divided there."""
    batch = draw((7, 2, 9)) if scale != "batch" else draw((3, 4))
    pool = pool_of(len(SIZES)) if scale == "pool" else None
    assert_conforms(backend, device, batch if pool is None else draw(), scale=scale, ddof=7, pool=pool)


def check_spread_of_a_long_group(backend: str, device: str) -> None:
    """The one reward that differs is in the first block of the group, or in the last."""
    for sizes in ((1500, 3), (1500, 1500)):
        for at, value in ((0, 1.0), (0, -1.0), (1499, 1.0)):
            rewards = torch.zeros(sum(sizes))
            rewards[at] = value
            offsets = torch.tensor([0, *sizes]).cumsum(0)
            assert_conforms(backend, device, {"rewards": rewards, "cu_seqlens": offsets}, scale="group")


CHOICES = [(baseline, scale) for baseline in BASELINES for scale in SCALES]
FEW = [("pool", "none"), ("group", "batch"), ("leave-one-out", "group"), ("leave-one-out", "pool"), ("group", "pool")]

CASES = [
    *each(check_convention, ("verl-rloo",), ("trl-batch",), ("reinforce-ada-std",)),
    *each(check_convention, *((name,) for name in CONVENTIONS), large=True),
    *each(check_choice, *FEW, dtypes=True),
    *each(check_choice, *(choice for choice in CHOICES if choice not in FEW), dtypes=True, large=True),
    *each(check_given_baseline),
    *each(check_long_groups, ((1500, 3000),)),
    *each(check_long_groups, ((300000, 3, 1100),), ((4,) * 9000,), large=True),
    *each(check_same_groups),
    *each(check_surroundings, dtypes=True),
    *each(check_wrong_groups),
    *each(check_wrong_offsets),
    *each(check_nothing),
    *each(check_repeatable),
    *each(check_torch),
    *each(check_more_degrees_than_rewards, ("group",), ("pool",), ("batch",)),
    *each(check_spread_of_a_long_group),
]
