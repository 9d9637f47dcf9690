"""RewardPool: one event per completion whatever the reward does, and no process left behind."""

from __future__ import annotations

import functools
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pool_rewards
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import RewardPool, RewardRunner
from reinforce_ada.rewards import pool as pool_module
from reinforce_ada.types import Completion, CompletionId, Failed, Prompt, Scored

LONG_S = 60.0  # poll's wait where an event is certain: a bound for a broken pool, never slept through


def completion(prompt_id: str, text: str) -> Completion:
    return Completion(CompletionId(1, prompt_id, 0), np.arange(3), np.zeros(3), text, "stop", 5)


def submit(pool: RewardPool, texts: Sequence[str], data: dict[str, Any] | None = None, prefix: str = "") -> list[str]:
    """Submit one completion per text; returns the prompt ids."""
    ids = [f"{prefix}{i}" for i in range(len(texts))]
    pool.submit([Prompt(i, data=data or {}) for i in ids], [completion(i, text) for i, text in zip(ids, texts, strict=True)])
    return ids


def collect(pool: RewardPool, count: int) -> dict[str, Scored | Failed]:
    events: list[Scored | Failed] = []
    while len(events) < count:
        new = pool.poll(LONG_S)
        assert new, "nothing came"
        events += new
    assert pool.poll() == []
    assert pool.num_pending == 0
    assert len({e.id for e in events}) == len(events) == count
    return {e.id.prompt_id: e for e in events}


def score(pool: RewardPool, texts: Sequence[str], **more: Any) -> list[float | str]:
    """Rewards, or the reasons where they failed."""
    ids = submit(pool, texts, **more)
    events = collect(pool, len(ids))
    return [e.reward if isinstance(e := events[i], Scored) else e.reason for i in ids]


@pytest.fixture(scope="module")
def tricky_pool() -> Iterator[RewardPool]:
    with RewardPool(pool_rewards.tricky, num_workers=2, timeout_s=30.0, retries=1) as pool:
        yield pool


@pytest.fixture
def patient_pool() -> Iterator[RewardPool]:
    """One worker, one attempt."""
    with RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=30.0, retries=0) as pool:
        yield pool


def test_is_a_reward_runner(patient_pool: RewardPool) -> None:
    assert isinstance(patient_pool, RewardRunner)


def test_events_carry_the_completion_and_its_identity(tricky_pool: RewardPool) -> None:
    good, bad = completion("good", "1"), completion("bad", "raise")
    tricky_pool.submit([Prompt("good"), Prompt("bad")], [good, bad])
    events = collect(tricky_pool, 2)
    assert events["good"].completion is good  # type: ignore[union-attr]
    assert (events["bad"].id, events["bad"].policy_version) == (bad.id, 5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.lists(st.sampled_from(["1", "0.25", "raise", "nan"]), max_size=40), max_size=3))
def test_every_completion_yields_exactly_one_event(tricky_pool: RewardPool, rounds: list[list[str]]) -> None:
    ids = [i for number, texts in enumerate(rounds) for i in submit(tricky_pool, texts, prefix=f"{number}:")]
    events = collect(tricky_pool, len(ids))
    for prompt_id, text in zip(ids, (t for texts in rounds for t in texts), strict=True):
        event = events[prompt_id]
        assert (event.reward == float(text)) if isinstance(event, Scored) else text in ("raise", "nan")


def test_a_worker_imports_no_torch(tricky_pool: RewardPool) -> None:
    assert score(tricky_pool, ["torch"]) == [0.0]


def test_a_worker_ignores_ctrl_c(patient_pool: RewardPool) -> None:
    (before,) = score(patient_pool, ["pid"])
    os.kill(int(before), signal.SIGINT)
    assert score(patient_pool, ["pid"]) == [before]
    assert patient_pool.counters.num_workers_replaced == 0


@pytest.mark.parametrize("how", ["hang", "hang in C"])
def test_a_hung_call_is_ended_and_the_rest_goes_on(how: str) -> None:
    with RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=0.3, retries=1) as pool:
        assert score(pool, ["0.5", how, "1"]) == [0.5, "timed out after 0.3 s (2 attempts)", 1.0]
        counters = pool.counters
        assert (counters.num_scored, counters.num_voids, counters.num_timeouts, counters.num_retries) == (2, 1, 2, 1)
        assert counters.num_workers_replaced == 2
        assert "pool_rewards.py" in counters.last_traceback  # where it hung
        assert "_end_with_parent" not in counters.last_traceback


