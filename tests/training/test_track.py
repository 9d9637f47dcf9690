"""Event files as TensorBoard reads them, and trackers that are asked for, missing, or fail."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reinforce_ada.errors import InputError
from reinforce_ada.training import track
from reinforce_ada.training.event_file import EventFile
from reinforce_ada.training.log import RunLog, read_log
from reinforce_ada.training.track import Trackers, check_names, numbers_of


def events_of(folder: Path) -> Iterator[Any]:
    """The events of the only file in the folder, from its frames: length, checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.iterdir()
    data = path.read_bytes()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert len(data) >= size + 16
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def scalars_of(event: Any) -> dict[str, float]:
    return {value.tag: value.simple_value for value in event.summary.value}


def test_what_tensorboard_reads(tmp_path: Path) -> None:
    events = EventFile(tmp_path / "tensorboard")
    events.scalars({"train/loss": 0.25, "ü": -2.0}, 300)
    events.restart(2)
    version, numbers, start = events_of(tmp_path / "tensorboard")  # before it is closed: a killed run has it all
    assert version.file_version == "brain.Event:2"
    assert (numbers.step, scalars_of(numbers)) == (300, {"train/loss": 0.25, "ü": -2.0})
    assert (start.step, start.session_log.status) == (2, start.session_log.START)
    events.close()


def test_two_files_of_one_second_are_two(tmp_path: Path) -> None:
    for _ in range(3):
        EventFile(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 3


def test_without_the_package_a_run_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    trackers = Trackers("", tmp_path, {}, said.append)
    trackers.log({"kind": "step", "step": 1, "loss": 0.5})
    trackers.cut_after(0)
    trackers.close()
    assert said == ['track: tensorboardX is not installed; pip install "reinforce-ada[report]"; without it there are no TensorBoard files']
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (1e39, 3.4028234663852886e38), (-1e308, -3.4028234663852886e38), (10**400, 3.4028234663852886e38), (1e-60, 0.0), (-0.0, -0.0),
        (math.inf, math.inf), (2**31, 2.0**31), (True, 1.0),
    ],
)  # fmt: skip
def test_numbers_past_float32_are_written_as_the_largest(tmp_path: Path, given: float, written: float) -> None:
    events = EventFile(tmp_path)
    events.scalars({"train/\ud800reward": given}, 2**63 - 1)
    events.restart(-1)
    events.close()
    _, event, _ = events_of(tmp_path)
    ((tag, number),) = scalars_of(event).items()
    assert number == pytest.approx(written, rel=1e-7)
    assert math.copysign(1, number) == math.copysign(1, written)
    assert tag.startswith("train/")


def test_an_integer_past_float64_is_no_finite_number() -> None:
    assert dict(numbers_of({"kind": "step", "step": 1, "huge": 10**400, "loss": 1e39, "flag": True})) == {
        "train/loss": 1e39,
        "train/flag": 1.0,
    }


def test_numbers_have_their_places() -> None:
    step = {"kind": "step", "step": 3, "loss": 0.5, "num_lost": 2, "engine_queue": 1.0, "engine_restarts": 4, "bad": None, "nan": math.nan}
    assert dict(numbers_of(step)) == {"train/loss": 0.5, "train/num_lost": 2.0, "engine/queue": 1.0, "engine/restarts": 4.0}
    evaluation = {"kind": "eval", "step": 3, "avg_at_k": 0.25, "pass_at_k": {"1": 0.25, "4": 1.0}, "per_prompt": [1.0]}
    assert dict(numbers_of(evaluation)) == {"eval/avg_at_k": 0.25, "eval/pass_at_k/1": 0.25, "eval/pass_at_k/4": 1.0}


class Remembering:
    """A tracker that fails at a chosen step."""

    def __init__(self, fails_at: int) -> None:
        self._fails_at = fails_at
        self.seen: list[tuple[int, Mapping[str, float]]] = []
        self.closed = 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step == self._fails_at:
            raise ConnectionError("the network\nis gone")
        self.seen.append((step, values))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Trackers, Remembering, list[str]]]:
    def make(fails_at: int = -1) -> tuple[Trackers, Remembering, list[str]]:
        tracker, said = Remembering(fails_at), []
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
        monkeypatch.setattr(track, "_BEGIN", {"wandb": lambda out, config: tracker})
        return Trackers("wandb", tmp_path, {}, said.append), tracker, said

    return make


def test_the_log_goes_everywhere(make: Callable[..., Any], tmp_path: Path) -> None:
    trackers, tracker, said = make()
    log = RunLog(tmp_path / "log.jsonl", trackers)
    records = [
        {"kind": "run"},
        {"kind": "eval", "step": 0, "k": 2, "avg_at_k": 0.5},
        {"kind": "step", "step": 1, "loss": math.nan, "grad": 2.0},
    ]
    for record in records:
        log.write(record)
    log.resume(0, 0)
    trackers.close()
    assert [r["kind"] for r in read_log(tmp_path / "log.jsonl")] == ["run", "eval"]
    assert tracker.seen == [(0, {"eval/k": 2.0, "eval/avg_at_k": 0.5}), (1, {"train/grad": 2.0})]
    assert (tracker.closed, said) == (1, [])
    _, zero, one, start = events_of(tmp_path / "tensorboard")
    assert (zero.step, scalars_of(zero)) == (0, {"eval/k": 2.0, "eval/avg_at_k": 0.5})
    assert (one.step, scalars_of(one)) == (1, {"train/grad": 2.0})
    assert (start.step, start.session_log.status) == (1, start.session_log.START)


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(make: Callable[..., Any]) -> None:
    trackers, tracker, said = make(fails_at=2)
    for step in (1, 2, 3):
        trackers.log({"kind": "step", "step": step, "loss": 0.5})
    trackers.close()
    assert [step for step, _ in tracker.seen] == [1]
    assert said == ["track: wandb is left out from now on: ConnectionError: the network is gone"]


def test_a_tracker_that_cannot_begin_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_key(out: Path, config: Mapping[str, Any]) -> Any:
        raise RuntimeError("api_key not configured (no-tty)\ncall wandb.login")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    monkeypatch.setattr(track, "_BEGIN", {"wandb": no_key})
    message = (
        r"^track: wandb cannot be used: RuntimeError: api_key not configured \(no-tty\) call wandb.login; a tracker that is set up; or"
    )
    with pytest.raises(InputError, match=message):
        Trackers("wandb", tmp_path, {}, print)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_names("") == []
    with pytest.raises(InputError, match=r"^track: unknown tracker 'wanbd'; known: mlflow, trackio, wandb; did you mean 'wandb'\?$"):
        check_names("wanbd")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^track: mlflow is not installed; pip install mlflow; TensorBoard needs tensorboardX only$"):
        check_names(" mlflow, ")


@pytest.mark.parametrize("name", sorted(track._BEGIN))
def test_the_real_ones_take_a_run_and_go_on_with_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for variable, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(variable, value)
    said: list[str] = []
    names = []
    for _ in range(2):
        trackers = Trackers(name, tmp_path, {"run": {"seed": 0}, "training": {"steps": 3}}, said.append)
        trackers.log({"kind": "step", "step": 1, "loss": 0.5})
        trackers.close()
        names.append(json.loads((tmp_path / "track.json").read_text())[name])
    assert said == []
    assert names[0] == names[1]
    if name == "mlflow":
        import mlflow

        assert [(m.step, m.value) for m in mlflow.MlflowClient().get_metric_history(names[0], "train/loss")] == [(1, 0.5), (1, 0.5)]
