"""Tasks: where prompts come from, how they are rendered, and which are held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reinforce_ada.config import TaskConfig
from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.types import Prompt

Record = Mapping[str, Any]
Render = Callable[[Sequence[tuple[str, str]], str], tuple[str, tuple[int, ...]]]

# One-digit sums of two terms: small models answer about 1 in 16 of them at first, which is where adaptive sampling has most to do.
_STARTING_OPTIONS: dict[str, dict[str, Any]] = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
_EPOCH = 1 << 20  # records of a generator before its order is drawn anew
_MAX_SKIPS = 10_000  # consecutive held-out questions before we conclude that nothing else exists


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """A task before any tokenizer: training records by position, worked examples, held-out records, and the reward."""

    train: Source
    examples: Sequence[Record]
    held_out: Sequence[Record]
    reward: Any  # a picklable callable, or "module:function"
    digest: str = ""  # of the file they came from: a run must not resume on other questions


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Training prompts, held-out prompts, and the reward."""

    name: str
    train: Callable[[int], PromptStream]  # position -> a stream of prompts from there
    held_out: tuple[Prompt, ...]
    reward: Any  # a picklable callable, or "module:function"


class PromptStream(Iterator[Prompt]):
    """Training prompts in a seeded order, without end; `position` is all there is to resume."""

    def __init__(self, source: Source, excluded: frozenset[str], make: Callable[[str, Record], Prompt], position: int) -> None:
        self.position = position
        self._source, self._excluded, self._make = source, excluded, make

    def __next__(self) -> Prompt:
        for _ in range(_MAX_SKIPS):
            name, record = self._source.at(self.position)
            self.position += 1
            if record["question"] not in self._excluded:
                return self._make(name, record)
        raise InputError("task", "every training question is also held out", "a larger task", "lower eval_prompts")


