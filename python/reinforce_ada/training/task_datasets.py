"""Datasets of the library `datasets`: a folder that it saved, or one of the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reinforce_ada.config import SAVED_DATASET
from reinforce_ada.errors import InputError, needs
from reinforce_ada.outside import one_line

TRAIN = "train"  # the part that is read where none is named


def read_folder(path: Path, split: str, kinds: str) -> Sequence[Any]:
    """Return the rows of a folder that `datasets` saved: those of its part `split` if it has parts, `train` by default.

    Raises: InputError for any other folder (`kinds` says what is read), for one that is damaged, and for a part that it does not have.
    """
    if not any((path / name).is_file() for name in SAVED_DATASET):
        raise InputError("task", f"{path} is a folder that `datasets` has not saved", kinds)
    needs("task", "datasets", f"it reads {path}")
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as e:  # the error depends on the damage
        raise InputError("task", f"cannot read {path}: {one_line(str(e), 200)}", "a folder that `datasets` saved") from e
    if not isinstance(found, dict):
        no_parts(path, split)
        return list(found)
    if (split or TRAIN) not in found:
        flags = "--split and --eval-split name the parts to train on and to hold out"
        raise InputError("task", f"{path} has no part {split or TRAIN!r}", f"one of its parts: {', '.join(found)}", flags)
    return list(found[split or TRAIN])


def no_parts(path: Path, split: str) -> None:
    """Raise InputError if a part is named of something that has none."""
    if split:
        raise InputError("task", f"part {split!r} of {path}, which has no parts", "a dataset with parts", "--eval-task names another file")


def read_hub(task: str, split: str) -> Sequence[Any]:
    """Return the rows of a dataset of the hub, "org/name" or "org/name:config", or of its copy in the local cache.

    Code that comes with a dataset is never run.

    Args:
        split: its part, also a slice such as "train[:1000]"; "": `train`.
    Raises: InputError in one line for whatever `datasets` raises: no such dataset, configuration or part, no network.
    """
    needs("task", "datasets", f"it reads {task}")
    import datasets

    name, _, config = task.partition(":")
    try:
        return list(datasets.load_dataset(name, config or None, split=split or TRAIN))
    except Exception as e:  # the network, the hub, and files of others
        given = f"cannot load {task}, part {split or TRAIN!r}: {one_line(str(e) or type(e).__name__, 300)}"
        hint = f"no file or folder {name} is here either" if not os.path.lexists(name) else ""
        raise InputError("task", given, "a dataset of the Hugging Face hub, as org/name or org/name:config", hint) from e
