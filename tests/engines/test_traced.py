"""Traces of literal scenes: where every request was, when, and how it ended; what a killed run leaves."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reinforce_ada
from reinforce_ada.driver import run
from reinforce_ada.engines.fleet import Down, Fleet, Loaded, News, Up
from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.engines.traced import Trace, TracedEngine
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import Completion, CompletionId, Prompt, Request


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def request(prompt: str, index: int) -> Request:
    return Request(CompletionId(3, prompt, index), Prompt(prompt, (5,)), 7, 2)


def events(path: Path) -> list[dict[str, Any]]:
    """As the viewers read it: a closing bracket may be missing."""
    text = path.read_text()
    found: list[dict[str, Any]] = json.loads(text if text.rstrip().endswith("]") else text + "]")
    return found


def rows(path: Path, *fields: str) -> list[tuple[Any, ...]]:
    """(process, thread, name, begin ms, length ms, fields ..) of everything that lasted."""
    names = {e["pid"]: e["args"]["name"] for e in events(path) if e["name"] == "process_name"}
    return [
        (names[e["pid"]], e["tid"], e["name"], e["ts"] / 1e3, e["dur"] / 1e3, *(e["args"].get(f) for f in fields))
        for e in events(path)
        if e["ph"] == "X"
    ]


def test_requests_of_one_engine_in_their_slots(tmp_path: Path) -> None:
    clock = Clock()
    trace = Trace(tmp_path / "traces" / "t.json", clock)
    engine = TracedEngine(ScriptedEngine({"a": "+-", "b": "+"}, slots=3, num_per_poll=1), trace)
    with trace.span("step 3 sampling"):
        clock.now += 0.001
        engine.sync_weights([], 2)
        clock.now += 0.001
        engine.submit([request("a", 0), request("a", 1)])
        clock.now += 0.004
        assert [c.id.index for c in engine.poll()] == [0]
        assert engine.free_slots == 2
        engine.submit([request("b", 0)])  # in the slot that is free
        clock.now += 0.002
        engine.abort([CompletionId(3, "a", 1), CompletionId(3, "unknown", 0)])
        assert [c.id.prompt_id for c in engine.poll()] == ["b"]
    trace.close()
    assert rows(trace.path, "prompt", "index", "step", "tokens", "version", "wait_ms", "end") == [
        ("run", 0, "sync weights", 1.0, 0.0, None, None, None, None, 2, None, None),
        ("engine", 0, "a/0", 2.0, 4.0, "a", 0, 3, 1, 2, 0.0, "stop"),
        ("engine", 1, "a/1", 2.0, 6.0, "a", 1, 3, None, None, 0.0, "aborted"),
        ("engine", 0, "b/0", 6.0, 2.0, "b", 0, 3, 1, 2, 0.0, "stop"),
        ("run", 0, "step 3 sampling", 0.0, 8.0, None, None, None, None, None, None, None),
    ]
    counts = [(e["ts"] / 1e3, e["args"]["running"], e["args"]["waiting"]) for e in events(trace.path) if e["ph"] == "C"]
    assert counts == [(2.0, 2, 0), (6.0, 1, 0), (6.0, 2, 0), (8.0, 1, 0), (8.0, 0, 0)]
    threads = [e["args"]["name"] for e in events(trace.path) if e["name"] == "thread_name"]
    assert threads == ["steps", "slot 0", "slot 1"]


class OneByOne:
    """A replica that answers when it is told to."""

    def __init__(self, name: str) -> None:
        self.name, self.num_slots = name, 1
        self.given: list[Request] = []
        self.tell: Callable[[News], None]

    def start(self, tell: Callable[[News], None]) -> None:
        self.tell = tell
        tell(Up())

    def load(self, weights: Any, policy_version: int) -> None:
        self.tell(Loaded(policy_version))

    def submit(self, requests: Sequence[Request]) -> None:
        self.given += requests

    def answer(self) -> None:
        (r,) = self.given
        self.given = []
        self.tell(Completion(r.id, np.array([4, 5]), np.zeros(2), "", "stop", r.policy_version))

    def abort(self, ids: Sequence[CompletionId]) -> None: ...

    def close(self) -> None: ...


def publish(tensors: Iterable[tuple[str, Any]], policy_version: int) -> None: ...


def test_requests_of_replicas_wait_and_move(tmp_path: Path) -> None:
    clock = Clock()
    trace = Trace(tmp_path / "t.json", clock)
    left, right = OneByOne("left"), OneByOne("right")
    fleet = Fleet([left, right], publish, max_tokens=9, vocab_size=1 << 20, clock=clock, wait_s=0.0)
    engine = TracedEngine(fleet, trace)
    engine.sync_weights([], 2)
    engine.submit([request("a", k) for k in range(3)])  # the third waits
    clock.now += 0.010
    left.answer()
    engine.poll()  # ... and goes to the left
    clock.now += 0.005
    left.tell(Down("killed"))
    engine.poll()
    clock.now += 0.005
    right.answer()
    engine.poll()  # it moves to the right
    clock.now += 0.030
    right.answer()
    engine.poll()
    trace.close()
    assert rows(trace.path, "index", "wait_ms", "end")[1:] == [
        ("left", 0, "a/0", 0.0, 10.0, 0, 0.0, "stop"),
        ("right", 0, "a/1", 0.0, 20.0, 1, 0.0, "stop"),
        ("left", 0, "a/2", 10.0, 10.0, 2, 10.0, "moved"),
        ("right", 0, "a/2", 20.0, 30.0, 2, 20.0, "stop"),
    ]
    counts = [(e["args"]["running"], e["args"]["waiting"]) for e in events(trace.path) if e["ph"] == "C"]
    assert counts == [(2, 1), (2, 0), (1, 0), (0, 0)]


def test_no_two_requests_share_a_slot_and_the_engine_behaves_as_itself(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", (5,)) for i in range(12)]
    script = {f"p{i}": "+-"[: 1 + i % 2] + "-+-" for i in range(12)}

    def result(wrap: Callable[[Any], Any]) -> list[list[tuple[Any, ...]]]:
        engine = wrap(ScriptedEngine(script, slots=5, num_per_poll=2, shuffle_seed=1))
        sampler = AdaptiveSampler(prompts, preset("reinforce-ada-balance"), schedule="stream")
        pools = run(sampler, engine, lambda prompt, text: float(text == "+")).pools
        return [[(o.id, o.reward) for o in pool.scored] for pool in pools]

    trace = Trace(tmp_path / "t.json")
    assert result(lambda engine: TracedEngine(engine, trace)) == result(lambda engine: engine)
    trace.close()
    found = [e for e in events(trace.path) if e["ph"] == "X"]
    assert len(found) > 50
    assert {e["tid"] for e in found} == set(range(5))
    for slot in range(5):
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in found if e["tid"] == slot)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


def test_what_the_engine_says_of_itself_passes(tmp_path: Path) -> None:
    engine = ScriptedEngine({"a": "+"})
    trace = Trace(tmp_path / "t.json")
    assert TracedEngine(engine, trace).metrics() == {}
    engine.metrics = lambda: {"engine_tokens": 3.0}  # type: ignore[method-assign]
    assert TracedEngine(engine, trace).metrics() == {"engine_tokens": 3.0}
    trace.close()


def test_a_second_trace_leaves_the_first(tmp_path: Path) -> None:
    for name in ("t.json", "t-2.json", "t-3.json"):
        trace = Trace(tmp_path / "t.json")
        trace.close()
        assert trace.path == tmp_path / name
        assert [e["args"]["name"] for e in events(trace.path)] == ["run"]


KILLED = """
import itertools, os, sys
from pathlib import Path
from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.engines.traced import Trace, TracedEngine
from reinforce_ada.types import CompletionId, Prompt, Request

engine = TracedEngine(ScriptedEngine({"a": "+-"}, num_per_poll=1), Trace(Path(sys.argv[1])))
for i in itertools.count():
    engine.submit([Request(CompletionId(0, "a", i), Prompt("a", (5,)), 0, 0)])
    engine.poll()
    if i == 500:
        print("500", flush=True)
"""


def test_a_killed_run_leaves_a_readable_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    environment = {**os.environ, "PYTHONPATH": str(Path(reinforce_ada.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"500\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    process.stdout.close()
    with pytest.raises(json.JSONDecodeError):
        json.loads(path.read_text())  # it was cut, and is read all the same
    assert [row[2] for row in rows(path)][:501] == [f"a/{i}" for i in range(501)]
