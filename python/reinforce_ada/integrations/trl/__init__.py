"""Adaptive sampling in TRL's GRPOTrainer: `adaptive(GRPOTrainer)` is the same trainer with one more argument, `adaptive=`.

Importing this package imports neither TRL nor torch, so that `reinforce-ada doctor` can ask whether TRL's hooks fit.
"""

from __future__ import annotations

from typing import Any

from reinforce_ada.integrations.trl.hooks import check_hooks

__all__ = ["adaptive"]


def adaptive(trainer_class: type[Any]) -> type[Any]:
    """Return a subclass of a GRPOTrainer that samples adaptively, whichever class that is by now (unsloth replaces TRL's own).

    Its `__init__` takes one more argument, `adaptive`: the name of a preset ("reinforce-ada-balance" by default), a `Policy`, or a name
    and the preset's keywords, ("reinforce-ada-pos", {"round_size": 4}). The policy keeps `num_generations` completions of every prompt.
    After each generation `sampling_result` holds the whole pools (see `SamplingResult`).

    Raises: InputError for a class whose hooks are not those of TRL 1.0 to 1.16; then, when the trainer is made, for a policy or settings
    that cannot be combined with TRL's (docs/trl.md).
    """
    check_hooks(trainer_class)
    from reinforce_ada.integrations.trl.trainer import AdaptiveSampling

    return type(f"Adaptive{trainer_class.__name__}", (AdaptiveSampling, trainer_class), {"__doc__": trainer_class.__doc__})
