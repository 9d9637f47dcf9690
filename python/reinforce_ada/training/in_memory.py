"""What a Python program gives to a run that no configuration can hold: records, a reward, callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce_ada.config.paths import RECORDS
from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_file
from reinforce_ada.training.callbacks import Callback


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """The parts of a run that come from the program which calls `reinforce_ada.train`."""

    records: str | None = None  # as JSON lines; the task of the configuration is then RECORDS in the run folder
    reward: Any = None  # a picklable callable; the configuration has its name. None: the configuration's own
    callbacks: Sequence[Callback] = ()

    def keep_records(self, out: Path) -> None:
        """Write the records into the run folder, where a resume and an evaluation find them.

        Raises: InputError when the run was begun with other records.
        """
        if self.records is None:
            return
        path = out / RECORDS
        if not path.exists():
            replace_file(path, self.records, where="train")
        elif path.read_bytes() != self.records.encode():
            hint = "give the same records, or begin a new run with another out="
            raise InputError("train", f"the records are not those with which the run began, which are in {path}", "the same records", hint)
