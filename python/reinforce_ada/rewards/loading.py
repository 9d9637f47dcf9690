"""Load a reward by name, and turn its results into numbers. A reward that cannot work is refused before any process starts."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line

MAX_REWARD = 1e15  # in magnitude: sums of its squares over a batch are finite in float32, the dtype of the gradients
_CALLED_WITH = "(prompt, completion text) -> float is needed"


def as_reward(value: object) -> float:
    """Return a reward function's result as a finite float.

    Args:
        value: the result of the function: a real number (bool, Decimal and numpy scalars too) or a 0-dimensional array or tensor.
    Returns: the float, at most `MAX_REWARD` in magnitude.
    Raises: TypeError for anything else (None, str, a longer array, a coroutine), ValueError for NaN, infinities and larger numbers,
        OverflowError for an integer past the floats.
    """
    if type(value) is float:
        return _bounded(value)
    if inspect.iscoroutine(value):
        value.close()  # otherwise Python warns that it was never awaited
    scalar: Any = value
    if getattr(scalar, "ndim", None) == 0:
        scalar = scalar.item()
    if not isinstance(scalar, (numbers.Real, Decimal)):
        raise TypeError(f"the reward returned {type(value).__name__} {value!r:.80}, not a float")
    return _bounded(float(scalar))


def _bounded(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"the reward returned {number}, not a finite float")
    if abs(number) > MAX_REWARD:
        raise ValueError(f"the reward returned {number:g}, more than {MAX_REWARD:g} in magnitude")
    return number


def resolve(spec: str) -> Callable[..., object]:
    """Return the object that "module:function" or "path/to/file.py:function" names.

    Raises: InputError, in one line, if there is none: no such module or file, any exception of its code, no such function in it.
    """
    where, separator, names = spec.rpartition(":")
    if not separator or not where or not names:
        raise InputError("RewardPool", f"reward {spec!r}", 'the form "module:function" or "file.py:function" is needed')
    module = _module(where, spec)
    found: Any = module
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except Exception as error:  # a module may have its own __getattr__
            given = f"reward {spec!r}: {module.__name__} ({getattr(module, '__file__', None) or 'built in'}) has no attribute {name!r}"
            raise InputError("RewardPool", given, "a function of that module is needed", _hint(where, module, names)) from error
    return found  # type: ignore[no-any-return]


def is_file(module: str) -> bool:
    """Return whether the part before the colon names a file rather than a module."""
    return module.endswith(".py") or os.sep in module


def _module(where: str, spec: str) -> ModuleType:
    try:
        return _from_file(Path(where), spec) if is_file(where) else importlib.import_module(where)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        hint = f'"./{where}.py:..." loads a file' if error.name == where.partition(".")[0] else "it is imported there"
        raise InputError("RewardPool", f"reward {spec!r}: {error}", "an importable module is needed", hint) from error
    except BaseException as error:  # the code of a module may raise anything, including an exit
        if isinstance(error, KeyboardInterrupt):
            raise
        given = f"reward {spec!r}: {where} does not import ({described(error)})"
        raise InputError("RewardPool", given, "a module that imports is needed") from error


def _from_file(path: Path, spec: str) -> ModuleType:
    path = path.absolute()
    if not os.path.isfile(path):
        raise InputError("RewardPool", f"reward {spec!r}: there is no file {path}", "a Python file is needed")
    # One name for one file: its definitions can then be pickled, and it collides with no file of the same name and no installed module.
    name = f"{path.stem}_{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InputError("RewardPool", f"reward {spec!r}: {path} is no Python file", "a name that ends with .py is needed")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for its neighbours; last, so that they hide no installed module
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _hint(where: str, module: ModuleType, names: str) -> str:
    """Return how to name the file, if another module was found although a file of that name is here."""
    here = Path(f"{where.replace('.', os.sep)}.py")
    if os.path.isfile(here) and str(here.absolute()) != getattr(module, "__file__", None):
        return f"another module has that name; ./{here}:{names} loads the file"
    return ""


def described(error: BaseException) -> str:
    """Return, for example, "ValueError: no such answer, at rewards.py:12", in one line."""
    text = "".join(traceback.format_exception_only(type(error), error)[-1:])
    frames = traceback.extract_tb(error.__traceback__)
    place = f", at {frames[-1].filename}:{frames[-1].lineno}" if frames and not isinstance(error, SyntaxError) else ""
    if isinstance(error, SyntaxError):
        place = f", at {error.filename}:{error.lineno}"
        text = f"{type(error).__name__}: {error.msg}"
    return one_line(text) + place


def check_reward(reward: object, shown: str) -> None:
    """Raise InputError, naming the reward, if it cannot be called with (prompt, text), or would not return a number."""
    if not callable(reward):
        raise InputError("RewardPool", f"reward {shown} is not callable", _CALLED_WITH)
    if inspect.isclass(reward):
        raise InputError("RewardPool", f"reward {shown} is a class", _CALLED_WITH, "an object of it can be a reward")
    for form in (reward, getattr(reward, "__call__", None), getattr(reward, "batch", None)):  # noqa: B004 - the method itself
        plain = form.func if isinstance(form, functools.partial) else form
        if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
            raise InputError("RewardPool", f"reward {shown} is an async function", "one that returns a number is needed: nobody awaits it")
        if inspect.isgeneratorfunction(plain):
            raise InputError("RewardPool", f"reward {shown} is a generator function", "one that returns a number is needed")
    try:
        signature = inspect.signature(reward)
    except (ValueError, TypeError):  # some builtins have no signature
        return
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise InputError("RewardPool", f"reward {shown}: {error}", _CALLED_WITH) from error
