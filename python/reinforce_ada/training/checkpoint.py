"""Checkpoints written aside, synced and renamed: whatever is found under its final name is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from reinforce_ada.errors import InputError


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint: `model/` loads in transformers and vLLM, the rest resumes the trainer."""

    folder: Path
    step: int
    position: int  # of the prompt stream

    def tensors(self) -> dict[str, Tensor]:
        """Masters, moments and random state."""
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = load_file(self.folder / "trainer.safetensors")
        return tensors


def save(
    root: Path, step: int, position: int, save_model: Callable[[Path], None], tensors: Mapping[str, Tensor], *, keep: int = 1
) -> Checkpoint:
    """Write `root/step-NNNNNN`, then remove all but the newest `keep`.

    Raises: InputError when the disk is full or the folder not writable; earlier checkpoints are untouched then.
    """
    from safetensors.torch import save_file

    final = root / f"step-{step:06d}"

    def write(aside: Path) -> None:
        save_model(aside / "model")
        save_file({k: v.contiguous() for k, v in tensors.items()}, aside / "trainer.safetensors")
        (aside / "state.json").write_text(json.dumps({"step": step, "position": position}))

    with_aside(final, write)
    for old in _finished(root)[:-keep]:
        _remove(old.folder)
    return Checkpoint(final, step, position)


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, if any; left-overs of a killed write are removed."""
    if root.is_dir():
        for leftover in root.glob(".aside-*"):
            shutil.rmtree(leftover)
    found = _finished(root)
    return found[-1] if found else None


def with_aside(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `final`, sync every file, and rename it into place (replacing what was there).

    Raises: InputError when the disk is full or the folder not writable; what was there before is untouched then.
    """
    from safetensors import SafetensorError

    aside = final.parent / f".aside-{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        if final.exists():
            _remove(final)
        aside.rename(final)
        _sync(final.parent)
    except BaseException as e:
        shutil.rmtree(aside, ignore_errors=True)  # whatever it was, half a folder would only take up the disk
        if not isinstance(e, (OSError, SafetensorError)):
            raise
        raise InputError("checkpoint", f"cannot write {final}: {e}", "a writable folder with space", "then resume the run") from e


def _remove(folder: Path) -> None:
    """Take the final name away first: a process killed half-way through a removal leaves no half of a checkpoint under it."""
    leftover = folder.parent / f".aside-old-{folder.name}"
    shutil.rmtree(leftover, ignore_errors=True)
    folder.rename(leftover)
    shutil.rmtree(leftover)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finished(root: Path) -> list[Checkpoint]:
    found = []
    for folder in sorted(root.glob("step-*")) if root.is_dir() else []:
        if re.fullmatch(r"step-\d{6,}", folder.name):
            state = json.loads((folder / "state.json").read_text())
            found.append(Checkpoint(folder, state["step"], state["position"]))
    return sorted(found, key=lambda c: c.step)
