"""Tasks: the source of prompts, how they are rendered, and which are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reinforce_ada.config import TaskConfig, kind_of
from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.outside import one_line
from reinforce_ada.training.held_out import check_compared, form_of, needs_answer, read_apart
from reinforce_ada.training.rendering import Renderer
from reinforce_ada.training.task_defaults import is_generated, num_examples_of, system_prompt_of
from reinforce_ada.training.task_files import Record, answer_of, digest_of, question_of, read_records
from reinforce_ada.types import Prompt

# One-digit sums of two terms: small models answer about 1 in 16 of them at first, where adaptive sampling has the most to gain.
_STARTING_OPTIONS: dict[str, dict[str, Any]] = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
_EPOCH = 1 << 20  # records of a generator before a new order is drawn
_MAX_SKIPS = 10_000  # consecutive questions that are held out or too long before we conclude that nothing else exists
_MAX_EXAMPLES_LOOKED_AT = 64  # records of a generator without an answer before we conclude that none has one


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """A task before any tokenizer: training records by position, worked examples, held-out records, and the reward."""

    train: Source  # in the order of the run's seed
    warm_up: Source  # the same in the order of the data's seed: the questions of a base model do not depend on the run's seed
    examples: Sequence[Record]
    held_out: Sequence[Record]
    reward: Any  # a picklable callable, "module:function" or "file.py:function"
    digest: str = ""  # of their file: a run must not resume on other questions
    notes: tuple[str, ...] = ()  # lines for the user

    @property
    def excluded(self) -> frozenset[str]:
        """Return the questions that are never trained on."""
        return frozenset(question_of(r) for r in (*self.held_out, *self.examples))


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Training prompts and held-out prompts."""

    name: str
    train: Callable[[int], PromptStream]  # position -> a stream of prompts from there
    held_out: tuple[Prompt, ...]
    make: Callable[[str, Record], Prompt]  # (name, record) -> its prompt
    notes: tuple[str, ...] = ()  # lines for the user


class PromptStream(Iterator[Prompt]):
    """Training prompts in a seeded order from `position` on, without end, and without the excluded questions.

    Prompts of more than `longest` tokens are left out when they are reached, and counted in `num_too_long`; None: no limit.
    """

    def __init__(
        self, source: Source, excluded: frozenset[str], make: Callable[[str, Record], Prompt], position: int, longest: int | None = None
    ) -> None:
        self.position = position
        self.num_too_long = 0
        self._source, self._excluded, self._make, self._longest = source, excluded, make, longest

    def __next__(self) -> Prompt:
        was_long = self.num_too_long
        for _ in range(_MAX_SKIPS):
            name, record = self._source.at(self.position)
            self.position += 1
            if question_of(record) in self._excluded:
                continue
            prompt = self._make(name, record)
            if self._longest is None or len(prompt.token_ids) <= self._longest:
                return prompt
            self.num_too_long += 1
        if self.num_too_long > was_long:
            raise InputError("task", f"{_MAX_SKIPS} questions in a row are too long", f"{self._longest} tokens at most", "--max-model-len")
        raise InputError("task", "every training question is also held out", "a larger task", "lower eval_prompts")


