"""What a step's log says of the engine: differences of counts, means of loads over time, and the same live."""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_training import ToyEngine, toy_config, toy_trainer

from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.training.display import load_text
from reinforce_ada.training.log import read_log
from reinforce_ada.training.meter import EngineMeter


class Counted(ScriptedEngine):
    """Says what it is told to say."""

    def __init__(self) -> None:
        super().__init__({"a": "+"})
        self.now = 100.0
        self.numbers: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        return dict(self.numbers)

    def tell(self, now: float, busy: float, tokens: float, **more: float) -> None:
        self.now = now
        self.numbers = {"engine_busy_slots": busy, "engine_queue": 2 * busy, "engine_tokens": tokens, "engine_hit_rate": 0.5, **more}


def test_counts_are_differences_and_loads_are_means_over_time() -> None:
    engine = Counted()
    engine.tell(100.0, busy=0, tokens=1000)
    meter = EngineMeter(engine, lambda: engine.now)
    engine.tell(110.0, busy=0, tokens=1000)
    meter.start()
    engine.tell(111.0, busy=8, tokens=1100)  # 1 s of 4 on average
    assert meter.look()["engine_busy_slots"] == 8
    engine.tell(114.0, busy=8, tokens=1400)  # 3 s of 8
    meter.look()
    engine.tell(114.01, busy=100, tokens=1400)
    assert meter.look()["engine_busy_slots"] == 8  # too soon to look again
    engine.tell(116.0, busy=0, tokens=1500, engine_restarts=1, engine_hit_rate=0.7)  # 2 s of 4
    assert meter.step() == {
        "engine_busy_slots": 6.0,
        "engine_queue": 12.0,
        "engine_tokens": 500,
        "engine_restarts": 1,
        "engine_hit_rate": 0.7,
    }
    meter.start()
    engine.tell(118.0, busy=0, tokens=1600, engine_restarts=1)
    found = meter.step()
    assert (found["engine_tokens"], found["engine_restarts"], found["engine_busy_slots"]) == (100, 0, 0)


def test_an_engine_that_says_nothing_has_no_numbers() -> None:
    meter = EngineMeter(ScriptedEngine({"a": "+"}))
    assert (meter.look(), meter.step()) == ({}, {})


def test_the_log_of_a_step_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def metrics(engine: ToyEngine) -> dict[str, float]:
        return {"engine_busy_slots": len(engine._running), "engine_polls": engine.__dict__.get("polls", 0)}

    def poll(engine: ToyEngine) -> list:
        engine.polls = engine.__dict__.get("polls", 0) + 1
        return original(engine)

    original = ToyEngine.poll
    monkeypatch.setattr(ToyEngine, "poll", poll)
    monkeypatch.setattr(ToyEngine, "metrics", metrics, raising=False)
    trainer = toy_trainer(toy_config(tmp_path / "run", steps=3, eval_prompts=0), tmp_path / "run", resume=False)
    trainer.run()
    steps = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["kind"] == "step"]
    # Two completions a poll, eight in flight: the third step's polls are its own, and no evaluation's.
    assert [r["engine_polls"] >= r["num_completions_committed"] / 2 for r in steps] == [True] * 3
    assert sum(r["engine_polls"] for r in steps) < trainer.parts.engine.polls
    assert all(0 <= r["engine_busy_slots"] <= 8 for r in steps)
    assert all(0 < r["sync_s"] < r["sampling_s"] for r in steps)
    assert " busy · sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ({}, ""),
        ({"engine_busy_slots": 61.4}, "61 busy · "),
        ({"engine_busy_slots": 0.0, "engine_queue": 0.0, "engine_restarts": 0.0}, "0 busy · "),
        (
            {"engine_busy_slots": 3.0, "engine_queue": 5.0, "engine_restarts": 2.0, "engine_prefix_hit_rate": 0.5},
            "3 busy · 5 queued · 0.50 prefix hits · 2 restarts · ",
        ),
    ],
)
def test_what_is_shown(metrics: dict[str, float], text: str) -> None:
    assert load_text(metrics) == text
