"""`group_advantages`: literal tables, and every build of every form against the truth written with loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conformance import assert_no_worse, assert_repeatable, assert_same_bits
from group_advantages_truth import BASELINES, SCALES, every_build, every_form, native_form, pool_of, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops import group_advantages
from reinforce_ada.types import PoolStats

# The meaning


@every_build
def test_the_balanced_group_against_its_pool(backend: str) -> None:
    outcomes = [float(c == "+") for c in "++++++++----++++"]
    kept = torch.tensor([outcomes[i] for i in (0, 1, 8, 9)])
    got = group_advantages(kept, torch.zeros(4, dtype=torch.int64), pool=pool_of(outcomes), backend=backend)
    assert got.tolist() == [0.25, 0.25, -0.75, -0.75]
    assert got.dtype == torch.float32


ROOT_HALF = math.sqrt(0.5) + 1e-6


@every_build
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.5, -0.5, 2, 0, -2]),
        ({"baseline": "group"}, [0.5, -0.5, 2, 0, -2]),
        ({"baseline": "leave-one-out"}, [1, -1, 3, 0, -3]),
        ({"scale": "group"}, [0.5 / ROOT_HALF, -0.5 / ROOT_HALF, 2 / 2.000001, 0, -2 / 2.000001]),
        ({"scale": "pool", "ddof": 0, "eps": 0.0}, [1, -1, math.sqrt(1.5), 0, -math.sqrt(1.5)]),
        ({"scale": "batch", "eps": 0.0}, [x / math.sqrt(4) for x in (0.5, -0.5, 2, 0, -2)]),  # deviations 1 4 9 1 1 of mean 2
        ({"baseline": torch.tensor([0.25, 1.0])}, [0.75, -0.25, 4, 2, 0]),
        ({"class_weights": torch.tensor([[2.0, 4], [1, 10]])}, [2, -1, 20, 0, -2]),
        ({"pool": pool_of([1, 0, 0, 0], [5, 3, 1, 1, 0])}, [0.75, -0.25, 3, 1, -1]),
        ({"pool": pool_of([1, 0, 0, 0], [5, 3, 1, 1, 0]), "baseline": "group"}, [0.5, -0.5, 2, 0, -2]),
        ({"pool": pool_of([1, 0, 0, 0], [5, 3, 1, 1, 0]), "baseline": "leave-one-out"}, [1, -1 / 3, 3.75, 1.25, -1.25]),
        ({"pool": pool_of([1, 0, 0, 0], [5, 3, 1, 1, 0]), "scale": "pool", "eps": 0.0}, [1.5, -0.5, 1.5, 0.5, -0.5]),
    ],
)
def test_two_groups(backend: str, arguments: dict[str, Any], expected: list[float]) -> None:
    rewards = torch.tensor([1.0, 0, 5, 3, 1])
    group_of = torch.tensor([0, 0, 1, 1, 1])
    order = torch.tensor([4, 0, 2, 1, 3])
    for got, want in (
        (group_advantages(rewards, group_of, backend=backend, **arguments), expected),
        (group_advantages(rewards, cu_seqlens=torch.tensor([0, 2, 5]), backend=backend, **arguments), expected),
        (group_advantages(rewards[order], group_of[order], backend=backend, **arguments), [expected[i] for i in order]),
    ):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-12)


@every_build
def test_no_signal_is_exactly_zero(backend: str) -> None:
    """Also where the mean of equal numbers rounds to another number, and whatever the scale divides by."""
    rewards = torch.full((7,), 0.1)
    pool = PoolStats(*(np.asarray([x]) for x in (7.0, 0.1 + 1e-9, 1e-20, float(rewards[0]), float(rewards[0]))))
    group_of = torch.zeros(7, dtype=torch.int64)
    for baseline in ("pool", "group", "leave-one-out"):
        for scale in SCALES:
            for p in (None, pool):
                got = group_advantages(rewards, group_of, pool=p, baseline=baseline, scale=scale, eps=0.0, backend=backend)
                assert got.tolist() == [0.0] * 7
                assert not got.signbit().any()


@every_build
def test_a_single_reward(backend: str) -> None:
    """Nobody to compare with: 0. A pool of others gives the plain difference. No spread: no division."""
    one, group = torch.tensor([3.0]), torch.tensor([0])
    for baseline in ("pool", "group", "leave-one-out"):
        assert group_advantages(one, group, baseline=baseline, scale="group", backend=backend).tolist() == [0.0]
    pool = pool_of([3.0, 1.0])
    assert group_advantages(one, group, pool=pool, backend=backend).tolist() == [1.0]
    assert group_advantages(one, group, pool=pool, scale="group", backend=backend).tolist() == [1.0]  # std of one: undefined
    assert group_advantages(one, group, pool=pool, baseline="leave-one-out", backend=backend).tolist() == [2.0]
    assert group_advantages(one, group, baseline=torch.tensor([1.0]), scale="batch", backend=backend).tolist() == [2.0]


@every_build
def test_leave_one_out_is_the_scaled_pool_mean(backend: str) -> None:
    """r - mean of the other n - 1 = (r - mean) n / (n - 1), the RLOO identity."""
    rewards = torch.tensor([1.0, 0, 0, 1, 0.5, 0.25])
    group_of = torch.tensor([0, 0, 0, 0, 1, 1])
    plain = group_advantages(rewards, group_of, backend=backend)
    others = group_advantages(rewards, group_of, baseline="leave-one-out", backend=backend)
    factor = torch.tensor([4 / 3] * 4 + [2.0] * 2)
    torch.testing.assert_close(others, plain * factor, rtol=1e-6, atol=0)


@every_form
def test_class_weights_for_the_exact_objective(backend: str) -> None:
    """a correct and b wrong kept: A+ = theta (a + b) / a, A- = -theta (a + b) / b, from a baseline at the threshold .5."""
    theta, a, b = 0.125, 1, 3
    weights = torch.tensor([[theta * (a + b) / b / 0.5, theta * (a + b) / a / 0.5]])
    got = group_advantages(
        torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64), baseline=torch.tensor([0.5]), class_weights=weights,
        backend=backend,
    )  # fmt: skip
    np.testing.assert_allclose(got.numpy(), [0.5, -1 / 6, -1 / 6, -1 / 6], rtol=1e-6)


# Every form against the definition


def draw(rows: int, groups: int, seed: int) -> tuple[Tensor, Tensor, list[list[float]]]:
    """Graded rewards in unsorted groups, some of them empty, one degenerate; and the rewards of the pools around them."""
    rng = np.random.default_rng(seed)
    group_of = torch.from_numpy(rng.integers(0, groups, rows))
    rewards = torch.from_numpy(rng.choice([0.0, 0.1, 0.3, 1.0, -2.0], rows)).float()
    rewards[group_of == 0] = 0.1
    pools = [[*rewards[group_of == g].tolist(), *rng.choice([0.0, 1.0], 2 if g else 0).tolist()] for g in range(groups)]
    return rewards, group_of, pools


@every_build
@pytest.mark.parametrize("order", ["shuffled", "sorted", "cu_seqlens"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_conforms(backend: str, baseline: str, scale: str, order: str) -> None:
    for seed, (rows, groups) in enumerate([(1, 1), (5, 9), (70, 5)]):
        rewards, group_of, pools = draw(rows, groups, seed)
        if order != "shuffled":
            group_of = group_of.sort(stable=True).values
            pools = [[*rewards[group_of == g].tolist(), 0.5, 0.25] for g in range(groups)]
        where: dict[str, Any] = {"group_of": group_of}
        if order == "cu_seqlens":
            where = {"cu_seqlens": torch.cat([torch.zeros(1), torch.bincount(group_of, minlength=groups).cumsum(0)]).int()}
        values = torch.linspace(-1, 1, groups, dtype=torch.float64)
        weights = torch.rand(groups, 2, dtype=torch.float64)
        for around, class_weights, singleton in (
            (None, None, "zero"),
            (None, weights, "reward"),
            (pools, None, "reward"),
            (pools, weights, "zero"),
        ):
            arguments: dict[str, Any] = {
                "pool": None if around is None else pool_of(*around),
                "baseline": values if baseline == "values" else baseline,
                "scale": scale,
                "class_weights": class_weights,
                "singleton": singleton,
            }
            got = group_advantages(rewards, **where, **arguments, backend=backend)
            plain = group_advantages(rewards, **where, **arguments, backend="reference")
            exact = truth(rewards, group_of, around, arguments["baseline"], scale, class_weights, singleton=singleton)
            assert_no_worse(got, exact, plain, 1e-6 * exact.abs().max().item(), f"{rows} rows, {groups} groups")
            double = group_advantages(rewards.double(), **where, **arguments)
            assert double.dtype == torch.float64
            torch.testing.assert_close(double, exact, rtol=1e-10, atol=1e-12)


@native_form
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "shuffled"])
def test_large(backend: str, sort: bool) -> None:
    """Past every block size and grain; far from zero, where fp32 sums and uncentred squares would lose everything."""
    rows, groups = 100_003, 1_009
    group_of = torch.randint(groups, (rows,))
    group_of[:200] = 7
    group_of = group_of.sort().values if sort else group_of
    rewards = 1000 + torch.rand(rows)
    for baseline, scale in (("pool", "none"), ("pool", "batch"), ("leave-one-out", "group")):
        got = group_advantages(rewards, group_of, baseline=baseline, scale=scale, backend=backend)
        exact = group_advantages(rewards.double(), group_of, baseline=baseline, scale=scale)
        torch.testing.assert_close(got.double(), exact, rtol=2e-7, atol=1e-9)


@native_form
def test_threads_memory_and_repetition_change_nothing(backend: str) -> None:
    rows, groups = 70_001, 501
    rewards, shuffled = torch.randn(rows), torch.randint(groups, (rows,))
    pool = PoolStats(*torch.rand(5, groups, dtype=torch.float64) + 2)
    for group_of in (shuffled, shuffled.sort().values):
        for pooled in (None, pool):
            for scale in SCALES:
                assert_repeatable(lambda g=group_of, p=pooled, s=scale: [group_advantages(rewards, g, pool=p, scale=s, backend=backend)])
        assert_repeatable(lambda g=group_of: [group_advantages(rewards.to(d), g, backend=backend) for d in (torch.bfloat16, torch.float16)])


@native_form
def test_many_groups_in_any_order(backend: str) -> None:
    """More groups than one table of sums holds: rows are dealt out to buckets. Also with numbers from one end of the range only."""
    rows, groups = 150_001, 100_003
    pool = PoolStats(*torch.rand(5, groups, dtype=torch.float64) + 2)
    weights = torch.rand(groups, 2, dtype=torch.float64)
    rewards = 1000 + torch.rand(rows)
    for group_of in (torch.randint(groups, (rows,)), torch.randint(groups - 300, groups, (rows,))):
        for arguments in (
            {},
            {"baseline": "leave-one-out", "scale": "group"},
            {"pool": pool, "scale": "pool", "class_weights": weights},
            {"pool": pool, "baseline": "group", "scale": "batch"},
        ):
            got = group_advantages(rewards, group_of, **arguments, backend=backend)
            exact = group_advantages(rewards.double(), group_of, **arguments)
            torch.testing.assert_close(got.double(), exact, rtol=2e-7, atol=1e-9)
        assert_repeatable(lambda g=group_of: [group_advantages(rewards, g, scale="group", backend=backend)])


@every_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    """The statistics are those of the rounded rewards in float64; the advantage is rounded once."""
    for rows, groups in ((1, 1), (37, 5), (4100, 700)):
        rewards = (torch.randn(rows) * 3).to(dtype)
        shuffled = torch.randint(groups, (rows,))
        for group_of in (shuffled, shuffled.sort().values):
            for baseline, scale in (("pool", "none"), ("leave-one-out", "batch"), ("group", "group")):
                got = group_advantages(rewards, group_of, baseline=baseline, scale=scale, backend=backend)
                assert got.dtype == dtype
                exact = group_advantages(rewards.double(), group_of, baseline=baseline, scale=scale)
                assert_no_worse(got, exact, exact.to(dtype), 1e-7, f"{rows} rows, {baseline}, {scale}")
    one = torch.tensor([1.0, 0, 0, 0], dtype=dtype)
    assert group_advantages(one, torch.zeros(4, dtype=torch.int64), backend=backend).tolist() == [0.75, -0.25, -0.25, -0.25]


@native_form
def test_nearly_sorted(backend: str) -> None:
    """Rows that look sorted until the end, where the work so far is done again in any order."""
    rewards = torch.randn(3001)
    group_of = torch.arange(3001) // 7
    group_of[-1] = 3
    for scale in SCALES:
        got = group_advantages(rewards, group_of, scale=scale, backend=backend)
        torch.testing.assert_close(got.double(), group_advantages(rewards.double(), group_of, scale=scale), rtol=2e-7, atol=1e-9)


@native_form
def test_more_groups_than_rows(backend: str) -> None:
    """Numbers far beyond the rows: the table is made again with room for them."""
    rewards, group_of = torch.randn(150_001), torch.randint(400_000, (150_001,))
    got = group_advantages(rewards, group_of, baseline="leave-one-out", backend=backend)
    exact = group_advantages(rewards.double(), group_of, baseline="leave-one-out")
    torch.testing.assert_close(got.double(), exact, rtol=2e-7, atol=1e-9)
    group_of[-1] = -1
    with pytest.raises(InputError, match=r"group_of\[150000\] = -1"):
        group_advantages(rewards, group_of, backend=backend)


rewards_of_any_size = st.sampled_from([0.0, 0.1, 1.0, -3.5, 1e-40, -2e30, 1e30])


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(st.tuples(st.integers(0, 7), rewards_of_any_size), min_size=1, max_size=60),
    sort=st.booleans(),
    baseline=st.sampled_from(["pool", "group", "leave-one-out"]),
    scale=st.sampled_from(SCALES),
    singleton=st.sampled_from(["zero", "reward"]),
)
def test_any_groups(rows: list[tuple[int, float]], sort: bool, baseline: str, scale: str, singleton: str) -> None:
    """Ragged and empty groups, ties, signs and sizes in any order: the definition, up to rounding in each group."""
    rows = sorted(rows, key=lambda row: row[0]) if sort else rows
    group_of, rewards = torch.tensor([g for g, _ in rows]), torch.tensor([r for _, r in rows])
    got = group_advantages(rewards, group_of, baseline=baseline, scale=scale, singleton=singleton).double()
    exact = truth(rewards, group_of, None, baseline, scale, singleton=singleton)
    for g in group_of.unique():
        own = group_of == g
        assert (got[own] - exact[own]).abs().max() <= 1e-6 * exact[own].abs().max() + 2e-45  # the smallest fp32
        if rewards[own].min() == rewards[own].max() and not (singleton == "reward" and own.sum() == 1):
            assert got[own].tolist() == [0.0] * int(own.sum())
    if sort:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(group_of, minlength=8).cumsum(0)])
        packed = group_advantages(rewards, cu_seqlens=offsets, baseline=baseline, scale=scale, singleton=singleton)
        assert torch.equal(packed.double(), got)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 0.1, 1.0, -3.5])), min_size=1, max_size=40))
def test_properties(rows: list[tuple[int, float]]) -> None:
    """Sums to zero in each group; does not care about order, nor about a constant added to the rewards of exact numbers."""
    group_of = torch.tensor([g for g, _ in rows])
    rewards = torch.tensor([r for _, r in rows])
    got = group_advantages(rewards, group_of)
    sums = torch.zeros(6).index_add(0, group_of, got)
    assert sums.abs().max() < 1e-5
    order = torch.randperm(len(rows))
    torch.testing.assert_close(group_advantages(rewards[order], group_of[order]), got[order], rtol=1e-6, atol=1e-7)


@every_form
def test_edges(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert group_advantages(torch.zeros(0), none, backend=backend).shape == (0,)
    assert group_advantages(torch.zeros(0), none, scale="batch", baseline="leave-one-out", backend=backend).shape == (0,)
    assert group_advantages(torch.zeros(0), cu_seqlens=torch.zeros(3, dtype=torch.int32), backend=backend).shape == (0,)
    strided = torch.tensor([1.0, 9, 0, 9])[::2]
    assert group_advantages(strided, torch.tensor([0, 9, 0, 9])[::2], backend=backend).tolist() == [0.5, -0.5]
    leaf = torch.tensor([1.0, 0.0], requires_grad=True)
    assert not group_advantages(leaf, torch.tensor([0, 0]), backend=backend).requires_grad
    nan = group_advantages(torch.tensor([1.0, math.nan, 1.0, 1.0]), torch.tensor([0, 0, 1, 1]), backend=backend)
    assert nan.isnan().tolist() == [True, True, False, False]  # stays in its group


# Errors


@every_form
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": torch.zeros(2, 2)}, r"rewards is \[2, 2\] float32 on cpu; \[N\]"),
        ({"rewards": torch.zeros(4, dtype=torch.int64)}, r"rewards is \[4\] int64"),
        ({"group_of": None}, "neither group_of nor cu_seqlens; exactly one"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "both group_of and cu_seqlens; exactly one"),
        ({"group_of": torch.zeros(3, dtype=torch.int64)}, r"group_of is \[3\] int64 on cpu; \[4\] int64"),
        ({"group_of": torch.zeros(4, dtype=torch.int32)}, "group_of is .* int32"),
        ({"group_of": torch.tensor([0, 1, -1, 1])}, r"group_of\[2\] = -1; group numbers of at least 0"),
        ({"group_of": torch.tensor([-3, 0, 1, 1])}, r"group_of\[0\] = -3; group numbers of at least 0"),
        ({"baseline": torch.zeros(1)}, r"group_of\[2\] = 1; group numbers in \[0, 1\)"),
        ({"baseline": torch.zeros(1), "group_of": torch.tensor([0, 3, 0, 1])}, r"group_of\[1\] = 3; group numbers in \[0, 1\)"),
        ({"pool": pool_of([1.0]), "group_of": torch.tensor([0, 3, 0, 1])}, r"group_of\[1\] = 3; group numbers in \[0, 1\)"),
        ({"group_of": None, "cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens\[1\] = 3; offsets from 0 .* end at 4"),
        ({"group_of": None, "cu_seqlens": torch.tensor([1, 4])}, r"cu_seqlens\[0\] = 1"),
        ({"group_of": None, "cu_seqlens": torch.tensor([0, 3, 2, 4])}, r"cu_seqlens\[2\] = 2"),
        ({"group_of": None, "cu_seqlens": torch.tensor([0, 9, 4])}, r"cu_seqlens\[1\] = 9"),
        ({"group_of": None, "cu_seqlens": torch.tensor([0.0, 4])}, r"cu_seqlens is \[2\] float32"),
        ({"group_of": None, "cu_seqlens": torch.zeros(0, dtype=torch.int64)}, r"cu_seqlens is \[0\] int64"),
        ({"pool": pool_of([1.0], [0.0]), "baseline": torch.zeros(3)}, r"pool.count for \[2\] groups and baseline for \[3\]"),
        ({"baseline": torch.zeros(2, 1)}, r"baseline has shape \[2, 1\]"),
        ({"class_weights": torch.zeros(2)}, r"class_weights is \[2\] float32 on cpu; \[G, 2\]"),
        ({"baseline": "pol"}, "unknown baseline 'pol'; known: group, leave-one-out, pool; did you mean 'pool'"),
        ({"scale": "std"}, "unknown scale 'std'"),
        ({"singleton": "rewards"}, "unknown singleton 'rewards'; known: reward, zero; did you mean 'reward'"),
        ({"ddof": -1}, "ddof=-1, eps=1e-06; both at least 0 and below 2147483648, ddof an integer"),
        ({"ddof": 2**70}, "both at least 0 and below 2147483648, ddof an integer"),
        ({"eps": 10**400}, "both at least 0 and below 2147483648, ddof an integer"),
        ({"ddof": 0.5}, "ddof=0.5"),
        ({"eps": math.nan}, "eps=nan"),
        ({"eps": math.inf}, "eps=inf"),
        ({"group_of": torch.zeros(4, dtype=torch.int64, device="meta")}, "group_of is .* on meta; .* on cpu"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
    ],
)
def test_errors_are_one_line(backend: str, arguments: dict[str, Any], message: str) -> None:
    call = {"rewards": torch.zeros(4), "group_of": torch.tensor([0, 0, 1, 1]), "backend": backend, **arguments}
    with pytest.raises(InputError, match=f"^group_advantages: .*{message}") as error:
        group_advantages(call.pop("rewards"), call.pop("group_of"), **call)
    assert "\n" not in str(error.value)


# torch


@native_form
def test_opcheck(backend: str) -> None:
    pool = torch.rand(5, 3, dtype=torch.float64).unbind()
    weights = torch.rand(3, 2, dtype=torch.float64)
    rewards, group_of, cu = torch.randn(6), torch.tensor([0, 2, 1, 0, 1, 2]), torch.tensor([0, 2, 2, 6])
    nothing = (None,) * 7
    for args in (
        (rewards, group_of, None, None, *nothing, 0, 0, 1, 1e-6, False),
        (rewards.half(), group_of, None, 3, *pool, pool[0], weights, 3, 1, 1, 1e-6, False),
        (rewards, None, cu, 3, *nothing, 2, 3, 0, 1e-6, True),
    ):
        torch.library.opcheck(torch.ops.reinforce_ada.group_advantages.default, args)


@native_form
@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_whole(backend: str) -> None:
    pool = PoolStats(*torch.rand(5, 3, dtype=torch.float64))
    rewards, group_of, cu = torch.randn(6), torch.tensor([0, 2, 1, 0, 1, 2]), torch.tensor([0, 2, 2, 6])

    def run(r: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            group_advantages(r, g, backend=backend),
            group_advantages(r, g, pool=pool, scale="pool", backend=backend) * 2,
            group_advantages(r, cu_seqlens=c, baseline="leave-one-out", scale="batch", backend=backend),
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(rewards, group_of, cu)
    assert_same_bits(compiled, run(rewards, group_of, cu))


@every_build
@pytest.mark.parametrize("base", [2**20, 2**33, 2**62], ids=["2^20", "2^33", "2^62"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_group_numbers_like_hashes(backend: str, base: int, scale: str) -> None:
    """Numbers that no table could have a place for each name groups as small ones do, in any order; the largest int64 too."""
    rewards = torch.randn(40)
    small = torch.randint(5, (40,))
    names = torch.tensor([0, base, 2**63 - 1, base - 1, 7])
    expected = group_advantages(rewards, small, scale=scale, backend=backend)
    assert torch.equal(group_advantages(rewards, names[small], scale=scale, backend=backend), expected)
    order = names[small].argsort(stable=True)
    torch.testing.assert_close(group_advantages(rewards[order], names[small][order], scale=scale, backend=backend), expected[order])
    with pytest.raises(InputError, match=r"group_of\[3\] = -1"):
        group_advantages(rewards, torch.cat([names[small][:3], torch.tensor([-1]), names[small][4:]]), backend=backend)
