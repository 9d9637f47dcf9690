"""The metrics of a run for TensorBoard (if tensorboardX is installed) and, on request, Weights & Biases, MLflow and trackio."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from reinforce_ada.errors import InputError, needs, not_installed, unknown_name
from reinforce_ada.files import replace_file
from reinforce_ada.outside import GarbageError, is_installed, one_line, parse_json
from reinforce_ada.training.event_file import EventFile

PROJECT = "reinforce-ada"


class Tracker(Protocol):
    """Takes metrics by name and step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the metrics of a step."""

    def close(self) -> None:
        """End the run."""


class Trackers:
    """Passes every record of the log to all trackers. A tracker that fails during the run is reported and dropped.

    Args:
        names: trackers besides TensorBoard, separated by commas.
        config: nested settings of the run, which trackers show.
    Raises: InputError for a name that is not known, not installed, or cannot be used.
    """

    def __init__(self, names: str, out: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._say = say
        wanted = check_names(names)
        self._trackers: dict[str, Tracker] = {name: _begin(name, out, config) for name in wanted}
        self._events = _event_file(out / "tensorboard")
        if self._events is None:
            say(str(not_installed("track", "tensorboardX", "without it there are no TensorBoard files")))

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the numbers of a record of the log."""
        values, step = dict(numbers_of(record)), int(record["step"])
        if self._events is not None:
            self._events.scalars(values, step)
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(values, step)
            except Exception as e:  # for example without a network: hours of sampling must not be lost with it
                del self._trackers[name]
                self._say(f"track: {name} is left out from now on: {_one_line(e)}")

    def cut_after(self, step: int) -> None:
        """Mark the steps after `step` as about to be written again."""
        if self._events is not None:
            self._events.restart(step + 1)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as e:
                self._say(f"track: {name} did not end well: {_one_line(e)}")


def _event_file(folder: Path) -> EventFile | None:
    """Return a new file for TensorBoard; None if tensorboardX is not installed."""
    if not is_installed("tensorboardX"):
        return None
    try:
        return EventFile(folder)
    except OSError as e:
        given = f"cannot write to {folder}: {e.strerror}"
        raise InputError("track", given, "a folder for TensorBoard's files", "move what has that name out of the way") from e


def check_names(names: str) -> list[str]:
    """Return the trackers of a comma-separated list. Raises: InputError for one that is not known or not installed."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in _BEGIN:
            raise unknown_name("track", "tracker", name, _BEGIN)
        needs("track", name, "TensorBoard needs tensorboardX only")
    return wanted


def numbers_of(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and value of every finite number in a record: train/loss, engine/queue, eval/avg_at_k, eval/pass_at_k/4."""
    kind = {"step": "train"}.get(record["kind"], record["kind"])
    for name, value in record.items():
        place = f"engine/{name.removeprefix('engine_')}" if name.startswith("engine_") else f"{kind}/{name}"
        parts = {f"{place}/{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {place: value}
        for tag, number in parts.items():
            if name != "step" and isinstance(number, (int, float)) and math.isfinite(value := _float(number)):
                yield tag, value


def _float(number: float) -> float:
    """Return the number as float64, or an infinity for an integer past it."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _begin(name: str, out: Path, config: Mapping[str, Any]) -> Tracker:
    try:
        return _BEGIN[name](out, config)
    except Exception as e:
        raise InputError("track", f"{name} cannot be used: {_one_line(e)}", "a tracker that is set up", "or leave it out of --track") from e


def _one_line(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}", most=220)


def _identity(out: Path, name: str, make: Callable[[], str]) -> str:
    """Return the id of the run at this tracker, which stays the same when the run is resumed."""
    path = out / "track.json"
    known = _known(out)
    if name not in known:
        known[name] = make()
        replace_file(path, json.dumps(known), where="track")
    return known[name]


def _known(out: Path) -> dict[str, str]:
    """Return the id of the run at each tracker. With a damaged file there are none, so the run is a new one there."""
    try:
        known = parse_json((out / "track.json").read_bytes())
    except (OSError, GarbageError):
        return {}
    return {name: text for name, text in known.items() if isinstance(text, str)} if isinstance(known, dict) else {}


class _Wandb:
    """Weights & Biases. Steps repeated after a crash become further points at the same place: the run's own step is the axis."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import wandb

        identity = _identity(out, "wandb", lambda: uuid.uuid4().hex)
        self._run = wandb.init(project=PROJECT, name=out.name, id=identity, resume="allow", dir=str(out), config=dict(config))
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        self._client = mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        is_new = "mlflow" not in _known(out)
        self._run_id = _identity(out, "mlflow", lambda: str(self._client.create_run(number, run_name=out.name).info.run_id))
        for section, values in config.items() if is_new else ():
            for key, value in values.items():
                self._client.log_param(self._run_id, f"{section}.{key}", value)
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _Trackio:
    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import trackio

        name = _identity(out, "trackio", lambda: f"{out.name}-{uuid.uuid4().hex[:6]}")
        self._run = trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_BEGIN: Mapping[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}
