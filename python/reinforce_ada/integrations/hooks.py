"""Whether a class or module of another library still has the functions that an adapter overrides or calls, with the parameters it knows."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reinforce_ada.errors import InputError
from reinforce_ada.outside import installed_version, is_installed


class Hooks(NamedTuple):
    """The methods of one class, or the functions of one module, that an adapter needs. A later version may change any of them."""

    package: str  # by its import name
    versions: str  # those that have the hooks, in words: "TRL 1.0 to 1.16"
    source: str  # the file of the class inside the package
    class_name: str  # "" for the functions of the module itself
    methods: Mapping[str, tuple[str, ...]]  # their parameters without self; "**kwargs" is one

    def needed(self, name: str = "") -> str:
        """Return what the library must have, in words."""
        return f"that of {self.versions} is needed: {', '.join([name] if name else self.methods)}"

    def version(self) -> str:
        """Return the installed version of the package."""
        return installed_version(self.package)

    def difference_of(self, owner: Any) -> str:
        """Return the first function that a class or module lacks or that takes other parameters; "" if all fit."""
        methods = {name: getattr(owner, name, None) for name in self.methods}
        signatures = {name: inspect.signature(method).parameters.values() for name, method in methods.items() if method is not None}
        # Ray adds a parameter to every method of a class that it makes an actor of.
        own = {name: [p for p in parameters if p.name != "_ray_trace_ctx"] for name, parameters in signatures.items()}
        return self._difference({name: [_shown(p) for p in given][self._num_skipped :] for name, given in own.items()})

    def check(self, where: str, owner: Any) -> None:
        """Raise InputError for a class or module whose functions differ."""
        if wrong := self.difference_of(owner):
            raise InputError(where, f"{self.class_name or self.source} of {self.package} {self.version()}: {wrong}", self.needed())

    @property
    def _num_skipped(self) -> int:
        return 1 if self.class_name else 0  # self

    def state(self) -> str:
        """Return "ok" if the installed package has the hooks, and otherwise why not.

        The source is read instead of imported, since the import of a trainer takes seconds.
        """
        if not is_installed(self.package):
            return f"{self.package} is not installed"
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            source = Path(folder, self.source)
            if source.is_file():
                wrong = self._difference(self._parameters_in(source.read_text()))
                return f"{wrong}; {self.needed()}" if wrong else "ok"
        return f"it has no {self.source}; {self.needed()}"

    def _parameters_in(self, source: str) -> dict[str, list[str]]:
        module = ast.parse(source)
        classes = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == self.class_name]
        owners = classes if self.class_name else [module]
        functions = [node for o in owners for node in o.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        return {f.name: _parameters(f.args)[self._num_skipped :] for f in functions if f.name in self.methods}

    def _difference(self, found: Mapping[str, Sequence[str]]) -> str:
        for name, parameters in self.methods.items():
            if name not in found:
                return f"it has no {name}"
            if tuple(found[name]) != parameters:
                return f"its {name} takes ({', '.join(found[name])}) instead of ({', '.join(parameters)})"
        return ""


def _shown(parameter: inspect.Parameter) -> str:
    stars: dict[Any, int] = {inspect.Parameter.VAR_POSITIONAL: 1, inspect.Parameter.VAR_KEYWORD: 2}
    return "*" * stars.get(parameter.kind, 0) + parameter.name


def _parameters(args: ast.arguments) -> list[str]:
    several = [f"*{args.vararg.arg}"] if args.vararg else []
    named = [f"**{args.kwarg.arg}"] if args.kwarg else []
    return [a.arg for a in (*args.posonlyargs, *args.args)] + several + [a.arg for a in args.kwonlyargs] + named
