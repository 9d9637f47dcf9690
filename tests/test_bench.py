"""The benchmarks: what they time is right, and what they say of it is true."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util

import pytest
import torch
from torch.overrides import TorchFunctionMode

from reinforce_ada import cli
from reinforce_ada.bench import baselines, linear, logits, measure, memory, page, policy, tables
from reinforce_ada.bench.case import Candidate, Goal
from reinforce_ada.bench.catalogue import OPS, all_cases
from reinforce_ada.bench.checks import close, close_in_norm
from reinforce_ada.bench.measure import Session, WrongResultError, settings
from reinforce_ada.bench.record import Results, goal_text, number, slower, verdicts
from reinforce_ada.ops import _dispatch, _gpu
from toy_bench import MB, a_case, a_record, timing

metered = pytest.mark.skipif(memory.missing("cpu") is not None, reason=f"peak memory: {memory.missing('cpu')}")

# -------------------- the catalogue


def test_every_operator_has_cases_and_each_case_its_own_name():
    cases = all_cases()
    assert {case.op for case in cases} == set(OPS) == set(_dispatch.table())
    assert len({str(case) for case in cases}) == len(cases)
    assert {case.op for case in cases if case.quick_shape} == set(OPS)


GOALS = [
    ("token_logprobs/forward/fp32/T=256,V=151936", "≥ 3.5 × inductor; ≥ 9 × TRL; ≥ 0.9 of reading its bytes"),
    ("token_logprobs/forward/bf16/T=1024,V=32000", "≥ 3.5 × inductor; ≥ 9 × TRL; ≥ 7 Gelem/s"),
    ("token_logprobs/forward and backward, gradient over the logits/bf16/T=256,V=151936", "≥ 6.5 × inductor; ≤ 10 MB extra"),
    ("token_logprobs/forward and backward, fresh gradient/fp32/T=256,V=151936", "≥ 2.5 × inductor"),
    ("token_logprobs/forward and backward, fresh gradient/bf16/T=256,V=151936", "≥ 3.5 × inductor"),
    ("token_logprobs/forward and backward with entropy, gradient over the logits/fp32/T=256,V=151936", "≥ 5 × inductor; ≤ 10 MB extra"),
    ("token_logprobs/forward and backward with entropy, fresh gradient/bf16/T=1024,V=32000", "≥ 5 × inductor"),
    ("linear_token_logprobs/forward, max_extra_bytes=10 MB/fp32/T=512,D=896,V=151936", "≤ 1.03 × the time of one mm; ≤ 10 MB extra"),
    (
        "linear_token_logprobs/forward and backward, max_extra_bytes=10 MB/bf16/T=512,D=896,V=151936",
        "≤ 1.36 × the time of three mm; ≤ 10 MB extra",
    ),
    (
        "linear_policy_loss/ppo, forward and backward/fp32/T=512,D=896,V=151936",
        "≤ 1.08 × the time of three mm; ≥ 1 × inductor; ≤ 64 MB extra",
    ),
    (
        "linear_policy_loss/ppo, forward and backward, onto weight_grad/bf16/T=512,D=896,V=151936",
        "≤ 1.08 × the time of three mm; ≥ 1 × inductor; ≤ 64 MB extra",
    ),
    ("group_advantages/mean, sorted/fp32/N=512,G=64", "≥ 4 × best; ≤ 4 µs"),
    ("group_advantages/mean and std, shuffled/fp32/N=4194304,G=524288", "≥ 2.5 × best; ≤ 2 × the time of streaming its bytes"),
    ("policy_loss/ppo, packed/fp32/N=1024,L=1024", "≥ 4.5 × inductor; ≥ 40 × eager; ≤ 1 MB extra"),
]


@pytest.mark.parametrize(("name", "goals"), GOALS)
def test_the_goals_are_those_agreed_on(name, goals):
    case = next(case for case in all_cases() if str(case) == name)
    floor = dataclasses.replace(timing(1.0), floor=True)
    assert "; ".join(goal_text(g, floor if "bytes" in g.against else None) for g in case.goals) == goals


TINY = {"T": 24, "D": 16, "V": 131, "N": 64, "G": 8, "L": 8}


@pytest.mark.parametrize("case", {(c.op, c.name, c.dtype): c for c in all_cases()}.values(), ids=lambda c: f"{c.op}/{c.name}/{c.dtype}")
def test_ours_and_every_baseline_compute_the_same(case, monkeypatch):
    for module in (logits, linear, policy):
        monkeypatch.setattr(module, "compiled", lambda form: form)  # what inductor makes of it is checked when it is timed
    monkeypatch.setattr(linear, "missing", lambda *_, **__: "not installed")
    torch.manual_seed(0)
    small = dataclasses.replace(case, shape={letter: TINY[letter] for letter in case.shape})
    setup = small.build(small, "cpu")
    for run, loose in [(setup.subject, False), *((c.run, True) for c in setup.others if not c.floor)]:
        if setup.reset is not None:
            setup.reset()
        setup.check(run(), loose)
    with pytest.raises(AssertionError):
        setup.check(spoiled(setup.subject()), False)


def spoiled(results: object) -> object:
    """The same, with every number a little off."""
    if isinstance(results, torch.Tensor):
        return results * 1.1 + 0.1
    if isinstance(results, dict):
        return {name: spoiled(x) for name, x in results.items()}
    return tuple(map(spoiled, results)) if isinstance(results, tuple) else results


# -------------------- checks, numbers, verdicts


def test_close_is_not_fooled_by_nan_or_shape():
    x = torch.tensor([1.0, 2.0])
    close("x", x, x + 1e-7, 1e-6)
    close_in_norm("x", x, x + 1e-6, 1e-6)
    for wrong in (x + 1e-5, torch.tensor([1.0, torch.nan]), x[:1]):
        with pytest.raises(AssertionError, match=r"x (is off by|has shape)"):
            close("x", wrong, x, 1e-6)


@pytest.mark.parametrize(
    ("value", "down", "up"),
    [
        (3.4999, "3.49", "3.50"),
        (3.5, "3.50", "3.50"),
        (1.1, "1.10", "1.10"),
        (12.39, "12.3", "12.4"),
        (999.9, "999", "1000"),
        (0.8999, "0.89", "0.90"),
        (0.001, "0.00", "0.01"),
        (0.0, "0", "0"),
    ],
)
def test_numbers_are_cut_off_never_rounded_in_favour(value, down, up):
    assert number(value) == down
    assert number(value, up=True) == up


@pytest.mark.parametrize(
    ("goal", "text", "reached", "word"),
    [
        (Goal("speedup", 3.5, "inductor"), "≥ 3.5 × inductor", "3.49 (inductor b)", "miss"),
        (Goal("speedup", 3.49, "inductor"), "≥ 3.49 × inductor", "3.49 (inductor b)", "hit"),
        (Goal("speedup", 10, "eager"), "≥ 10 × eager", "10.0", "hit"),
        (Goal("speedup", 1, "best"), "≥ 1 × best", "0.80 (numpy)", "miss"),
        (Goal("speedup", 0.9, "reading its bytes"), "≥ 0.9 of reading its bytes", "0.90", "hit"),
        (Goal("time", 1.1, "reading its bytes"), "≤ 1.1 × the time of reading its bytes", "1.12", "miss"),
        (Goal("time", 1.2, "reading its bytes"), "≤ 1.2 × the time of reading its bytes", "1.12", "hit"),
        (Goal("extra_mb", 3), "≤ 3 MB extra", "3.00", "hit"),
        (Goal("extra_mb", 2.999), "≤ 2.999 MB extra", "3.00", "miss"),
        (Goal("us", 2000), "≤ 2000 µs", "2000", "hit"),
        (Goal("us", 1999), "≤ 1999 µs", "2000", "miss"),
        (Goal("gelem_per_s", 4), "≥ 4 Gelem/s", "4.00", "hit"),
        (Goal("gelem_per_s", 4.01), "≥ 4.01 Gelem/s", "4.00", "miss"),
        (Goal("speedup", 2, "liger"), "≥ 2 × liger", "liger: needs a GPU", "not measured"),
    ],
)  # fmt: skip
def test_goals_are_judged_by_the_median(goal, text, reached, word):
    (found,) = verdicts(a_record(goal))
    assert (found.goal, found.reached, found.word) == (text, reached, word)
    assert bool(found.spread) == (goal.kind != "extra_mb" and found.met is not None)


def test_memory_that_could_not_be_measured_is_no_hit():
    (found,) = verdicts(a_record(Goal("extra_mb", 10), ours=timing(1.0, extra_mb=None)))
    assert found.word == "not measured"


def test_the_losses_are_named():
    assert [(name, t.ratio) for _, name, t in slower([a_record()])] == [("numpy", 0.8)]


def test_tables_show_what_was_measured():
    r = a_record(Goal("speedup", 3.5, "inductor"), Goal("us", 2000))
    assert tables.tally([r]) == "1 of 2 goals hit"
    assert tables.goal_rows([r])[0] == (
        "policy_loss",
        "ppo",
        "fp32",
        "N=4,L=8",
        "≥ 3.5 × inductor",
        "3.49 (inductor b)",
        "3.32–3.67",
        "miss",
    )
    assert tables.summary_rows([r]) == [("`policy_loss`", "ppo", "10.0", "3.49", "0.80", "0.90", "3.00")]
    assert tables.summary_rows([r, dataclasses.replace(r, others={"eager": timing(12.0)})])[0][2:5] == ("10.0–12.0", "3.49", "0.80–12.0")
    (row,) = tables.measured_rows([r])
    assert row[3:8] == ("cpu", "2.00 ms", "1.0 GB/s", "0.90 of reading its bytes", "3.00")
    assert row[8].startswith("eager 10.0 (9.50–10.5), inductor a 4.00 (3.80–4.20)")
    assert tables.absent_reasons([r, r]) == ["liger: needs a GPU"]
    assert tables.duration(0.0027) == "2.70 µs"
    lines = tables.as_text(("a", "b"), [("long cell", "x")]).splitlines()
    assert lines == ["a          b", "---------  -", "long cell  x"]


# -------------------- peak memory


@metered
def test_the_meter_sees_what_is_allocated_and_freed():
    held = torch.zeros(4 * MB, dtype=torch.uint8)

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        scratch = torch.ones(32 * MB, dtype=torch.uint8)
        result = torch.full((8 * MB,), int(scratch[0]), dtype=torch.uint8)
        return result, held.view(-1)

    work()  # code is read from disk on first use
    for _ in range(3):  # also when malloc could serve it from what was freed before
        extra, results = memory.peak_extra_bytes(work, [held], "cpu")
        assert len(results) == 2
        assert extra == pytest.approx(32 * MB, abs=MB)


@metered
def test_the_meter_is_not_fooled_by_holes_in_the_heap():
    """Blocks that malloc keeps between others are neither scratch that goes unseen nor pages that are counted twice."""
    memory.let_malloc_keep(True)
    blocks = [torch.ones(MB, dtype=torch.uint8) for _ in range(60)]
    del blocks[::2]

    def work() -> None:
        for size in (1, 3, 2, 3, 1, 2):
            torch.ones(size * MB // 2, dtype=torch.uint8)

    for _ in range(3):
        assert memory.peak_extra_bytes(work, blocks, "cpu")[0] == pytest.approx(1.5 * MB, abs=MB / 2)


@metered
def test_the_meter_sees_native_scratch():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

    def work() -> None:
        address = libc.malloc(24 * MB)
        libc.memset(address, 1, 24 * MB)
        libc.free(address)

    assert memory.peak_extra_bytes(work, [], "cpu")[0] == pytest.approx(24 * MB, abs=MB)
    assert memory.peak_extra_bytes(lambda: None, [], "cpu")[0] < MB


def test_a_system_without_the_meter_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "clear_refs")
    assert memory.missing("cpu").startswith("needs a writable")
    assert memory.missing("cuda") is None


# -------------------- sessions


def test_candidates_take_turns_and_each_turn_starts_with_another(monkeypatch):
    monkeypatch.setattr(measure, "_TIMING_S", 0.0)  # one call in a timing
    x, order = torch.arange(4.0), []

    def noting(name):
        return lambda: (order.append(name), x * x)[1]

    session = Session(a_case(noting("ours"), [Candidate(n, noting(n)) for n in "abc"]), "cpu")
    order.clear()
    record = session.run()
    rounds = [" ".join(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert rounds[:4] == ["a b c ours", "b c a ours", "c a b ours", "a b c ours"]
    assert measure.MIN_ROUNDS <= record.rounds == len(rounds) <= measure.MAX_ROUNDS
    assert sorted(record.others) == ["a", "b", "c"]
    assert record.ours.ratio == 1.0


def test_every_candidate_takes_every_turn():
    x = torch.arange(4.0)
    session = Session(a_case(others=[Candidate("other", lambda: x * x), Candidate("floor", x.sum, floor=True)]), "cpu")
    for _ in range(5):
        session.turn()
    assert {name: len(found) for name, found in session._seconds.items()} == {"other": 5, "floor": 5}
    session._seconds["other"] = [3.0, 18.0, 8.0, 36.0, 4.0]
    found = session.record([1.0, 9.0, 2.0, 9.0, 4.0]).others["other"]
    assert (found.ms, found.ratio, found.ratio_low, found.ratio_high) == (8000.0, 3.0, 2.0, 4.0)


def test_what_is_fast_is_called_often_enough_for_the_clock():
    session = Session(a_case(), "cpu")
    assert session.record([session.subject() for _ in range(5)]).calls > 100
    once = Session(a_case(reset=lambda: None), "cpu")  # inputs must be restored before every call
    assert once.record([once.subject() for _ in range(5)]).calls == 1


def test_a_baseline_that_is_wrong_or_fails_is_left_out_with_its_reason():
    def failing() -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    others = [Candidate("wrong", lambda: torch.zeros(4)), Candidate("failing", failing), Candidate("floor", lambda: None, floor=True)]
    record = Session(a_case(others=others), "cpu").run()
    assert list(record.others) == ["floor"]
    assert record.others["floor"].floor
    assert record.absent == {
        "gone": "why",
        "wrong": "computes something else: square is off by 9.0e+00, more than 5.0e-01",
        "failing": "RuntimeError: no kernel",
    }


def test_wrong_results_of_ours_are_not_timed():
    with pytest.raises(WrongResultError, match=r"policy_loss/square/fp32/N=4: square is off by"):
        Session(a_case(lambda: torch.zeros(4)), "cpu")


@metered
def test_memory_that_is_kept_for_later_calls_counts():
    kept = []

    def hoarding() -> torch.Tensor:
        if not kept:
            kept.append(torch.ones(16 * MB, dtype=torch.uint8))
        return torch.arange(4.0) ** 2

    (found,) = verdicts(Session(a_case(hoarding), "cpu").run())
    assert found.word == "miss"
    assert 16 <= float(found.reached) < 18


def test_the_gpu_clock_flushes_the_cache_outside_of_what_it_times(monkeypatch):
    """The order of things on the stream; no GPU is needed to see it."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("record")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, stop):
            return 4.0

    class Buffer:
        def zero_(self):
            said.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Buffer())
    assert measure.CudaClock().seconds(lambda: said.append("run"), 2) == pytest.approx(4e-3)
    assert said == ["flush", "record", "run", "record", "wait"] * 2


