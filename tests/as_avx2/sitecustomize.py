"""Makes vLLM take its AVX2 build on a processor that has AVX-512; Python imports this at its start where the folder is on PYTHONPATH.

vLLM asks `torch.cpu` which instruction sets there are, and has no switch of its own. Everything else obeys an environment variable; the
Makefile's AS_AVX2 sets them all.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _PatchTorchCpu:
    """Loads `torch.cpu` as it is, then lets its questions about AVX-512 and AMX be answered with no."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            for question in dir(module):
                if question.startswith(("_is_avx512", "_is_amx", "_is_vnni")):
                    setattr(module, question, lambda: False)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _PatchTorchCpu())  # type: ignore[arg-type]
