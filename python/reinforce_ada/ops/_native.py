"""The native module `reinforce_ada._cpu`, or the reason it is not there: absent and broken are different."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

# Before the native module: both ask for libgomp.so.1, and the copy that torch brings then serves both.
import torch  # noqa: F401

from reinforce_ada.errors import InputError

if TYPE_CHECKING:
    from reinforce_ada import _cpu as cpu

__all__ = ["cpu", "missing"]


def _load() -> tuple[Any, str | None]:
    if find_spec("reinforce_ada._cpu") is None:
        return None, "reinforce_ada._cpu is not built (install with a C++17 compiler present)"
    try:
        module = import_module("reinforce_ada._cpu")
    except ImportError as error:
        return None, f"reinforce_ada._cpu does not import: {error}"
    isa = os.environ.get("REINFORCE_ADA_ISA")
    if isa is not None:
        try:
            module.limit_isa(isa)
        except ValueError as error:
            usable = ", ".join(module.build_info()["usable_isas"])
            raise InputError("REINFORCE_ADA_ISA", str(error), f"usable here: {usable}", "or leave it unset") from None
    return module, None


if not TYPE_CHECKING:
    cpu, _reason = _load()
else:
    _reason: str | None = None


def missing() -> str | None:
    """Return why the native module cannot be used; None if it can."""
    return _reason
