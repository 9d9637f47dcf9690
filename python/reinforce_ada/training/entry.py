"""`reinforce_ada.train`: a run from a notebook or a script, by the same function as the command line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reinforce_ada import config as configuration
from reinforce_ada.config import TaskConfig
from reinforce_ada.config.paths import RECORDS
from reinforce_ada.errors import InputError
from reinforce_ada.outside import log_on_stderr, one_line
from reinforce_ada.rewards.by_value import ByValue, is_importable, name_of
from reinforce_ada.rewards.loading import check_reward
from reinforce_ada.training import hub, launch
from reinforce_ada.training.callbacks import Callback
from reinforce_ada.training.held_out import form_of, needs_answer
from reinforce_ada.training.in_memory import InMemory
from reinforce_ada.training.log import read_log
from reinforce_ada.training.task_files import checked
from reinforce_ada.types import Prompt

_WHERE = "train"
_ARGUMENT_OF = {"model": "model", "task": "data", "reward": "reward"}  # keys of the configuration that are arguments


@dataclass(frozen=True, repr=False)
class TrainedRun:
    """A finished run, read from its folder when it is asked for."""

    path: Path

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """Return every record of log.jsonl: kind "run" (the configuration and versions), "step" or "eval"."""
        return read_log(self.path / "log.jsonl")

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the record of every step, in order."""
        return [record for record in self.records if record["kind"] == "step"]

    @property
    def before(self) -> dict[str, Any] | None:
        """Return the first evaluation: k, avg_at_k, stderr, pass_at_k, per_prompt, step. None if nothing was held out."""
        return next((record for record in self.records if record["kind"] == "eval"), None)

    @property
    def after(self) -> dict[str, Any] | None:
        """Return the last evaluation, in the same form."""
        return next((record for record in reversed(self.records) if record["kind"] == "eval"), None)

    @property
    def model(self) -> Path:
        """Return the folder of the trained model, which transformers and vLLM load; of a run with `lora_rank`, that of its adapters."""
        return self.path / "model"

    def load(self) -> tuple[Any, Any]:
        """Return the trained model and its tokenizer, in the dtype of the run; adapters as a peft model around the run's base model."""
        import torch

        from reinforce_ada.training import adapters, models

        load = adapters.load if models.is_adapters(self.model) else lambda folder, *how: models.load(str(folder), *how)
        model = load(self.model, configuration.load_saved(self.path / "config.toml").model.dtype, torch.device("cpu"))
        return model.module, model.tokenizer

    def push(self, repo: str) -> str:
        """Upload the model and its card to the Hugging Face Hub, and return the address; see `training.hub.push`."""
        return hub.push(self.path, repo)

    def __repr__(self) -> str:
        said = f"{len(self.history)} steps"
        if self.before and self.after:
            first, last = (f"{e['avg_at_k']:.3f} ± {e['stderr'] or 0:.3f}" for e in (self.before, self.after))
            said += f", held-out Avg@{self.after['k']} {first} → {last}"
        return f"<TrainedRun {self.path}: {said}>"


def train(
    model: str | Path,
    data: str | Path | Iterable[Mapping[str, Any]],
    reward: str | Callable[[Prompt, str], float] = "",
    *,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Train a model by adaptive sampling, as `reinforce-ada train` does, and return the finished run.

    Args:
        model: "smollm2", "tiny", a folder, or a hub id of a causal language model.
        data: records {"prompt": ..., "answer": ...} as a list, a `datasets.Dataset` or any other iterable, which the run keeps in
            `data.jsonl` in its folder; or, as for --task, the path of a file or the name of a reasoning-gym dataset.
        reward: (prompt, completion) -> float, which is called in other processes. A function that can be imported is; any other, of a
            notebook or a script or a lambda, is sent there with its code. Or "module:function". "" compares with the answer.
        callbacks: functions that are called as f(record, view) after every step (record["kind"] == "step"), every evaluation ("eval") and
            at the end ("end"), when journal and log have it. One that raises `StopTraining` ends the run in good order.
        resume: continue the run in the folder if there is one, with its own settings where `settings` has no other. Without it a run
            that is there is refused. Records, reward and what decides about the learning must be those of the run.
        settings: keys of the configuration by name, such as steps=100; see `reinforce-ada train --help`.
    Raises: InputError for anything that cannot be used, before anything is made; for an unknown key it names the nearest. EngineLost when
        the engine was unreachable for too long. Whatever a callback raises. The run can be resumed after each of them.
    """
    for key in sorted(_ARGUMENT_OF.keys() & settings.keys()):
        raise InputError(_WHERE, f"{key}= among the settings", f"the argument {_ARGUMENT_OF[key]}")
    records = None if isinstance(data, str | Path) else list(_rows(data))
    named, called = _reward(reward)
    keys = {"model": _name(model), "reward": named, **{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}}
    config = configuration.load(None, {**keys, "task": "data" if records is not None else str(data)})
    out = launch.out_of(config)
    keys["task"] = str(out.absolute() / RECORDS) if records is not None else str(data)
    text = None if records is None else _lines(records, config.task)
    saved = out / "config.toml"
    goes_on = resume and saved.is_file()
    config = configuration.load_saved(saved, keys) if goes_on else configuration.load(None, {**keys, "out": str(out)})
    with warnings.catch_warnings(), log_on_stderr():  # launch silences libraries, and the program keeps its own filters
        launch.train(config, out if goes_on else None, InMemory(text, called, tuple(callbacks)))
    return TrainedRun(out)


def _name(model: object) -> str:
    if not isinstance(model, str | Path):
        given = f"the model is a {type(model).__name__}"
        raise InputError(_WHERE, given, "a name or a folder", "save_pretrained(folder) of the model and of its tokenizer make one")
    return str(model)


def _reward(reward: Any) -> tuple[str, Any]:
    """Return the reward's name for the configuration, and the reward itself if a name is not enough to find it."""
    if isinstance(reward, str):
        return reward, None
    check_reward(reward, name_of(reward))
    if is_importable(reward):
        return name_of(reward), None
    return name_of(reward), ByValue(reward)


# -------------------- records


def _rows(data: Any) -> Iterable[Any]:
    if isinstance(data, Mapping) or not isinstance(data, Iterable):  # a DatasetDict is a mapping of its parts
        has = f" with the parts {one_line(', '.join(map(str, data)), 60)}" if isinstance(data, Mapping) else ""
        raise InputError(_WHERE, f"the data are a {type(data).__name__}{has}", 'an iterable of {"prompt": ..., "answer": ...} records')
    return data


def _lines(rows: Sequence[Any], task: TaskConfig) -> str:
    """Return the records as JSON lines. Raises: InputError naming the first that is none, or that JSON cannot hold."""
    lines = []
    for number, row in enumerate(rows, 1):
        where = f"data, record {number}"
        raw = {str(k): v for k, v in row.items() if v is not None} if isinstance(row, Mapping) else row
        checked([(where, raw)], form_of(task), needs_answer=needs_answer(task))
        try:
            line = json.dumps(raw, ensure_ascii=False, allow_nan=False)
            line.encode()
        except (TypeError, ValueError) as e:
            raise InputError(_WHERE, f"{where} cannot be written as JSON ({one_line(str(e))})", "text, numbers, lists, tables") from e
        lines.append(f"{line}\n")
    if not lines:
        raise InputError(_WHERE, "the data hold no records", "at least one")
    return "".join(lines)
