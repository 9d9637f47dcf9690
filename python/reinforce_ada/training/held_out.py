"""Held-out questions that come from elsewhere than the training records, and what a task of one's own must have for its reward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reinforce_ada.config import TaskConfig, kind_of
from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.rewards import names
from reinforce_ada.training.task_datasets import TRAIN
from reinforce_ada.training.task_defaults import is_generated
from reinforce_ada.training.task_files import Form, Record, answer_of, digest_of, question_of, read_records

_TEST = "test"  # the part of another dataset that is held out where none is named
_WITH_RATIONALE = re.compile(r"####\s*\S")  # "... so 42 are left. #### 42", as in GSM8K


@dataclass(frozen=True, slots=True, eq=False)
class Apart:
    """Held-out records of another file, dataset or part. None of their questions is trained on, even if fewer are evaluated."""

    name: str
    records: Sequence[Record]
    questions: frozenset[str]
    digest: str
    num_leaked: int  # training records that have one of the questions
    num_records: int  # training records with those

    def notes(self, num_held_out: int, config: TaskConfig) -> tuple[str, ...]:
        """Return lines for the user: how many training records are left out, and whether there are fewer questions than wanted."""
        found = []
        if self.num_leaked:
            found.append(f"{self.num_leaked} of {self.num_records} training records are left out: {self.name} has their questions too")
        if num_held_out < config.eval_prompts:
            found.append(f"{num_held_out} held-out questions instead of {config.eval_prompts}: {self.name} has no more")
        return tuple(found)


def form_of(config: TaskConfig) -> Form:
    """Return how the training records are read."""
    return Form(config.split, config.prompt_column, config.answer_column)


def needs_answer(config: TaskConfig) -> bool:
    """Return whether every record must have an answer: a function of one's own may score without one, and so do some named rewards."""
    return not config.reward or names.needs_answer(config.reward)


def read_apart(config: TaskConfig, records: Sequence[Record]) -> Apart | None:
    """Return the held-out records of `eval_task` or `eval_split`; None if both are empty and the task's own records are split.

    Args:
        records: the training records.
    Raises: InputError for a generator, for the part that is trained on, and for whatever cannot be read.
    """
    if not (config.eval_task or config.eval_split):
        return None
    source, split = config.eval_task or config.task, config.eval_split
    if is_generated(source):
        raise InputError("task", f"eval_task = {one_line(repr(source))}", "a file, a folder or a dataset of the hub")
    if not split and (kind_of(source) == "hub" or (Path(source) / "dataset_dict.json").is_file()):
        split = _TEST
    if source == config.task and split == (config.split or TRAIN):
        raise InputError("task", f"part {split!r} is both trained on and held out", "two different parts", "--split and --eval-split")
    found = read_records(source, Form(split, config.prompt_column, config.answer_column), needs_answer=needs_answer(config))
    questions = frozenset(map(question_of, found))
    name = f"part {split} of {source}" if split else source
    return Apart(name, found, questions, digest_of(source, found), sum(question_of(r) in questions for r in records), len(records))


def check_compared(task: str, records: Sequence[Record]) -> None:
    """Raise InputError if the answers are to be compared as whole texts, but most of them hold a rationale before the answer."""
    answers = [answer_of(record) or "" for record in records]
    found = [answer for answer in answers if _WITH_RATIONALE.search(answer)]
    if 2 * len(found) > len(answers):
        given = f"{len(found)} of {len(answers)} answers of {task} hold a rationale, such as {one_line(found[0][-40:])!r}"
        raise InputError("task", given, "a reward that compares what stands after ####", "--reward number")