class Source:
    """Records by position: an epoch visits each once, in an order drawn from (seed, epoch)."""

    def __init__(self, get: Callable[[int], Record], size: int, seed: int) -> None:
        self.get, self.size, self.seed = get, size, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, position: int) -> tuple[str, Record]:
        """(a name unique to the position, the record there)."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.size)
        index = int(self._order[offset])
        return f"{index}" if epoch == 0 else f"{index}@{epoch}", self.get(index)


def chat_renderer(tokenizer: Any, system_prompt: str, template: str) -> Render:
    """(examples, question) -> (text, token ids), through the tokenizer's chat template or as plain lines.

    Raises: InputError when a chat template is needed and there is none.
    """
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise InputError("task", "the tokenizer has no chat template", "one", "--template plain writes questions as lines of text")

    def messages(examples: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
        turns = [{"role": "system", "content": system_prompt}] if system_prompt else []
        for asked, answered in examples:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*turns, {"role": "user", "content": question}]

    def chat(examples: Sequence[tuple[str, str]], question: str) -> tuple[str, tuple[int, ...]]:
        text = tokenizer.apply_chat_template(messages(examples, question), tokenize=False, add_generation_prompt=True)
        return text, tuple(tokenizer(text, add_special_tokens=False).input_ids)

    def plain(examples: Sequence[tuple[str, str]], question: str) -> tuple[str, tuple[int, ...]]:
        lines = [m["content"] for m in messages(examples, question)]
        text = "\n".join(lines) + "\n"
        return text, tuple(tokenizer(text).input_ids)

    return chat if template == "chat" else plain


def content_key(record: Record) -> str:
    """What a record is remembered by: 16 hexadecimal digits of its question and answer, so not of its place in a file or an epoch.

    64 bits: among a million records two meet with a chance of 3e-8.
    """
    content = json.dumps([record["question"], record.get("answer")], sort_keys=True, default=repr)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def load_task(config: TaskConfig, tokenizer: Any, seed: int) -> Task:
    """The task of the configuration as prompts for one tokenizer; see `load_records` and `render`."""
    return render(load_records(config, seed), config, tokenizer)


def load_records(config: TaskConfig, seed: int) -> Records:
    """The records of the configured task: a JSONL file where `task` names one, else a reasoning-gym dataset.

    Raises: InputError for an unknown dataset, a malformed or answerless JSONL line, or too few records to hold any out.
    """
    if config.task.endswith((".jsonl", ".json")):
        return _jsonl_records(config, seed)
    return _reasoning_gym_records(config, seed)


def render(records: Records, config: TaskConfig, tokenizer: Any) -> Task:
    """Records as prompts: system prompt, worked examples, question, through the tokenizer.

    Raises: InputError for a tokenizer without chat template where one is asked for.
    """
    renderer = chat_renderer(tokenizer, config.system_prompt, config.template)
    shown = [(e["question"], str(e["answer"])) for e in records.examples]

    def make(name: str, record: Record) -> Prompt:
        text, ids = renderer(shown, record["question"])
        return Prompt(prompt_id=name, token_ids=ids, text=text, data=record, key=content_key(record))

    excluded = frozenset(r["question"] for r in (*records.held_out, *records.examples))

    def stream(position: int) -> PromptStream:
        return PromptStream(records.train, excluded, make, position)

    return Task(
        name=Path(config.task).stem,
        train=stream,
        held_out=tuple(make(f"held-out-{i}", r) for i, r in enumerate(records.held_out)),
        reward=records.reward,
    )


def _reasoning_gym_records(config: TaskConfig, seed: int) -> Records:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    from reinforce_ada.rewards.reasoning_gym import ReasoningGymReward

    if config.task not in DATASETS:
        raise unknown_name("task", "reasoning-gym dataset", config.task, DATASETS)
    options = {**_STARTING_OPTIONS.get(config.task, {}), **config.task_options}

    def dataset(part: int, size: int) -> Any:
        # reasoning-gym seeds record i with seed + i: the parts must be further apart than they are long.
        try:
            return reasoning_gym.create_dataset(config.task, seed=seed + part * (_EPOCH * 4), size=size, **options)
        except (TypeError, AssertionError, ValueError) as e:
            raise InputError("task", f"{config.task} does not take {options}", str(e) or "valid options") from e

    train = dataset(0, _EPOCH)
    examples = _distinct(dataset(1, _MAX_SKIPS), config.num_examples, frozenset())
    shown = frozenset(e["question"] for e in examples)
    held_out = _distinct(dataset(2, _MAX_SKIPS), config.eval_prompts, shown)
    reward = config.reward or ReasoningGymReward(config.task, **options)
    return Records(Source(train.__getitem__, _EPOCH, seed), examples, held_out, reward)


def _distinct(dataset: Any, count: int, excluded: frozenset[str]) -> list[Record]:
    """The first `count` records with different questions (fewer where there are no more)."""
    found: dict[str, Record] = {}
    for i in range(_MAX_SKIPS):
        if len(found) == count:
            break
        record = dataset[i]
        if record["question"] not in excluded:
            found.setdefault(record["question"], record)
    return list(found.values())


def _jsonl_records(config: TaskConfig, seed: int) -> Records:
    from reinforce_ada.rewards.exact import exact_match

    records = read_jsonl(Path(config.task), needs_answer=not config.reward)
    order = np.random.default_rng([seed, 1]).permutation(len(records))
    spent = config.num_examples + config.eval_prompts
    if spent >= len(records):
        raise InputError("task", f"{config.task} has {len(records)} records", f"more than num_examples + eval_prompts = {spent}")
    shuffled = [records[i] for i in order]
    examples, held_out, rest = shuffled[: config.num_examples], shuffled[config.num_examples : spent], shuffled[spent:]
    if any(e.get("answer") is None for e in examples):
        raise InputError("task", "a worked example has no answer", "answers in the file, or --num-examples 0")
    digest = hashlib.blake2b(Path(config.task).read_bytes(), digest_size=16).hexdigest()
    return Records(Source(rest.__getitem__, len(rest), seed), examples, held_out, config.reward or exact_match, digest)


def read_jsonl(path: Path, *, needs_answer: bool) -> list[Record]:
    """Records of a JSONL file, `prompt` renamed to `question`.

    Raises: InputError naming file and line for anything that is not an object with a prompt (and an answer where one is needed).
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON text may hold U+2028
    except (OSError, UnicodeDecodeError) as e:
        raise InputError("task", f"cannot read {path}: {e}", "a JSONL file of {prompt, answer} records") from e
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as e:
            raise InputError("task", f"{path}:{number} is not JSON ({e.msg})", 'one {"prompt": ..., "answer": ...} per line') from e
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
            raise InputError("task", f"{path}:{number} has no prompt", 'a non-empty text under "prompt"')
        if needs_answer and record.get("answer") is None:
            raise InputError("task", f"{path}:{number} has no answer", 'an "answer", or --reward module:function that needs none')
        records.append({**record, "question": record["prompt"]})
    if not records:
        raise InputError("task", f"{path} holds no prompts", "at least one record")
    return records
