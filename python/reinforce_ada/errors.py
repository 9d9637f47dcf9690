"""The one shape of every error that a user can cause: `<where>: <what was given>; <what is needed>[; what to do]`."""

from __future__ import annotations

import copyreg
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from reinforce_ada.outside import is_installed, one_line

# The extra that installs each package that a base install lacks, by the package's import name; tests compare it with pyproject.toml.
EXTRA_OF = {
    **dict.fromkeys(
        (
            "accelerate",
            "cloudpickle",
            "gguf",
            "httpx",
            "huggingface_hub",
            "reasoning_gym",
            "rich",
            "safetensors",
            "tomli_w",
            "transformers",
        ),
        "train",
    ),
    **dict.fromkeys(("matplotlib", "pyarrow", "tensorboardX"), "report"),
    **dict.fromkeys(("cut_cross_entropy", "liger_kernel"), "bench"),
    "argcomplete": "completion",
    "datasets": "datasets",
    "math_verify": "math",
    "peft": "lora",
    "ray": "ray",
    "trl": "trl",
    "vllm": "vllm",
}


class InputError(ValueError):
    """An argument cannot be used; the message is one line and says what would be right."""

    def __init__(self, where: str, given: str, needed: str, hint: str = "") -> None:
        super().__init__(f"{where}: {given}; {needed}" + (f"; {hint}" if hint else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the finished message rather than its parts, so that it arrives unchanged from another process."""
        return copyreg.__newobj__, (type(self), str(self))  # type: ignore[attr-defined]


class EngineLost(RuntimeError):  # noqa: N818 - an end, not a mistake
    """No replica of an engine was available for too long; everything that was scored is in the journal."""


def unknown_name(where: str, kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return an InputError for `name` not among `known`, naming the nearest valid one."""
    names = sorted(known)
    return InputError(where, f"unknown {kind} {one_line(repr(name))}", f"known: {', '.join(names)}", did_you_mean(name, names))


def did_you_mean(name: object, known: Iterable[str], *, likeness: float = 0.5) -> str:
    """Return the question that names the nearest of `known`; "" if none is as like as `likeness`, where 1 is equal."""
    nearest = difflib.get_close_matches(str(name)[:100], list(known), n=1, cutoff=likeness)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def not_installed(where: str, package: str, hint: str = "") -> InputError:
    """Return the InputError for an optional package that is missing; it names the extra that installs it."""
    extra = EXTRA_OF.get(package)
    return InputError(
        where, f"{package} is not installed", f'pip install "reinforce-ada[{extra}]"' if extra else f"pip install {package}", hint
    )


def needs(where: str, package: str, hint: str = "") -> None:
    """Raise InputError if an optional package is not installed."""
    if not is_installed(package):
        raise not_installed(where, package, hint)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return "lr=1e-05 (now 1e-06)", for the first three keys of two configurations that differ; "" if none does."""
    before, after = dict(_flat(then)), dict(_flat(now))
    keys = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    shown = ", ".join(f"{k}={before.get(k, 'absent')} (now {after.get(k, 'absent')})" for k in keys[:3])
    return shown + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
