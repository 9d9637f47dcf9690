"""Checkpoints written aside, synced and renamed: whatever is found under its final name is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from reinforce_ada.files import clear_leftovers, remove_folder, replace_folder


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

    write_folder(final, write)
    for old in _finished(root)[:-keep]:
        remove_folder(old.folder)
    return Checkpoint(final, step, position)


def latest(root: Path) -> Checkpoint | None:
    """The newest whole checkpoint under `root`, if any; left-overs of a killed write are removed."""
    clear_leftovers(root)
    found = _finished(root)
    return found[-1] if found else None


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder of the run as a whole. Raises: InputError when the disk is full or the folder not writable."""
    from safetensors import SafetensorError

    def written(aside: Path) -> None:
        try:
            write(aside)
        except SafetensorError as e:
            raise OSError(str(e)) from e

    replace_folder(final, written, where="checkpoint", hint="then resume the run")


def _finished(root: Path) -> list[Checkpoint]:
    found = []
    for folder in sorted(root.glob("step-*")) if root.is_dir() else []:
        if re.fullmatch(r"step-\d{6,}", folder.name):
            state = json.loads((folder / "state.json").read_text())
            found.append(Checkpoint(folder, state["step"], state["position"]))
    return sorted(found, key=lambda c: c.step)
