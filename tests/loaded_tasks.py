"""A task of a configuration as prompts for one tokenizer."""

from __future__ import annotations

from typing import Any

from reinforce_ada.config import TaskConfig
from reinforce_ada.training.tasks import Task, load_records, render


def load_task(config: TaskConfig, tokenizer: Any, seed: int, data_seed: int) -> Task:
    return render(load_records(config, seed, data_seed), config, tokenizer)
