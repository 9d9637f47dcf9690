"""Rewards that exist in one program only: functions of a notebook or a script, lambdas, functions in functions."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from reinforce_ada.errors import needs
from reinforce_ada.rewards.loading import check_reward
from reinforce_ada.rewards.protocol import Reward


class ByValue:
    """A reward that is pickled with its code, by cloudpickle, so that a worker needs no module that defines it.

    Globals that it uses travel with it as they are when the workers start; modules that it uses are imported by the worker.
    Raises: InputError when the reward cannot be called with (prompt, completion), or cloudpickle is not installed.
    """

    def __init__(self, reward: Reward) -> None:
        check_reward(reward, name_of(reward))
        needs("reward", "cloudpickle", "or move the reward to a module and name it as module:function")
        self._reward = reward

    def __getattr__(self, name: str) -> Any:
        """Return what the reward has beside its call: `batch`, `timed_out`, `prepare`, `answer`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._reward, name)

    def __call__(self, prompt: Any, completion: str, /) -> float:
        return self._reward(prompt, completion)

    def __repr__(self) -> str:
        return repr(name_of(self._reward))

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        """Return what unpickles as the reward itself."""
        import cloudpickle

        return cloudpickle.loads, (cloudpickle.dumps(self._reward),)


def name_of(reward: object) -> str:
    """Return "module:name" of a function. A partial or another object is in angle brackets, since no module has it under its name."""
    function = reward.func if isinstance(reward, functools.partial) else reward
    is_named = hasattr(function, "__qualname__")
    named: Any = function if is_named else type(function)
    name = getattr(named, "__qualname__", "")
    shown = f"<partial {name}>" if function is not reward else name if is_named else f"<{name}>"
    return f"{getattr(named, '__module__', '') or 'builtins'}:{shown}"


def is_importable(reward: object) -> bool:
    """Return whether a fresh process finds this very object under `name_of`."""
    module, _, names = name_of(reward).partition(":")
    found: Any = sys.modules.get(module)
    if module == "__main__" or found is None or getattr(found, "__spec__", None) is None:
        return False
    for name in names.split("."):
        found = getattr(found, name, None)
    return found is reward and importlib.util.find_spec(module) is not None