class Imagined(TorchFunctionMode):
    """The CPU under the name of a GPU: whatever is made on "cuda" is made here, and counted."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
            self.made += 1
        return func(*args, **kwargs)


@pytest.fixture
def imagined_gpu(monkeypatch):
    """All that a benchmark asks of a GPU; an event lies as many milliseconds after another as events came between them."""
    _gpu.triton_missing(), _gpu.cuda_missing()  # remembered as they really are, before there seems to be a device
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append(self)

        def synchronize(self):
            assert self in said

        def elapsed_time(self, stop):
            return float(said.index(stop) - said.index(self))

    answers = {"is_available": True, "get_device_name": "Imagined", "memory_allocated": 5 * MB, "max_memory_allocated": 8 * MB}
    answers |= {"synchronize": None, "reset_peak_memory_stats": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Imagined() as mode:
        yield mode


@pytest.mark.parametrize("case", {(c.op, c.name, c.dtype): c for c in all_cases()}.values(), ids=str)
def test_every_case_is_ready_for_a_gpu(case, imagined_gpu, monkeypatch):
    """It is built there and nowhere else, ours is right, and so is every form of plain PyTorch; other packages are tried."""
    torch.manual_seed(0)
    for module in (linear, logits, policy):
        monkeypatch.setattr(module, "compiled", lambda form: form)
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: object())  # all are installed
    setup = case.build(dataclasses.replace(case, shape={letter: TINY[letter] for letter in case.shape}), "cuda")
    assert imagined_gpu.made > 0
    setup.check(setup.subject(), False)
    others = {c.name: c for c in setup.others}
    packages = {"liger", "cut-cross-entropy", "flash-attn"}
    for name in others.keys() - packages:
        if setup.reset is not None:
            setup.reset()
        results = others[name].run()
        if not others[name].floor:
            setup.check(results, True)
    assert packages.isdisjoint(setup.absent)
    if case.op == "linear_policy_loss" or (case.op == "linear_token_logprobs" and "backward" in case.name):
        assert {"liger", "cut-cross-entropy"} <= set(others)
    if "gradient over the logits" in case.name and "entropy" not in case.name:
        assert {"liger", "flash-attn"} <= set(others)


def test_a_run_on_a_gpu(imagined_gpu, capsys, tmp_path):
    """From the command to the page: times of events, the allocator's peak, no goal of the CPU, and the device by its name."""
    file = tmp_path / "gpu.json"
    assert cli.main(["bench", "group_advantages", "--case", "pool given", "--quick", "--device", "cuda", "--json", str(file)]) == 0
    results = Results.load(file)
    assert results.about["device"] == "Imagined"
    for r in results.records:
        assert (r.ours.ms, r.others["eager"].ms) == (1.0, 1.0)
        assert 2 <= r.ours.extra_mb <= 3  # what was allocated at the peak, less what was there before and the result
        assert r.goals == ()
    out = capsys.readouterr().out
    assert "goal" not in out.replace("the goals are meant for the full shapes", "")
    assert "device: Imagined" in page.machine(results.about)
    assert "one thread" not in page.machine(results.about)


def test_settings_are_one_thread_and_end():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with settings("cpu"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# -------------------- other packages


def test_an_absent_package_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert baselines.missing("liger_kernel", "cpu") == "liger_kernel is not installed (extra `bench`)"
    assert baselines.missing("liger_kernel", "cpu", needs_gpu=True) == "needs a GPU"
    case = next(c for c in all_cases() if c.op == "linear_policy_loss")
    monkeypatch.setattr(linear, "compiled", lambda form: form)
    setup = case.build(dataclasses.replace(case, shape={"T": 24, "D": 16, "V": 131}), "cpu")
    reason = " is not installed (extra `bench`)"
    assert setup.absent == {"cut-cross-entropy": f"cut_cross_entropy{reason}", "liger": f"liger_kernel{reason}"}
