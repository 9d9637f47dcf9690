"""The run's log: one JSON object per line, cut back when a run resumes from an earlier step. A damaged line costs that line only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_file
from reinforce_ada.outside import GarbageError, finite, parse_json
from reinforce_ada.training.track import Trackers


class RunLog:
    """Appends records to `log.jsonl`, keeps them in memory, and passes those of steps and evaluations to `trackers`.

    Raises: InputError when there is a log that cannot be read or written.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None) -> None:
        self._path, self._trackers = path, trackers
        self.records, self._num_damaged = _read(path)
        if self._num_damaged:
            self._rewrite()  # otherwise a record cut short by a killed process would swallow the next one

    @property
    def run_id(self) -> str:
        """Return the id of the run; "" if the log does not have it."""
        return next((str(r["run_id"]) for r in self.records if r["kind"] == "run" and "run_id" in r), "")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Raises: InputError when it cannot be written."""
        clean = {k: finite(v) for k, v in record.items()}
        self.records.append(clean)
        try:
            with self._path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(clean) + "\n")
        except OSError as e:
            raise InputError("log", f"cannot write {self._path}: {e.strerror}", "a writable folder with space", "then resume") from e
        if self._trackers is not None and "step" in clean:
            self._trackers.log(clean)

    def resume(self, step: int, journaled: int) -> list[str]:
        """Forget what was logged after `step`: those steps are trained again, and will be logged again.

        Args:
            journaled: the last step with anything in the journal.
        Returns: lines for the user about damage and missing steps.
        """
        steps = {r["step"] for r in self.records if r["kind"] == "step"}
        said = []
        if self._num_damaged > 1:  # a kill leaves a single one
            said.append(f"{self._path.name}: {self._num_damaged} damaged lines are left out")
        if missing := [str(s) for s in range(1, step + 1) if s not in steps]:
            said.append(f"{self._path.name} lacks {len(missing)} of the steps up to {step}, such as step {missing[0]}")
        if max(steps, default=0) > max(step, journaled):
            said.append(f"{self._path.name} has step {max(steps)}, which the journal has lost: what is missing there is sampled again")
        self.records = [r for r in self.records if r.get("step", 0) <= step]
        self._rewrite()
        if self._trackers is not None:
            self._trackers.cut_after(step)
        return said

    def _rewrite(self) -> None:
        text = "".join(json.dumps(r) + "\n" for r in self.records)
        replace_file(self._path, text, where="log", hint="then resume")

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """Return the evaluation logged at `step`, if any."""
        return next((r for r in self.records if r["kind"] == "eval" and r["step"] == step), None)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log without damaged lines, such as the last one of a killed process; nothing if there is no log.

    A record has a kind. Those of kind "step" and "eval" have a step, those of kind "eval" k; any other value of these and of kind "run" has
    the right type or is null.

    Raises: InputError when the log cannot be read.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records, and the number of damaged lines."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as e:
        raise InputError("log", f"cannot read {path}: {e.strerror}", "the log of a run, in a readable file") from e
    records = [_record(line) for line in lines if line]
    whole = [r for r in records if r is not None]
    return whole, len(records) - len(whole) + bool(rest)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except GarbageError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return None
    needed = _NEEDED.get(value["kind"], {})
    return value if all(is_right(value.get(key)) for key, is_right in needed.items()) else None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < 2**1000)


def _are_tables(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(section, dict) for section in value.values()))


def _are_shares(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_number, value)))


def _are_shares_by_k(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(re.fullmatch("[0-9]{1,9}", k) and _is_number(v) for k, v in value.items())


_NEEDED: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "run": {"config": _are_tables, "cap": lambda value: value is None or _is_step(value)},
    "step": {"step": _is_step},
    "eval": {
        "step": _is_step, "k": _is_step, "avg_at_k": _is_number, "stderr": _is_number, "pass_at_k": _are_shares_by_k,
        "per_prompt": _are_shares,
    },
}  # fmt: skip
