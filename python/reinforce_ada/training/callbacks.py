"""Functions of a program that are called as a run goes on. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from reinforce_ada.config import Config
from reinforce_ada.outside import one_line


class StopTraining(Exception):  # noqa: N818 - an end, not a mistake
    """A callback raises it to end the run after the current step, with a checkpoint, an evaluation and the model; `str()` says why."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainerView:
    """The trainer as a callback sees it. What it shows is live and is to be read only: a change would change the run."""

    step: int  # finished steps
    out: Path  # the run's folder
    config: Config
    history: Sequence[Mapping[str, Any]]  # every record of log.jsonl so far
    module: Any  # the torch module that is trained


Callback: TypeAlias = Callable[[Mapping[str, Any], TrainerView], object]


class Callbacks:
    """Calls every function in order, and remembers whether one of them has ended the run."""

    def __init__(self, functions: Sequence[Callback], say: Callable[[str], None]) -> None:
        self._functions, self._say = functions, say
        self.has_stopped = False

    def call(self, record: Mapping[str, Any], view: TrainerView) -> None:
        """Pass a copy of the record to each function, also after one has stopped the run. Raises: any other exception of a function."""
        for function in self._functions:
            try:
                function(dict(record), view)
            except StopTraining as stop:
                self.has_stopped = True
                why = f": {one_line(str(stop))}" if str(stop) else ""
                self._say(f"a callback ends the run after step {view.step}{why}")
