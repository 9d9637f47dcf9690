"""The memory of a run in verl: the manager keeps it, prompts carry their own histories to the workers, and a file survives a restart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_file
from reinforce_ada.integrations.verl.settings import WHERE
from reinforce_ada.outside import GarbageError, one_line, parse_json
from reinforce_ada.sampling import History, Memory
from reinforce_ada.types import Prompt


class Seen(NamedTuple):
    """The outcome of one prompt in one step."""

    step: int
    key: str
    num_correct: int
    num_wrong: int


class Given:
    """The memory of a worker: the one history that came with the prompt."""

    def __init__(self, history: Iterable[Any]) -> None:
        self._history = History(*history)

    def history(self, prompt: Prompt, /) -> History:
        return self._history


def key_of_chat(raw_prompt: Any) -> str:
    """Return the key of a prompt: a hash of its messages, so that it is the same in every epoch and every run.

    Raises: InputError for messages with anything but text, numbers, bytes, images and arrays.
    """
    messages = raw_prompt.tolist() if hasattr(raw_prompt, "tolist") else raw_prompt
    try:
        text = json.dumps(messages, sort_keys=True, default=_digest)
    except TypeError as error:
        given = f"a message that cannot be remembered: {one_line(str(error))}"
        raise InputError(WHERE, given, "text, numbers, images or arrays are needed") from error
    return blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def _digest(value: Any) -> str:
    """Return a digest of the content of an image, an array or bytes. Raises: TypeError for anything else."""
    content = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else None
    if content is None:
        raise TypeError(f"a {type(value).__name__}")
    return blake2b(content, digest_size=16).hexdigest()


class RunMemory:
    """A `Memory` with a file of what went into it, one line for each pool.

    Args:
        path: the file; it is read at the first step, so that a run that resumes at step t remembers the steps before t.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._memory = Memory()
        self._is_open = False

    def open(self, step: int) -> None:
        """Read the pools of the steps before this one, at the first call; what the file has of later ones was not trained on."""
        if self._is_open:
            return
        self._is_open = True
        rows = sorted((row for row in self._read() if row.step < step), key=lambda row: row.step)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._path, "".join(map(_line, rows)), where=WHERE)
        self._add(rows)

    def add(self, seen: Iterable[Seen]) -> None:
        """Remember these pools; those of an earlier step that come late count as of the latest one."""
        rows = sorted(seen, key=lambda row: row.step)
        with self._path.open("a") as file:
            file.writelines(map(_line, rows))
        self._add(rows)

    def history(self, key: str) -> History:
        return self._memory.history(Prompt(key))

    def _add(self, rows: Iterable[Seen]) -> None:
        for row in rows:
            self._memory.add(max(row.step, self._memory.step or row.step), row.key, row.num_correct, row.num_wrong)

    def _read(self) -> list[Seen]:
        lines = self._path.read_text(errors="replace").splitlines() if self._path.is_file() else []
        return [row for line in lines if (row := _seen(line)) is not None]


def _line(seen: Seen) -> str:
    return json.dumps(list(seen)) + "\n"


def _seen(line: str) -> Seen | None:
    """Return the pool of a line; None for one that a killed process left unfinished."""
    try:
        step, key, correct, wrong = parse_json(line)
        seen = Seen(int(step), str(key), int(correct), int(wrong))
    except (GarbageError, ValueError, TypeError, OverflowError):
        return None
    return seen if min(seen.num_correct, seen.num_wrong) >= 0 else None
