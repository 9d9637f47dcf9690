"""Which Triton kernels the operators launch, and with what: recorded from public calls in which nothing runs.

Each launcher of the library decides block sizes, warps and stages itself. So nothing of that is repeated here: the public operators are
called, forward and backward, and a launch writes down its arguments instead of running. Two processes record:

- `record_launches.py` calls everything in `calls.py` and specialises every launch as Triton would for that backend;
- `watch` looks on in an interpreter run of the tests, where kernels do run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from gpu_proof import HERE, ROOT
from gpu_proof.records import leaves

__all__ = ["STORE", "Argument", "Launch", "code_of", "digest", "recorded", "variant_of", "watch"]

OPS = ROOT / "python/reinforce_ada/ops"
STORE = ROOT / "build/gpu"
BACKENDS = {"cuda": ("cuda", 90, 32), "hip": ("hip", "gfx942", 64)}  # all targets of a backend specialise a launch alike


class Argument(NamedTuple):
    """One argument of a launch; a tuple, because there are 200 000 and a pickle restores them in a fifth of a dataclass's time."""

    name: str
    kind: str  # "pointer", "scalar", "absent" (None) or "constexpr"
    dtype: str  # of what a pointer points to, or of the scalar
    value: Any  # the shape a pointer's tensor has, or the number


@dataclass(frozen=True)
class Launch:
    """One kernel with all that decides its machine code on one backend, and one example of where it was launched."""

    module: str
    kernel: str
    backend: str
    signature: tuple[tuple[str, Any], ...]  # of a parameter its type, or the record of the types of its fields
    constexprs: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]  # num_warps, num_stages and the like, where the launcher says them
    dtypes: tuple[str, ...] = field(compare=False)  # of the calls that lead to it
    grid: tuple[int, ...] = field(compare=False)
    arguments: tuple[Argument, ...] = field(compare=False)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """The type of every argument, those of a record by the names of its fields."""
        return {leaf.name: leaf.value for leaf in leaves(dict(self.signature))}

    @cached_property
    def divisible(self) -> set[str]:
        """The arguments that Triton was told to be multiples of 16."""
        known = {path for path, found in self.attributes if ("tt.divisibility", 16) in found}
        return {leaf.name for leaf in leaves(dict(self.signature)) if leaf.path in known}

    @property
    def constants(self) -> dict[str, Any]:
        """The constants of the code that the launcher names; not those that Triton makes of an absent tensor or of a 1."""
        return {a.name: a.value for a in self.arguments if a.kind == "constexpr"}

    @cached_property
    def flags(self) -> tuple[tuple[str, str], ...]:
        return flags_of(self.arguments)

    @cached_property
    def fullness(self) -> int:
        """How many of the flags are on."""
        return sum(value not in ("False", "0") for _, value in self.flags)

    @cached_property
    def code(self) -> str:
        return code_of(self.kernel, self.arguments, dict(self.options))

    @property
    def variant(self) -> tuple[str, frozenset[Any]]:
        return variant_of(self.kernel, self.arguments)

    @property
    def label(self) -> str:
        """Names one entry of the catalogue among the others of its kernel."""
        pointers = "/".join(dict.fromkeys(kind[1:] for kind in self.kinds.values() if kind.startswith("*")))
        flags = [name if value is True else f"{name}={value}" for name, value in self.constants.items() if value is not False]
        text = repr((self.signature, self.constexprs, self.attributes, self.options))
        return f"{self.kernel}[{','.join([pointers, *flags])}]-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def digest(*paths: Path) -> str:
    """Of everything in the files and folders: changes when any of it does."""
    found = hashlib.sha256()
    files = sorted(file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    for file in files:
        if file.is_file() and file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".cmake"):
            found.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


