"""The methods of TRL's GRPOTrainer that are overridden, and whether a class or an installed TRL has them as they are needed."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.outside import installed_version, is_installed

# The parameters of each, from TRL 1.0.0 to 1.16.0. They are private: a later version may change any of them.
HOOKS: Mapping[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("inputs",),
    "_generate": ("prompts",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
}


def check_hooks(trainer_class: type[Any]) -> None:
    """Raise InputError for a class whose hooks differ."""
    methods = {name: getattr(trainer_class, name, None) for name in HOOKS}
    parameters = {name: [*inspect.signature(method).parameters][1:] for name, method in methods.items() if method is not None}
    if wrong := _difference(parameters):
        raise InputError("adaptive", f"{trainer_class.__name__} of TRL {version()}: {wrong}", needed())


def version() -> str:
    """Return the version of TRL."""
    return installed_version("trl")


def needed(name: str = "") -> str:
    """Return what TRL must have, in words."""
    return f"that of TRL 1.0 to 1.16 is needed: {', '.join([name] if name else HOOKS)}"


def state() -> str:
    """Return "ok" if the installed TRL has the hooks, and otherwise why not.

    TRL's source is read instead of imported, which takes seconds and imports vLLM.
    """
    if not is_installed("trl"):
        return "trl is not installed"
    spec = importlib.util.find_spec("trl")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        source = Path(folder, "trainer", "grpo_trainer.py")
        if source.is_file():
            wrong = _difference(_parameters_in(source.read_text()))
            return f"{wrong}; {needed()}" if wrong else "ok"
    return f"it has no trainer/grpo_trainer.py; {needed()}"


def _parameters_in(source: str) -> dict[str, list[str]]:
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "GRPOTrainer"]
    methods = [node for c in classes for node in c.body if isinstance(node, ast.FunctionDef) and node.name in HOOKS]
    return {method.name: [a.arg for a in method.args.args][1:] for method in methods}


def _difference(found: Mapping[str, Sequence[str]]) -> str:
    """Return the first hook that is missing or takes other parameters; "" if all fit."""
    for name, parameters in HOOKS.items():
        if name not in found:
            return f"it has no {name}"
        if tuple(found[name]) != parameters:
            return f"its {name} takes ({', '.join(found[name])}) instead of ({', '.join(parameters)})"
    return ""
