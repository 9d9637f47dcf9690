"""Callbacks: when they are called, how one ends a run, and that nothing they do loses a step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import evaluations, said, trained
from toy_training import saved_weights, toy_config, toy_trainer

from reinforce_ada import StopTraining
from reinforce_ada.training.callbacks import Callback, TrainerView

STEPS = 4


def play(out: Path, *callbacks: Callback, resume: bool = False, **overrides: Any) -> None:
    trainer = toy_trainer(toy_config(out, steps=STEPS, **overrides), out, resume=resume, callbacks=callbacks)
    try:
        trainer.run()
    finally:
        trainer.parts.store.close()


def stops_at(kind: str, step: int, why: str = "") -> Callback:
    def callback(record: Mapping[str, Any], view: TrainerView) -> None:
        if (record["kind"], record["step"]) == (kind, step):
            raise StopTraining(why)

    return callback


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("callbacks") / "run"
    play(out)
    return out


def check_like(out: Path, other: Path) -> None:
    assert trained(out) == trained(other)
    assert all(torch.equal(tensor, saved_weights(other)[name]) for name, tensor in saved_weights(out).items())


def test_they_are_called_in_order_when_the_log_has_it_and_change_nothing(tmp_path: Path, undisturbed: Path) -> None:
    out, seen = tmp_path / "run", []

    def first(record: dict[str, Any], view: TrainerView) -> None:
        logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert record["kind"] == "end" or logged[-1] == record == view.history[-1]
        assert (view.step, view.out, view.config.training.steps) == (record["step"], out, STEPS)
        assert (out / "model").exists() == (record["kind"] == "end")
        assert sum(p.numel() for p in view.module.parameters()) > 0
        seen.append(("first", record["kind"], record["step"]))
        record.clear()

    def second(record: Mapping[str, Any], view: TrainerView) -> str:
        seen.append(("second", record["kind"], record["step"]))
        return "ignored"

    play(out, first, second)
    calls = [("eval", 0), ("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4), ("end", 4)]
    assert seen == [(name, *call) for call in calls for name in ("first", "second")]
    check_like(out, undisturbed)


@pytest.mark.parametrize(("kind", "step", "evaluated"), [("step", 3, [0, 2, 3]), ("eval", 2, [0, 2]), ("eval", 0, [0])])
def test_one_ends_the_run_in_good_order_and_a_resume_goes_on(
    tmp_path: Path, undisturbed: Path, kind: str, step: int, evaluated: Sequence[int]
) -> None:
    out, ends = tmp_path / "run", []
    play(
        out, stops_at(kind, step, "far\nenough"), lambda record, view: ends.append((record["kind"], record["step"])), checkpoint_every=0
    )  # fmt: skip
    assert f"a callback ends the run after step {step}: far enough" in said(out)
    assert (kind, step) in ends  # the one after it is called all the same
    assert ends[-1] == ("end", step)
    assert list(evaluations(out)) == evaluated
    assert (out / f"checkpoints/step-{step:06d}/state.json").exists() == (step > 0)
    assert (out / "model/model.safetensors").exists()
    play(out, resume=True, checkpoint_every=0)
    check_like(out, undisturbed)
    assert list(evaluations(out)) == sorted({*evaluated, 2, 4})


@pytest.mark.parametrize("step", [1, 3])
def test_an_error_of_a_callback_loses_no_step(tmp_path: Path, undisturbed: Path, step: int) -> None:
    out = tmp_path / "run"

    def fails(record: Mapping[str, Any], view: TrainerView) -> None:
        if (record["kind"], record["step"]) == ("step", step):
            raise KeyError("of the callback")

    with pytest.raises(KeyError, match="of the callback"):
        play(out, fails)
    assert trained(out) == trained(undisturbed)[:step]
    before = (out.with_name("run-submitted.txt")).read_text().splitlines()
    play(out, resume=True)
    check_like(out, undisturbed)
    again = (out.with_name("run-submitted.txt")).read_text().splitlines()[len(before) :]
    assert {line.split()[0] for line in again} & {str(s) for s in range(1, step + 1)} == set()  # nothing is generated twice
