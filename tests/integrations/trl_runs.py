"""GRPOTrainers on a tiny model, plain and adaptive, with rewards of which about a third are 1."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from reinforce_ada.integrations.trl import adaptive

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # or a rollout_func is warned of


@cache
def grpo_trainer() -> ModuleType:
    """TRL's module, imported when a trainer is first needed: that takes 7 s of a processor, which a process that only collects tests saves.

    TRL is told that there is no vLLM, which would take another 9 s. trl_stream.py imports TRL first, and so with vLLM.
    """
    utils = import_module("trl.import_utils")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(utils, "is_vllm_available", lambda min_version=None: False)
        return import_module("trl.trainer.grpo_trainer")


SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 6, "max_steps": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 0, "disable_tqdm": True,
    "lr_scheduler_type": "constant", "gradient_checkpointing": False, "dataloader_pin_memory": False,
}  # fmt: skip


def data(num: int = 40, distinct: int = 40) -> Any:
    from datasets import Dataset

    numbers = [i % distinct for i in range(num)]
    return Dataset.from_dict({"prompt": [f"{i}+{i % 7}=" for i in numbers], "answer": [str(i + i % 7) for i in numbers]})


def third(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """About a third of any completions are right, whatever the model."""
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def tenth(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    return [float(sum(ids) % 10 == 0) for ids in completion_ids]


def void_for_some(prompts: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    """Prompts of which every completion is a void, others where some are, and others without signal."""
    kinds = [int(prompt.partition("+")[0]) % 4 for prompt in prompts]
    rows = zip(kinds, completion_ids, third(completion_ids), strict=True)
    return [(None, None if sum(ids) % 2 else right, 0.0, right)[kind] for kind, ids, right in rows]


def none(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
    return [None] * len(completion_ids)


def trainer_of(folder: Path, out: Path, *, cls: Any = None, reward_funcs: Any = third, options: Any = None, **settings: Any) -> Any:
    """A trainer of this class: adaptive(GRPOTrainer) where none is given."""
    trl = grpo_trainer()
    arguments = {"train_dataset": data(), **(options or {})}
    args = trl.GRPOConfig(output_dir=str(out), **{**SETTINGS, **settings})
    trainer = (cls or adaptive(trl.GRPOTrainer))(model=str(folder), reward_funcs=reward_funcs, args=args, **arguments)
    trainer.remove_callback(import_module("transformers").PrinterCallback)
    return trainer


def trained(*args: Any, **settings: Any) -> Any:
    """A trainer that has trained, at once: making another one in between would set the seed anew."""
    trainer = trainer_of(*args, **settings)
    trainer.train()
    return trainer


def weights(trainer: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Recorded:
    """A GRPOTrainer before the adaptive one that keeps every batch and, where it samples, the pools of it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.results: list[Any] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training:  # type: ignore[attr-defined]
            self.batches.append(dict(batch))
            self.results.append(getattr(self, "sampling_result", None))
        return batch


@cache
def recorded_plain() -> type:
    """TRL's own."""
    return type("RecordedPlain", (Recorded, grpo_trainer().GRPOTrainer), {})


@cache
def recorded_adaptive() -> type:
    """The adaptive one."""
    return type("RecordedAdaptive", (Recorded, adaptive(grpo_trainer().GRPOTrainer)), {})
