"""What a task starts with where the configuration says nothing: generated questions have the demo's settings, a task of one's own has none.

A run's folder keeps the values that it began with, so none of these rules can change a run that is resumed.
"""

from __future__ import annotations

import dataclasses
import os

from reinforce_ada.config import Config, TaskConfig, check_room, kind_of

_SYSTEM_PROMPT, _NUM_EXAMPLES, _MAX_TOKENS = "Reply with one number and nothing else.", 1, 12  # of generated questions: the demo's


def is_generated(task: str) -> bool:
    """Return whether a task names a generator rather than a file, a folder or a dataset. An unknown bare name counts as a generator."""
    if kind_of(task) != "name":
        return False
    if not os.path.isdir(task):
        return True
    from reasoning_gym.factory import DATASETS  # two seconds, which only a folder with a bare name costs

    return task in DATASETS


def system_prompt_of(task: TaskConfig) -> str:
    """Return the system message of questions that have none of their own; "" for none."""
    if task.system_prompt is not None:
        return task.system_prompt
    return _SYSTEM_PROMPT if is_generated(task.task) else ""


def num_examples_of(task: TaskConfig) -> int:
    """Return how many worked examples stand before each question."""
    if task.num_examples is not None:
        return task.num_examples
    return _NUM_EXAMPLES if is_generated(task.task) else 0


def max_tokens_of(config: Config) -> int:
    """Return the most tokens of a completion; for a task of one's own by default half of what prompt and completion may have together.

    The half depends neither on the tokenizer nor on the longest prompt, so it is known before a model is loaded, it is the same for every
    model, and one long prompt does not shorten all answers.
    """
    if config.sampling.max_tokens is not None:
        return config.sampling.max_tokens
    return _MAX_TOKENS if is_generated(config.task.task) else max(1, config.engine.max_model_len // 2)


def completed(config: Config) -> tuple[Config, str]:
    """Return the configuration with the task's own defaults filled in, and a line for the user about them ("": the demo's, or none).

    Raises: InputError if completions of max_tokens leave no room for a prompt.
    """
    max_tokens = max_tokens_of(config)
    check_room(config, max_tokens)
    task = dataclasses.replace(config.task, system_prompt=system_prompt_of(config.task), num_examples=num_examples_of(config.task))
    filled = dataclasses.replace(config, task=task, sampling=dataclasses.replace(config.sampling, max_tokens=max_tokens))
    return filled, "" if is_generated(config.task.task) else _note(config, max_tokens)


def _note(config: Config, max_tokens: int) -> str:
    chosen = []
    if config.task.system_prompt is None:
        chosen.append("no system prompt (--system-prompt)")
    if config.task.num_examples is None:
        chosen.append("no worked examples (--num-examples)")
    if config.sampling.max_tokens is None:
        chosen.append(f"max_tokens {max_tokens}, half of max_model_len {config.engine.max_model_len} (--max-tokens)")
    return f"defaults for your own questions: {', '.join(chosen)}" if chosen else ""
