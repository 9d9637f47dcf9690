"""reinforce_ada: rollouts where the learning signal is, and fused operators that turn them into a gradient.

`reinforce_ada.ops` works in any PyTorch trainer, `AdaptiveSampler` with any generator, and `train` is the trainer itself; importing this
package imports neither torch nor an engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from reinforce_ada import ops
    from reinforce_ada.advantages import advantages_of
    from reinforce_ada.async_driver import adaptive_group, arun
    from reinforce_ada.driver import run
    from reinforce_ada.engines.function import FunctionEngine
    from reinforce_ada.engines.openai import HttpEngine
    from reinforce_ada.sampling import AdaptiveSampler, Policy, preset
    from reinforce_ada.training.callbacks import StopTraining
    from reinforce_ada.training.entry import train
    from reinforce_ada.types import Prompt


_HOME = {
    "AdaptiveSampler": "reinforce_ada.sampling",
    "FunctionEngine": "reinforce_ada.engines.function",
    "HttpEngine": "reinforce_ada.engines.openai",
    "Policy": "reinforce_ada.sampling",
    "Prompt": "reinforce_ada.types",
    "StopTraining": "reinforce_ada.training.callbacks",
    "adaptive_group": "reinforce_ada.async_driver",
    "advantages_of": "reinforce_ada.advantages",
    "arun": "reinforce_ada.async_driver",
    "preset": "reinforce_ada.sampling",
    "run": "reinforce_ada.driver",
    "train": "reinforce_ada.training.entry",
}

__all__ = [
    "AdaptiveSampler",
    "FunctionEngine",
    "HttpEngine",
    "Policy",
    "Prompt",
    "StopTraining",
    "__version__",
    "adaptive_group",
    "advantages_of",
    "arun",
    "ops",
    "preset",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("reinforce-ada")
    if name == "ops":
        return import_module("reinforce_ada.ops")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'reinforce_ada' has no attribute {name!r}")
