"""The methods of TRL's GRPOTrainer that are overridden."""

from __future__ import annotations

from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.integrations.hooks import Hooks

TRL = Hooks(
    "trl",
    "TRL 1.0 to 1.16",
    "trainer/grpo_trainer.py",
    "GRPOTrainer",
    {
        "_generate_and_score_completions": ("inputs",),
        "_generate": ("prompts",),
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    },
)


def check_hooks(trainer_class: type[Any]) -> None:
    """Raise InputError for a class whose hooks differ."""
    if wrong := TRL.difference_of(trainer_class):
        raise InputError("adaptive", f"{trainer_class.__name__} of TRL {TRL.version()}: {wrong}", TRL.needed())
