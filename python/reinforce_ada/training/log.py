"""The run's log: one JSON object per line, whole lines only, cut back when a run resumes from an earlier step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_file
from reinforce_ada.training.track import Trackers


class RunLog:
    """Appends records to `log.jsonl`, remembers them, and gives those of steps and evaluations to `trackers`."""

    def __init__(self, path: Path, trackers: Trackers | None = None) -> None:
        self._path, self._trackers = path, trackers
        self.records: list[dict[str, Any]] = read_log(path)
        if path.exists() and not path.read_text().endswith("\n"):
            self._rewrite()  # a record cut short by a killed process would swallow the next one

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises: InputError when it cannot be written."""
        clean = {k: _finite(v) for k, v in record.items()}
        self.records.append(clean)
        try:
            with self._path.open("a") as f:
                f.write(json.dumps(clean) + "\n")
        except OSError as e:
            raise InputError("log", f"cannot write {self._path}: {e.strerror}", "a writable folder with space", "then resume") from e
        if self._trackers is not None and "step" in clean:
            self._trackers.log(clean)

    def cut_after(self, step: int) -> None:
        """Forget what was logged after `step`: those steps are trained again, and will be logged again."""
        self.records = [r for r in self.records if r.get("step", 0) <= step]
        self._rewrite()
        if self._trackers is not None:
            self._trackers.cut_after(step)

    def _rewrite(self) -> None:
        text = "".join(json.dumps(r) + "\n" for r in self.records)
        replace_file(self._path, text, where="log", hint="then resume")

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The evaluation logged at `step`, if any."""
        return next((r for r in self.records if r["kind"] == "eval" and r["step"] == step), None)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line cut short by a killed process is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _finite(value: Any) -> Any:
    """JSON has no nan: it becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
