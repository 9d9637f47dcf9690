"""Load what "module:function" or "file.py:function" names; whatever keeps it from being found is reported in one line."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line


def load(where: str, kind: str, spec: str) -> Any:
    """Return the object that `spec` names, "module:function" or "path/to/file.py:function"; messages name `where` and `kind`.

    Raises: InputError, in one line, if there is none: no such module or file, any exception of its code, no such function in it.
    """
    place, separator, names = spec.rpartition(":")
    if not separator or not place or not names:
        raise InputError(where, f"{kind} {spec!r}", 'the form "module:function" or "file.py:function" is needed')
    module = _module(place, where, f"{kind} {spec!r}")
    found: Any = module
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except Exception as error:  # a module may have a __getattr__ of its own
            given = f"{kind} {spec!r}: {module.__name__} ({getattr(module, '__file__', None) or 'built in'}) has no attribute {name!r}"
            raise InputError(where, given, "a function of that module is needed", _hint(place, module, names)) from error
    return found


def is_file(module: str) -> bool:
    """Return whether the part before the colon names a file rather than a module."""
    return module.endswith(".py") or os.sep in module


def whole(spec: str, folder: Path | None = None) -> str:
    """Return `spec` in a form that loads from anywhere: a file, or a module that only `folder` has, by its absolute path.

    A relative path starts from `folder`, by default the working folder.
    """
    module, colon, function = spec.rpartition(":")
    start = folder or Path()
    if is_file(module):
        return f"{(start / module).absolute()}{colon}{function}"
    here = str((start / f"{module}.py").absolute())
    if "." not in module and os.path.isfile(here) and _origin(module) in (here, None):
        return f"{here}{colon}{function}"
    return spec


def _origin(module: str) -> str | None:
    with suppress(ValueError):  # a module that is there without a file
        found = importlib.util.find_spec(module)
        return found.origin if found else None
    return None


def _module(place: str, where: str, named: str) -> ModuleType:
    try:
        return _from_file(Path(place), where, named) if is_file(place) else importlib.import_module(place)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        hint = f'"./{place}.py:..." loads a file' if error.name == place.partition(".")[0] else "it is imported there"
        raise InputError(where, f"{named}: {error}", "an importable module is needed", hint) from error
    except BaseException as error:  # whatever the code of a module raises, an exit included
        if isinstance(error, KeyboardInterrupt):
            raise
        given = f"{named}: {place} does not import ({described(error)})"
        raise InputError(where, given, "a module that imports is needed") from error


def _from_file(path: Path, where: str, named: str) -> ModuleType:
    path = path.absolute()
    if not os.path.isfile(path):
        raise InputError(where, f"{named}: there is no file {path}", "a Python file is needed")
    # One name for one file: its definitions can then be pickled, and it collides with no file of the same name and no installed module.
    name = f"{path.stem}_{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InputError(where, f"{named}: {path} is no Python file", "a name that ends with .py is needed")
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


def _hint(place: str, module: ModuleType, names: str) -> str:
    """Return how to name the file, if another module was found although a file of that name is here."""
    here = Path(f"{place.replace('.', os.sep)}.py")
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