class Source:
    """Records by position: an epoch visits each once, in an order drawn from (seed, epoch)."""

    def __init__(self, get: Callable[[int], Record], size: int, seed: int) -> None:
        self.get, self.size, self.seed = get, size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, position: int) -> tuple[str, Record]:
        """Return (a name unique to the position, the record there)."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size)
        index = int(self._order[offset])
        return f"{index}" if epoch == 0 else f"{index}@{epoch}", self.get(index)


def content_key(record: Record) -> str:
    """Return the key by which a record is remembered: 16 hexadecimal digits of its question and answer, wherever it stands.

    The key has 64 bits: among a million records two collide with a chance of 3e-8.
    """
    content = json.dumps([question_of(record), record.get("answer")], sort_keys=True, default=repr)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


# -------------------- records


def load_records(config: TaskConfig, seed: int, data_seed: int, *, trains: bool = True) -> Records:
    """Return the records of the configured task: those of a reasoning-gym dataset if it names one, otherwise a person's own.

    Args:
        config: which task, and how much of it is shown or held out.
        seed: determines the order of the training records.
        data_seed: determines which records there are, and which of them are shown and held out.
        trains: whether records of a file must be left for training; otherwise all of them may be held out.
    Raises: InputError for an unknown dataset, a malformed or answerless record, or too few records to hold any out.
    """
    if not is_generated(config.task):
        return _own_records(config, seed, data_seed, trains)
    for key in ("split", "eval_task", "eval_split", "prompt_column", "answer_column"):
        if given := getattr(config, key):
            raise InputError("task", f"{key} = {one_line(repr(given))} with the generated task {config.task}", "questions of your own")
    return _reasoning_gym_records(config, seed, data_seed)


def name_of(task: str) -> str:
    """Return the short name of a task: "sums" for data/sums.jsonl, "gsm8k" for openai/gsm8k:main."""
    return Path(task).stem if kind_of(task) != "hub" else task.partition(":")[0].rpartition("/")[2]


def render(records: Records, config: TaskConfig, tokenizer: Any, *, longest: int | None = None) -> Task:
    """Render records as prompts: system prompt, worked examples, question, through the tokenizer.

    Args:
        longest: the most tokens of a prompt. Longer training prompts are never drawn; those of a file are counted here.
    Raises: InputError for a tokenizer without a required chat template, for a held-out prompt that is too long, and if
        most training prompts of a file are.
    """
    renderer = Renderer(tokenizer, system_prompt_of(config), config.template, config.template_options)

    def make(name: str, record: Record) -> Prompt:
        text = renderer.text(records.examples, record)
        return Prompt(prompt_id=name, token_ids=renderer.token_ids(text), text=text, data=record, key=content_key(record))

    held_out = tuple(make(f"held-out-{i}", r) for i, r in enumerate(records.held_out))
    notes = list(records.notes)
    if longest is not None:
        _check_held_out(held_out, longest)
        notes += _check_lengths(records, renderer, longest)
    if renderer.has_folded:
        notes.append("the chat template has no place for a system message: its text stands at the head of the first user message")
    if renderer.unread:
        notes.append(f"the chat template does not read {', '.join(renderer.unread)} of template_options")
    excluded = records.excluded

    def stream(position: int) -> PromptStream:
        return PromptStream(records.train, excluded, make, position, longest)

    return Task(name_of(config.task), stream, held_out, make, tuple(notes))


def _check_held_out(held_out: Sequence[Prompt], longest: int) -> None:
    too_long = [prompt for prompt in held_out if len(prompt.token_ids) > longest]
    if too_long:
        first, most = too_long[0], max(len(prompt.token_ids) for prompt in too_long)
        shown = one_line(question_of(first.data), 60)
        given = f"{len(too_long)} of {len(held_out)} held-out prompts are too long, such as {shown!r} with {len(first.token_ids)} tokens"
        hint = f"--max-model-len takes them when it is higher by {most - longest}"
        raise InputError("task", given, f"at most max_model_len - max_tokens = {longest} tokens", hint)


def _check_lengths(records: Records, renderer: Renderer, longest: int) -> list[str]:
    """Return lines for the user about training prompts that are too long, if they come from a file."""
    if not records.digest:  # those of a generator are checked when they are drawn
        return []
    size, lengths = records.train.size, []
    for index in range(size):
        text = renderer.text(records.examples, records.train.get(index))
        if len(text.encode()) > longest:  # no tokenizer makes more tokens than there are bytes, except a few special ones
            lengths.append(len(renderer.token_ids(text)))
    too_long = [length for length in lengths if length > longest]
    if not too_long:
        return []
    said = f"{len(too_long)} of {size} training prompts are longer than max_model_len - max_tokens = {longest} tokens"
    hint = f"--max-model-len takes them when it is higher by {max(too_long) - longest}"
    if 2 * len(too_long) > size:
        raise InputError("task", said, "most of them to fit", hint)
    return [f"{said} and are never drawn; {hint}"]


def _reasoning_gym_records(config: TaskConfig, seed: int, data_seed: int) -> Records:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    from reinforce_ada.rewards.reasoning_gym import ReasoningGymReward

    if config.task not in DATASETS:
        raise unknown_name("task", "reasoning-gym dataset", config.task, DATASETS)
    options = {**_STARTING_OPTIONS.get(config.task, {}), **config.task_options}

    def dataset(part: int, size: int) -> Any:
        # reasoning-gym seeds record i with seed + i, so the parts must be further apart than they are long.
        try:
            return reasoning_gym.create_dataset(config.task, seed=data_seed + part * (_EPOCH * 4), size=size, **options)
        except (TypeError, AssertionError, ValueError) as e:
            raise InputError("task", f"{config.task} does not take {options}", one_line(str(e)) or "valid options") from e

    train = dataset(0, _EPOCH)
    examples = _examples(dataset(1, _MAX_SKIPS), num_examples_of(config))
    shown = frozenset(question_of(e) for e in examples)
    held_out = _distinct(map(dataset(2, _MAX_SKIPS).__getitem__, range(_MAX_SKIPS)), config.eval_prompts, shown)
    reward = config.reward or ReasoningGymReward(config.task, **options)
    ordered, warm_up = (Source(train.__getitem__, _EPOCH, s) for s in (seed, data_seed))
    return Records(ordered, warm_up, examples, held_out, reward, notes=_examples_note(examples, config))


def _examples(dataset: Any, count: int) -> list[Record]:
    """Return the first `count` records with different questions that have an answer to show."""
    found: dict[str, Record] = {}
    since_found = 0
    for i in range(_MAX_SKIPS):
        if len(found) == count or since_found == _MAX_EXAMPLES_LOOKED_AT:
            break
        record = dataset[i]
        since_found += 1
        if answer_of(record) is not None:
            found.setdefault(question_of(record), record)
            since_found = 0
    return list(found.values())


def _examples_note(examples: Sequence[Record], config: TaskConfig) -> tuple[str, ...]:
    wanted = num_examples_of(config)
    if len(examples) >= wanted:
        return ()
    return (f"{len(examples)} worked examples instead of {wanted}: no more records of {config.task} have an answer to show",)


def _distinct(records: Iterator[Record], count: int, excluded: frozenset[str]) -> list[Record]:
    """Return the first `count` records with different questions (fewer if there are no more)."""
    found: dict[str, Record] = {}
    while len(found) < count and (record := next(records, None)) is not None:
        if question_of(record) not in excluded:
            found.setdefault(question_of(record), record)
    return list(found.values())


# -------------------- records of one's own


def _own_records(config: TaskConfig, seed: int, data_seed: int, trains: bool) -> Records:
    from reinforce_ada.rewards import exact_match, names

    records = read_records(config.task, form_of(config), needs_answer=needs_answer(config))
    apart = read_apart(config, records)
    for name, part in ((config.task, records), *([(apart.name, apart.records)] if apart else [])):
        if config.reward:
            names.check_records(config.reward, part, name)
        else:
            check_compared(name, part)
    count = num_examples_of(config)
    spent = count + (0 if apart else config.eval_prompts)
    left = [record for record in _shuffled(records, data_seed, 1) if apart is None or question_of(record) not in apart.questions]
    if trains and spent >= len(left):
        needed = f"more than num_examples{'' if apart else ' + eval_prompts'} = {spent}"
        raise InputError("task", f"{config.task} has {len(left)} records", needed, "--eval-prompts holds fewer out" if not apart else "")
    examples = _distinct((r for r in left if answer_of(r) is not None), count, frozenset())
    others = left if apart is None else _shuffled(apart.records, data_seed, 2)
    held_out = _distinct(iter(others), config.eval_prompts, frozenset(question_of(e) for e in examples))
    taken = {id(record) for record in (*examples, *held_out)}
    rest = [record for record in left if id(record) not in taken]
    train, warm_up = (Source(rest.__getitem__, len(rest), s) for s in (seed, data_seed))
    notes, digest = _examples_note(examples, config), digest_of(config.task, records)
    if apart is not None:
        notes, digest = (*notes, *apart.notes(len(held_out), config)), f"{digest}+{apart.digest}"
    found = Records(train, warm_up, examples, held_out, config.reward or exact_match, digest, notes)
    if trains and all(question_of(record) in found.excluded for record in rest):
        raise InputError("task", f"{config.task}: every training question is also held out", "a larger task", "lower eval_prompts")
    return found


def _shuffled(records: Sequence[Record], data_seed: int, part: int) -> list[Record]:
    return [records[i] for i in np.random.default_rng([data_seed, part]).permutation(len(records))]