@cache
def recorded(backend: str) -> tuple[Launch, ...]:
    """Every launch of `calls.py` on "cuda" or "hip"; from the store where the sources are the same."""
    sources = digest(OPS, *(HERE / name for name in ("launches.py", "records.py", "record_launches.py", "calls.py")))
    files = {name: STORE / f"launches-{name}-{sources}.pickle" for name in BACKENDS}
    if not files[backend].is_file():
        STORE.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(ROOT / "python"), str(HERE.parent)])
        environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": path}
        environment.pop("TRITON_INTERPRET", None)
        children = {}
        for name, file in files.items():  # side by side: whoever needs one mostly needs both
            command: list[str | Path] = [
                sys.executable,
                "-m",
                "gpu_proof.record_launches",
                name,
                new := file.with_suffix(f".{os.getpid()}"),
            ]
            children[name, new] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for (name, new), child in children.items():
            output, _ = child.communicate()
            assert child.returncode == 0, f"recording the launches for {name} failed:\n{output}"
            new.replace(files[name])
    launches: tuple[Launch, ...] = pickle.loads(files[backend].read_bytes())
    return launches


def describe(names: dict[str, bool], arguments: dict[str, Any]) -> tuple[Argument, ...]:
    """The arguments of a launch, field by field; `names` says of each parameter whether it is a constexpr."""
    import torch

    def one(name: str, value: Any, constant: bool) -> Argument:
        if constant:
            return Argument(name, "constexpr", "", value)
        if value is None:
            return Argument(name, "absent", "", None)
        if isinstance(value, torch.Tensor):
            return Argument(name, "pointer", str(value.dtype).removeprefix("torch."), tuple(value.shape))
        return Argument(name, "scalar", type(value).__name__, value)

    constants = list(names.values())
    return tuple(one(leaf.name, leaf.value, constants[leaf.path[0]]) for leaf in leaves({name: arguments[name] for name in names}))


def code_of(kernel: str, arguments: tuple[Argument, ...], options: dict[str, Any]) -> str:
    """What tells launches apart except for numbers and alignment: types, absent tensors, constants, warps."""
    kinds = [(a.name, a.kind, str(a.value) if a.kind == "constexpr" else a.dtype) for a in arguments]
    return json.dumps([kernel, kinds, sorted((key, str(value)) for key, value in options.items())])


# Sizes of what a program works on. The interpreter, which is slow, gets smaller tiles.
BLOCKS = frozenset(("BLOCK", "WIDTH", "ROUNDS", "LANES", "GROUP"))
TILES = frozenset(("ROWS", "COLUMNS", "DEPTH", "INTERPRETED"))


def flags_of(arguments: tuple[Argument, ...]) -> tuple[tuple[str, str], ...]:
    """What a launcher has chosen: its constants except for sizes, and of each tensor whether it is there."""
    constants = [(a.name, str(a.value)) for a in arguments if a.kind == "constexpr" and a.name not in BLOCKS | TILES]
    return (*constants, *((a.name, str(a.kind == "pointer")) for a in arguments if a.kind in ("pointer", "absent")))


def variant_of(kernel: str, arguments: tuple[Argument, ...]) -> tuple[str, frozenset[Any]]:
    """The kernel, and every pair of its flags, every size and every type of a tensor."""
    pairs = combinations(flags_of(arguments), 2)
    single = [(a.name, str(a.value) if a.kind == "constexpr" else a.dtype) for a in arguments if a.kind == "pointer" or a.name in BLOCKS]
    return kernel, frozenset((*pairs, *single))


# -------------------- inside an interpreter run


@contextmanager
def watch() -> Iterator[set[tuple[str, frozenset[Any]]]]:
    """While it lasts, every launch in the interpreter puts its `Launch.variant` into the set."""
    from triton.runtime.interpreter import InterpretedFunction

    seen: set[tuple[str, frozenset[Any]]] = set()
    run: Callable[..., Any] = InterpretedFunction.run

    def watched(fn: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        parameters = inspect.signature(fn.fn).parameters
        bound = inspect.signature(fn.fn).bind(*args, **{key: value for key, value in kwargs.items() if key in parameters})
        bound.apply_defaults()
        names = {name: "constexpr" in str(parameter.annotation) for name, parameter in parameters.items()}
        seen.add(variant_of(fn.fn.__name__, describe(names, dict(bound.arguments))))
        return run(fn, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = watched
    try:
        yield seen
    finally:
        InterpretedFunction.run = run
