"""What a run reads from outside its folder and a resumed one must find again: questions, reward, and the weights that it began with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforce_ada.config import Config
from reinforce_ada.errors import InputError
from reinforce_ada.rewards import names
from reinforce_ada.training import models
from reinforce_ada.training.tasks import Records
from reinforce_ada.training.trainer import fingerprint

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_NUM_BLOCKS, _BLOCK_BYTES = 1024, 16384  # 16 MiB of each file; one of 5 GB has a block every 5 MB, less than most matrices


def inputs_of(config: Config, records: Records) -> dict[str, Any]:
    """Return the settings of a run that its store keeps and compares, with digests of its questions and of its base weights."""
    run = {**fingerprint(config), "records": records.digest}
    base = base_digest(config.model.model)
    return {**run, "base": base} if base else run


def check_inputs(config: Config, run: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """Give `run` the stored names of what has only been moved or is not known any more, so that the two can be compared.

    Args:
        run: of the resumed run, from `inputs_of`; it is changed.
        earlier: that of its store.
    Raises: InputError if the questions or the base weights have changed.
    """
    then, now = earlier.get("task", {}), run["task"]
    if names.comparable(then.get("reward", "")) == names.comparable(now["reward"]):
        now["reward"] = then.get("reward", "")
    _check_base(config, run, earlier)
    if not earlier.get("records") or not run["records"]:
        return
    if earlier["records"] != run["records"]:
        given = f"{config.task.task} has changed since the run began"
        raise InputError("train", given, "the file as it was", "put it back, or begin a new run with another --out")
    now.update({key: then[key] for key in ("task", "eval_task") if key in then})


def _check_base(config: Config, run: dict[str, Any], earlier: Mapping[str, Any]) -> None:
    """A known digest decides, wherever the weights stand. A run of an earlier version has none, and keeps a folder of the same name."""
    then, now = earlier.get("base"), run.get("base")
    named = earlier.get("model", {}).get("model", "")
    if then and now and then != now:
        hint = "put them back, or begin a new run with another --out"
        raise InputError(
            "train", f"the weights of {config.model.model} are not those with which the run began", "the same base model", hint
        )
    if (then and then == now) or os.path.basename(named) == os.path.basename(run["model"]["model"]):
        run["model"]["model"] = named
    if then:
        run["base"] = then
    else:
        run.pop("base", None)


def base_digest(model: str) -> str:
    """Return a digest of the weights of a model folder or of a cached model of the hub; "" if it is not here, and for "tiny".

    The digest is BLAKE2b over the names and sizes of the files with weights and, of each, 1024 blocks of 16 KiB that are spread evenly
    over it, the first and the last among them. It finds another model, training of any kind, and another dtype; a change of a few bytes by
    hand may be missed in a file of more than 16 MiB.
    """
    folder = _folder_of(model)
    found = {path for pattern in _WEIGHTS for path in folder.glob(pattern) if path.is_file()} if folder else set()
    if not found:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(found):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in _starts(size):
                file.seek(start)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    """Return where the blocks of a file begin: next to each other in a small file, which is then read whole."""
    count = min(_NUM_BLOCKS, -(-size // _BLOCK_BYTES))
    if count < _NUM_BLOCKS:
        return [i * _BLOCK_BYTES for i in range(count)]
    return [i * (size - _BLOCK_BYTES) // (count - 1) for i in range(count)]


def _folder_of(model: str) -> Path | None:
    if model == "tiny":  # each run makes its own
        return None
    path = Path(models.path_of(model))
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json")
    return Path(config).parent if isinstance(config, str) else None
