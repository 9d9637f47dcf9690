"""Checkpoints: a folder gets its final name only when it is complete, and is checked in full before a run continues from it."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforce_ada.files import clear_leftovers, remove_folder, replace_folder
from reinforce_ada.outside import GarbageError, parse_json

if TYPE_CHECKING:
    from torch import Tensor

_KEEP = 2  # if the newest is damaged, the one before costs minutes, not the whole run
_SET_ASIDE = "set-aside-"
_PIECE = 1 << 24  # bytes


class UnusableError(ValueError):
    """A run cannot continue from this checkpoint; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint: `model/` loads in transformers and vLLM, the rest resumes the trainer."""

    folder: Path
    step: int
    position: int  # of the prompt stream
    run: str  # the id of its run; "" if an earlier version wrote it
    tensors: Mapping[str, Tensor]  # masters, moments and random state


def save(root: Path, step: int, position: int, save_model: Callable[[Path], None], tensors: Mapping[str, Tensor], *, run: str = "") -> None:
    """Write `root/step-NNNNNN`, then remove all but the newest two, and any that was set aside.

    Raises: InputError when the disk is full or the folder not writable; earlier checkpoints then stay untouched.
    """
    from safetensors.torch import save_file

    final = root / f"step-{step:06d}"

    def write(aside: Path) -> None:
        save_model(aside / "model")
        file = aside / "trainer.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)
        state = {"step": step, "position": position, "run": run, "trainer_crc32": _checksum(file)}
        (aside / "state.json").write_text(json.dumps({**state, "crc32": _checksum_of(state)}))

    write_folder(final, write)
    for old in [*folders(root)[_KEEP:], *root.glob(f"{_SET_ASIDE}*")]:
        remove_folder(old)


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder of the run as a whole. Raises: InputError when the disk is full or the folder not writable."""
    from safetensors import SafetensorError

    replace_folder(final, write, where="checkpoint", hint="then resume the run", failures=(SafetensorError,))


def folders(root: Path) -> list[Path]:
    """Return the folders under `root` with the name of a checkpoint, the newest first. Remove left-overs of a killed write."""
    clear_leftovers(root)
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def read(folder: Path) -> Checkpoint:
    """Read the whole checkpoint in `folder`. Raises: UnusableError if it is not complete."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "trainer.safetensors"
    if missing := [f.name for f in (folder / "state.json", file) if not f.is_file()]:
        raise UnusableError(f"{missing[0]} is not there")
    try:
        state = _state(folder)
        if state["trainer_crc32"] not in (None, _checksum(file)):
            raise UnusableError(f"{file.name} is not what was written")
        tensors = load_file(file)
    except OSError as e:
        raise UnusableError(f"{Path(e.filename or folder).name}: {e.strerror or e}") from e
    except SafetensorError as e:
        raise UnusableError(f"{file.name}: {e}") from e
    return Checkpoint(folder, state["step"], state["position"], state["run"], tensors)


def set_aside(folder: Path) -> None:
    """Rename an unusable checkpoint, in place of one set aside before. The next checkpoint that is written removes it."""
    target = folder.with_name(f"{_SET_ASIDE}{folder.name}")
    if target.exists():
        remove_folder(target)
    folder.rename(target)


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = parse_json((folder / "state.json").read_bytes())
    except GarbageError as e:
        raise UnusableError(f"state.json: {e}") from e
    if not isinstance(state, dict):
        raise UnusableError("state.json: no JSON object")
    numbers = [state.get(name) for name in ("step", "position")]
    if not all(type(n) is int and n >= 0 for n in numbers):
        raise UnusableError("state.json: no step and position")
    checksum = state.pop("crc32", None)  # absent in checkpoints of earlier versions
    if checksum is not None and checksum != _checksum_of(state):
        raise UnusableError("state.json is not what was written")
    if state["step"] != step_of(folder):
        raise UnusableError(f"state.json is of step {state['step']}")
    return {"run": "", "trainer_crc32": None, **state}


def _checksum_of(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as f:
        while piece := f.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value
