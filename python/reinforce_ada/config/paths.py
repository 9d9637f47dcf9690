"""What the name of a task means, and the paths in a configuration file, which start from the file's folder."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from reinforce_ada.loading import whole

FILE_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")  # one of them is in every folder that `datasets` saved
RECORDS = "data.jsonl"  # in the folder of a run whose records came from a Python program
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^/\s]+)?")
_TASKS, _CODE = ("task", "eval_task"), ("reward", "loss")


def suffix_of(path: Path | str) -> str:
    """Return the kind of a file by its name, ignoring case and a final .gz: ".jsonl" for "A.JSONL.gz"."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def kind_of(task: str, folder: Path | None = None) -> Literal["file", "hub", "name"]:
    """Return what a task is by its name: a file or folder, a dataset of the Hugging Face hub, or the bare name of a generator.

    "org/name" and "org/name:config" are of the hub, unless there is a file or folder of that name, or the name ends like a file that is
    read. A bare name may also be that of a folder; only the list of generators can tell.

    Args:
        folder: where a relative path starts; the working folder by default.
    """
    if os.sep not in task:
        return "file" if suffix_of(task) else "name"
    is_hub_id = _HUB_ID.fullmatch(task) and suffix_of(task) not in FILE_KINDS
    return "hub" if is_hub_id and not os.path.lexists((folder or Path()) / task) else "file"


def beside(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of configuration keys, with the paths of questions and of code made absolute: they start from `folder`.

    Run folders and models (`out`, `model`, `memory_from`, ..) stay as they are: those start from the working folder.
    """
    found = dict(values)
    for key in _TASKS:
        if isinstance(given := found.get(key), str) and given and _is_path(given, folder):
            found[key] = str((folder / given).absolute())
    for key in _CODE:
        if isinstance(given := found.get(key), str) and given:
            found[key] = _whole_reward(given, folder) if key == "reward" else whole(given, folder)
    return found


def _whole_reward(spec: str, folder: Path) -> str:
    from reinforce_ada.rewards.names import whole_reward  # with numpy, which a configuration without a reward does not need

    return whole_reward(spec, folder)


def _is_path(task: str, folder: Path) -> bool:
    kind = kind_of(task, folder)
    return kind == "file" or (kind == "name" and any(os.path.isfile(folder / task / name) for name in SAVED_DATASET))