@pytest.mark.parametrize(("how", "reason"), [("os._exit", "exit code 3"), ("sigkill", "SIGKILL")])
def test_a_worker_that_dies_is_replaced(how: str, reason: str) -> None:
    with RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=30.0, retries=0) as pool:
        assert score(pool, ["0.5", how, "1", "0.25"]) == [0.5, f"the worker died of {reason} (1 attempts)", 1.0, 0.25]
        assert (pool.counters.num_workers_replaced, pool.counters.num_timeouts) == (1, 0)


@pytest.mark.parametrize("how", ["raise", "nan", "sigkill"])
def test_a_failure_that_passes_is_retried(tmp_path: Path, how: str) -> None:
    with RewardPool("pool_rewards:first_time_only", num_workers=1, timeout_s=30.0, retries=1) as pool:
        assert score(pool, [how], data={"marker": str(tmp_path / "marker")}) == [1.0]
        assert (pool.counters.num_retries, pool.counters.num_voids, pool.counters.num_scored) == (1, 0, 1)


def test_an_idle_worker_killed_from_outside_costs_no_attempt(patient_pool: RewardPool) -> None:
    (pid,) = score(patient_pool, ["pid"])
    gone = os.pidfd_open(int(pid))
    os.kill(int(pid), signal.SIGKILL)
    wait_gone(gone)
    (other,) = score(patient_pool, ["pid"])
    assert other != pid
    assert (patient_pool.counters.num_workers_replaced, patient_pool.counters.num_voids) == (1, 0)


def test_a_stopped_worker_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_SILENCE_S", 0.1)
    with RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=0.5, retries=0) as pool:
        (pid,) = score(pool, ["pid"])
        os.kill(int(pid), signal.SIGSTOP)
        assert score(pool, ["1"]) == ["timed out after 0.5 s (1 attempts)"]
        assert score(pool, ["1"]) == [1.0]


def test_a_poll_waits_without_running(patient_pool: RewardPool) -> None:
    score(patient_pool, ["1"])
    submit(patient_pool, ["hang"])
    cpu, wall = time.process_time(), time.monotonic()
    assert patient_pool.poll(0.3) == []
    assert time.monotonic() - wall >= 0.3
    assert time.process_time() - cpu < 0.1


def test_a_poll_with_nothing_pending_returns_at_once(patient_pool: RewardPool) -> None:
    start = time.monotonic()
    assert patient_pool.poll(LONG_S) == []
    assert time.monotonic() - start < LONG_S / 2


def test_results_wait_for_a_driver_that_is_away() -> None:
    """The clock of a call is the worker's: a driver that looks only later finds the result, not a time-out."""
    with RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=0.2, retries=0) as pool:
        (pid,) = score(pool, ["pid"])
        submit(pool, ["0.5"] * 5)
        (worker,) = pool._workers
        assert select.select([worker.process.channel], [], [], LONG_S)[0]
        threading.Event().wait(0.3)  # longer than timeout_s: the driver is busy elsewhere
        assert all(isinstance(e, Scored) for e in collect(pool, 5).values())
        assert score(pool, ["pid"]) == [pid]


# -------------------- batch form


def test_a_batch_form_gets_the_chunk_in_one_call(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with RewardPool(pool_rewards.Batch(str(log)), num_workers=1, timeout_s=30.0) as pool:
        assert score(pool, [f"{i}" for i in range(20)]) == [float(i) for i in range(20)]
    assert log.read_text().split() == ["16", "4"]


@pytest.mark.parametrize(
    ("trick", "reason"),
    [("raise", "ValueError: no such answer"), ("sigkill", "the worker died of SIGKILL"), ("nan", "the reward returned nan")],
)
def test_only_the_culprit_of_a_batch_becomes_void(tmp_path: Path, trick: str, reason: str) -> None:
    with RewardPool(pool_rewards.Batch(str(tmp_path / "log")), num_workers=1, timeout_s=30.0, retries=0) as pool:
        first, culprit, last = score(pool, ["0.5", trick, "0.25"])
    assert (first, last) == (0.5, 0.25)
    assert isinstance(culprit, str)
    assert culprit.startswith(reason)
    assert culprit.endswith("(1 attempts)")


def test_a_batch_of_the_wrong_length_scores_nobody(tmp_path: Path) -> None:
    with RewardPool(pool_rewards.Batch(str(tmp_path / "log")), num_workers=1, timeout_s=30.0, retries=0) as pool:
        (reason,) = set(score(pool, ["1", "1"], data={"trick": "short"}))
    assert reason == "ValueError: the batch reward returned 0 values for 1 completions (1 attempts)"


# -------------------- what the user gets to see


def test_the_first_traceback_is_shown_once(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, logger="reinforce_ada"),
        RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=30.0, retries=2) as pool,
    ):
        score(pool, ["raise", "exit"])
        assert pool.counters.num_retries == 4
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "no\nsuch answer" in message
    assert "in _raise" in message


