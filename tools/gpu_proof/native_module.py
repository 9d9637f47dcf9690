"""Loading of a native module from a file, in the place of the one that is installed."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def load_as(name: str, path: str | Path) -> ModuleType:
    """Load the module in `path` and return it; whoever imports `name` from now on gets it."""
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
