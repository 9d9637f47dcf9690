"""The questions that a model has been trained on: those of the run beside its folder, and of the runs from which its base model came."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.training.task_defaults import num_examples_of
from reinforce_ada.training.task_files import Record, answer_of, question_of
from reinforce_ada.training.tasks import PromptStream, Records, load_records
from reinforce_ada.types import Prompt

WARM_UP_EXAMPLES = 512  # training questions that the tiny model has seen with their answers before the run


def run_beside(model: str) -> Path | None:
    """Return the run folder that contains a model folder, such as RUN for RUN/model and for RUN/checkpoints/step-000030/model."""
    if not os.path.isdir(model):
        return None
    for folder in list(Path(model).resolve().parents)[:3]:
        if (folder / "config.toml").is_file() and any((folder / name).is_file() for name in ("rollouts.sqlite", "log.jsonl")):
            return folder
    return None


def warm_up_prompts(records: Records, make: Callable[[str, Record], Prompt]) -> list[Prompt]:
    """Return the prompts that the base model of `tiny` learns from, with their answers: training questions, never held-out ones."""
    stream = PromptStream(records.warm_up, records.excluded, make, 0)
    return [prompt for prompt in islice(stream, WARM_UP_EXAMPLES) if answer_of(prompt.data) is not None]


def without_trained(records: Records, model: str) -> tuple[Records, str]:
    """Return the records without held-out questions that the model was trained on, and a note about them ("": none).

    Raises: InputError if none is left, or if it cannot be known because the run beside the model has lost its store.
    """
    held_out, said = list(records.held_out), []
    for run in _ancestry(model):
        trained = _trained_on(run)
        left = [record for record in held_out if question_of(record) not in trained]
        if len(left) < len(held_out):
            said.append(f"{len(held_out) - len(left)} of {len(records.held_out)} held-out questions are left out: {run} trained on them")
        held_out = left
    if records.held_out and not held_out:
        raise InputError("eval", "; ".join(said), "questions that it was not trained on", f"the split of {_split_of(run)}")
    return dataclasses.replace(records, held_out=held_out), "; ".join(said)


def check_held_out(records: Records, model: str) -> None:
    """Raise InputError if a run that begins with this model would hold out questions that the model was trained on."""
    for run in _ancestry(model):
        trained = _trained_on(run)
        if found := sum(question_of(record) in trained for record in records.held_out):
            given = f"{found} of {len(records.held_out)} held-out questions were trained on by {run}, where the model comes from"
            raise InputError("train", given, "held-out questions that are new to it", f"the split of {_split_of(run)}, or another task")


def _ancestry(model: str) -> Iterator[Path]:
    """Yield the run beside the model, the run beside the model with which that run began, and so on."""
    seen: set[Path] = set()
    run = run_beside(model)
    while run is not None and run not in seen:
        seen.add(run)
        yield run
        run = run_beside(configuration.load_saved(run / "config.toml").model.model)


def _trained_on(run: Path) -> frozenset[str]:
    if not (run / "rollouts.sqlite").is_file():
        given = f"{run} has a configuration and a log but no rollouts.sqlite"
        raise InputError("model", given, "the store, which knows what was trained on", "copy the model out of the run folder")
    with RolloutStore(run / "rollouts.sqlite", read_only=True) as store:
        questions = {question_of(record) for record in store.records()}
    config = configuration.load_saved(run / "config.toml")
    if config.model.model == "tiny":
        records = load_records(config.task, config.run.seed, config.run.data_seed)
        warm_up = warm_up_prompts(records, lambda name, record: Prompt(name, data=record))
        questions.update(question_of(prompt.data) for prompt in warm_up)
    return frozenset(questions)


def _split_of(run: Path) -> str:
    config = configuration.load_saved(run / "config.toml")
    task, data_seed = config.task, config.run.data_seed
    apart = "".join(f" --{key.replace('_', '-')} {given}" for key in ("eval_task", "eval_split") if (given := getattr(task, key)))
    return f"that run is --data-seed {data_seed} --eval-prompts {task.eval_prompts} --num-examples {num_examples_of(task)}{apart}"
