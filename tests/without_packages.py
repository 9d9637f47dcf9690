"""A worker that runs command lines as an installation without some packages would; each in a fork, so that all is imported once.

Standard input: a JSON list of [packages, command line]. Standard output: a JSON list of [exit code, output, error].
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from cli_fuzz import run_line

# What commands import anyway, imported before the forks where some fork has it; a fork that lacks it has it taken out again.
COMMON = ("torch", "reinforce_ada.ops", "transformers", "safetensors.torch", "rich.progress", "matplotlib.figure")


# transformers remembers what it found when it was imported.
REMEMBERS = {"transformers": {"accelerate", "gguf", "safetensors"}}


class Without:
    """A finder that finds what another does, but for these packages, as if they were not there."""

    def __init__(self, finder: Any, packages: Sequence[str]) -> None:
        self._finder, self._packages = finder, packages

    def find_spec(self, name: str, *more: Any) -> Any:
        return None if name.partition(".")[0] in self._packages else self._finder.find_spec(name, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def run_without(packages: Sequence[str], line: list[str]) -> tuple[int | None, str, str]:
    """(exit code, output, error) of a command line where these packages are not installed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        stale = {*packages, *(top for top, found in REMEMBERS.items() if found & set(packages))}
        for name in [name for name in sys.modules if name.partition(".")[0] in stale]:
            del sys.modules[name]
        sys.meta_path[:] = [Without(finder, packages) for finder in sys.meta_path]
        ended = run_line(line)
        with os.fdopen(write, "w") as answer:
            json.dump([ended.code, ended.out, ended.error], answer)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        found = json.load(answer)
    os.waitpid(child, 0)
    return tuple(found)


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    for name in COMMON:
        if any(name.partition(".")[0] not in packages for packages, _ in cases):
            importlib.import_module(name)
    print(json.dumps([run_without(packages, line) for packages, line in cases]), flush=True)