@pytest.mark.parametrize(
    ("reward", "part"),
    [
        ("pool_rewards:absent", "has no attribute 'absent'"),
        ("pool_rewards:NOT_CALLABLE", "is not callable"),
        ("pool_rewards:wrong_arity", "too many positional arguments"),
        ("no_such_module_here:f", "No module named 'no_such_module_here'"),
        ("pool_rewards", 'the form "module:function" or "file.py:function" is needed'),
        (":f", 'the form "module:function" or "file.py:function" is needed'),
        ("pool_rewards:asynchronous", "'pool_rewards:asynchronous' is an async function"),
        ("pool_rewards:Asynchronous", "'pool_rewards:Asynchronous' is a class"),
        (pool_rewards.Asynchronous(), "is an async function"),
        (pool_rewards.AsynchronousBatch(), "is an async function"),
        (functools.partial(pool_rewards.asynchronous), "is an async function"),
        ("pool_rewards:generating", "is a generator function"),
        (3.5, "is not callable"),
    ],
)
def test_a_reward_that_cannot_work_is_refused_before_any_process(reward: Any, part: str) -> None:
    before = children()
    with pytest.raises(InputError, match=r"^(--reward|reward): ") as caught:
        RewardPool(reward)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert children() == before


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"num_workers": 0}, "num_workers=0"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"timeout_s": float("inf")}, "timeout_s=inf"),
        ({"retries": -1}, "retries=-1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], given: str) -> None:
    with pytest.raises(InputError, match=f"^RewardPool: {given}; "):
        RewardPool("pool_rewards:tricky", **settings)


def test_a_prompt_that_does_not_pickle_is_refused(patient_pool: RewardPool) -> None:
    with pytest.raises(InputError, match="prompt 'p' does not pickle"):
        patient_pool.submit([Prompt("p", data={"f": lambda: 1})], [completion("p", "1")])
    assert patient_pool.num_pending == 0


@pytest.mark.parametrize(
    ("reward", "part"),
    [
        (pool_rewards.FailsToLoad(), "a worker cannot load it (ValueError: no such answer)"),
        (pool_rewards.DiesLoading(), "3 workers in a row died of exit code 4"),
    ],
)
def test_a_reward_no_worker_can_load_ends_the_run(reward: Any, part: str) -> None:
    with RewardPool(reward, num_workers=1) as pool:
        with pytest.raises(InputError) as caught:
            score(pool, ["1"])
        assert part in str(caught.value)


# -------------------- processes


def children() -> set[int]:
    """Processes whose parent this one is, dead ones too."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
    return {int(text.split()[0]) for text in stats if int(text.rpartition(")")[2].split()[1]) == os.getpid()}


def wait_gone(*processes: int) -> None:
    """Wait until the processes behind these pidfds have ended."""
    for process in processes:
        poller = select.poll()
        poller.register(process, select.POLLIN)
        assert poller.poll(LONG_S * 1000), "still running"
        os.close(process)


def test_close_stops_idle_and_hung_workers_and_can_be_called_twice() -> None:
    pool = RewardPool("pool_rewards:tricky", num_workers=2, timeout_s=30.0)
    score(pool, ["1"] * 4)
    submit(pool, ["hang"])
    pids = {w.process.pid for w in pool._workers}
    assert len(pids) == 2
    processes = [os.pidfd_open(pid) for pid in pids if pid]
    pool.close()
    wait_gone(*processes)
    assert not pids & children()
    for pid in pids:
        assert pid
        with pytest.raises(ProcessLookupError):  # a zombie would still have its number
            os.kill(pid, 0)
    pool.close()
    for call in (pool.poll, lambda: submit(pool, ["1"])):
        with pytest.raises(InputError, match="it is closed"):
            call()


def test_workers_start_at_the_first_submit_and_no_more_than_needed() -> None:
    with RewardPool("pool_rewards:tricky", num_workers=4, timeout_s=30.0) as pool:
        assert pool._workers == []
        score(pool, ["1"])
        assert len(pool._workers) == 1


@pytest.mark.parametrize("how", ["child", "child with a session", "orphan with a session"])
@pytest.mark.parametrize("end", ["close", "kill the worker", "time out"])
def test_what_a_worker_started_ends_with_it(tmp_path: Path, how: str, end: str) -> None:
    with RewardPool("pool_rewards:starter", num_workers=1, timeout_s=0.2 if end == "time out" else 60.0, retries=0) as pool:
        data = {"pid": str(tmp_path / "pid"), "how": how, "then": "hang" if end == "time out" else "return"}
        (result,) = score(pool, ["x"], data=data)
        worker, grandchild = map(int, (tmp_path / "pid").read_text().split())
        if end == "time out":
            assert result == "timed out after 2 s (1 attempts)"  # it was the worker's first call
        elif end == "kill the worker":
            os.kill(worker, signal.SIGKILL)
            assert score(pool, ["x"], data={**data, "how": "nothing"}) == [1.0]
        if end != "close":
            assert not Path(f"/proc/{grandchild}").exists()
    assert not Path(f"/proc/{grandchild}").exists()


# -------------------- a driver that never waits


def test_a_worker_that_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_SILENCE_S", 0.1)
    with RewardPool("pool_rewards:length", num_workers=1, timeout_s=0.5, retries=1) as pool:
        (pid,) = score(pool, ["pid"])
        os.kill(int(pid), signal.SIGSTOP)
        start = time.monotonic()
        submit(pool, ["x" * 1_000_000] * 20)  # past what any socket holds
        assert pool.poll() == []
        assert time.monotonic() - start < 0.4  # the call's own limit is not waited for
        assert {e.reward for e in collect(pool, 20).values() if isinstance(e, Scored)} == {1e6}
        assert (pool.counters.num_workers_replaced, pool.counters.num_voids) == (1, 0)


def test_a_first_call_may_take_ten_times_as_long() -> None:
    with RewardPool("pool_rewards:cold", num_workers=1, timeout_s=0.4, retries=0) as pool:
        assert score(pool, ["0.8", "0.8", "0"]) == [1.0, "timed out after 0.4 s (1 attempts)", 1.0]


def test_calls_that_always_hang_are_not_given_ten_times_as_long_for_ever() -> None:
    with RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=0.1, retries=2) as pool:
        (reason,) = score(pool, ["hang"])
        assert reason == "timed out after 0.1 s (3 attempts)"
        assert pool._slow_starts == 3


@pytest.mark.parametrize("timeout_s", [1e10, 1e300])
def test_any_finite_limit_is_one(timeout_s: float) -> None:
    with RewardPool("pool_rewards:tricky", num_workers=1, timeout_s=timeout_s) as pool:
        assert score(pool, ["1"]) == [1.0]
        assert pool.poll(1e300) == []


SCRIPT = """
import os, signal, sys
import numpy as np
from reinforce_ada.rewards import RewardPool
from reinforce_ada.types import Completion, CompletionId, Prompt

def submit(pool, text):
    pool.submit([Prompt("p")], [Completion(CompletionId(0, "p", 0), np.zeros(1), np.zeros(1), text, "stop", 0)])

if __name__ == "__main__":
    pool = RewardPool("pool_rewards:tricky", num_workers=2, timeout_s=60.0)
    submit(pool, "pid")
    print("idle", int(pool.poll(60)[0].reward), flush=True)
    submit(pool, "grandchild then hang in C")
    print("hung", pool._workers[0].process.pid, flush=True)
    sys.stdin.readline()
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def _pids(stdout: IO[str], names: set[str]) -> list[int]:
    """The processes that say "NAME PID", whatever else is said between."""
    said, found = [], dict[str, int]()
    while found.keys() != names:
        said.append(stdout.readline())
        assert said[-1], said  # the parent has ended
        name, _, pid = said[-1].strip().partition(" ")
        if name in names:
            found[name] = int(pid)
    return list(found.values())


@pytest.mark.parametrize(("how", "exit_code"), [("killed", -signal.SIGKILL), ("left open", 0)])
def test_the_end_of_the_parent_ends_the_workers_and_what_they_started(tmp_path: Path, how: str, exit_code: int) -> None:
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(script), how]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as parent:
        assert parent.stdout
        processes = [os.pidfd_open(pid) for pid in set(_pids(parent.stdout, {"idle", "hung", "grandchild"}))]
        parent.communicate("go\n", timeout=LONG_S)
        assert parent.returncode == exit_code
    wait_gone(*processes)
