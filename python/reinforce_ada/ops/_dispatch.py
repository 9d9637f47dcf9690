"""Which form of an operator runs: the registry of op x backend, with the reason where a form cannot run.

A form is one implementation of an operator's contract. Every operator declares its forms once, in its own package; a form that
does not exist is not declared. "auto" is the first usable form
for the device and dtype, in the order of `BACKENDS`.

`ops/X/contract.py` defines the inputs and outputs of a native form of X, and makes torch operators of the kernels in the module of a
backend, `ops/X/<backend>.py`; `operator` finds them here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import torch

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.ops import _gpu, _native
from reinforce_ada.ops._torch import run_when_traced

BACKENDS = ("cuda", "triton", "cpu", "reference")  # the order of preference


class BackendError(InputError):
    """The error for a backend that was requested and cannot run; the message says why, and which backends can."""

    def __init__(self, op: str, backend: str, reason: str, usable: tuple[str, ...]) -> None:
        message = f'{op}: backend "{backend}" cannot run here: {reason}. Usable: {", ".join(usable)}. See reinforce-ada doctor.'
        ValueError.__init__(self, message)


@dataclass(frozen=True, slots=True)
class Form:
    """One implementation of an operator: the device types and dtypes it takes (None: any), what of the operator's settings it does not
    support, and why it is missing, if it is."""

    backend: str
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    missing: Callable[[], str | None] = lambda: None
    lacks: tuple[str, ...] = ()

    def why_not(self, device: torch.device, dtype: torch.dtype, needs: tuple[str, ...] = ()) -> str | None:
        """Return the reason why this form cannot take such tensors here or does not support what is needed; None if it can."""
        if reason := self.missing():
            return reason
        if self.devices is not None and device.type not in self.devices:
            return f"it takes tensors on {' or '.join(self.devices)}, not {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {', '.join(map(_name, self.dtypes))}, not {_name(dtype)}"
        for setting in needs:
            if setting in self.lacks:
                return f"it does not take {setting}"
        return None


_forms: dict[str, dict[str, Form]] = {}
_traced = torch.compiler.is_compiling
_Asked: TypeAlias = tuple[str, str, str, torch.dtype, tuple[str, ...]]
_resolved: dict[_Asked, Form] = {}  # what was asked and found before: 0.3 us a call instead of 1.1


def declare(op: str, *forms: Form) -> None:
    """Register the forms of `op`; the reference is always one of them, so "auto" always finds a form."""
    by_backend = {form.backend: form for form in forms}
    assert "reference" in by_backend, f"{op} has no reference form"
    _forms[op] = {backend: by_backend[backend] for backend in BACKENDS if backend in by_backend}
    _resolved.clear()


_NATIVE: dict[str, tuple[Callable[[], tuple[str, ...]], Callable[[], str | None]]] = {  # backend -> the devices it takes, why it is missing
    "cuda": (_gpu.cuda_devices, _gpu.cuda_missing),
    "triton": (_gpu.triton_devices, _gpu.triton_missing),
    "cpu": (lambda: ("cpu",), _native.missing),
}
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def declare_native(op: str, *backends: str, lacks: tuple[str, ...] = (), make: Callable[[str, Any], Any]) -> None:
    """Declare the native forms of `op`, besides its reference; `make(backend, kernels)` makes the torch operators of a module of kernels.

    The operators of the cpu form are made now, since a program that torch has exported asks for them by name. The others are made when they
    are first needed, because their modules import Triton or the CUDA module.
    """
    native = (Form(backend, _NATIVE[backend][0](), _NATIVE_DTYPES, _NATIVE[backend][1], lacks) for backend in backends)
    declare(op, *native, Form("reference"))
    _makers[op] = make
    _make(op, "cpu")


_makers: dict[str, Callable[[str, Any], Any]] = {}
_operators: dict[tuple[str, str], Any] = {}


def operator(op: str, backend: str) -> Any:
    """Return what `make` of `declare_native` has made for a backend."""
    found = _operators.get((op, backend))
    if found is None:
        _make(op, backend)
        found = _operators[op, backend]
    return found


@run_when_traced  # tracing could not follow how an operator is made
def _make(op: str, backend: str) -> None:
    if (op, backend) not in _operators:
        _operators[op, backend] = _makers[op](backend, import_module(f"reinforce_ada.ops.{op}.{backend}"))


def forms(op: str) -> Mapping[str, Form]:
    """Return the declared forms of `op` by backend, in order of preference."""
    return _forms[op]


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype, needs: tuple[str, ...] = ()) -> str:
    """Return the backend that runs `op` on such tensors.

    Args:
        op: name of the operator.
        backend: "auto", or one of `BACKENDS`.
        device, dtype: of the tensors the operator works on.
        needs: what the call asks for that not every form supports, in the words of `Form.lacks`.

    Returns:
        The name of a usable form: `backend` itself, or for "auto" the first in order of preference.

    Raises:
        InputError: an unknown backend, or one that cannot run, with the reason.
    """
    if _traced():  # which must not depend on what was called before
        return _resolve(op, backend, device, dtype, needs)
    asked = (op, backend, device.type, dtype, needs)
    form = _resolved.get(asked)
    if form is None or form.missing() is not None:
        form = _resolved[asked] = _forms[op][_resolve(op, backend, device, dtype, needs)]
    return form.backend


def _resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype, needs: tuple[str, ...]) -> str:
    declared = _forms[op]
    if backend == "auto":
        return next(name for name, form in declared.items() if form.why_not(device, dtype, needs) is None)
    if backend not in BACKENDS:
        raise unknown_name(op, "backend", backend, ("auto", *BACKENDS))
    reason = declared[backend].why_not(device, dtype, needs) if backend in declared else "this version has no such form"
    if reason is not None:
        usable = tuple(name for name, form in declared.items() if form.why_not(device, dtype, needs) is None)
        raise BackendError(op, backend, reason, usable)
    return backend


def table() -> dict[str, dict[str, str]]:
    """Return, for every operator and every form it declares, "ok" or the reason why it cannot run here."""
    return {op: {backend: form.missing() or "ok" for backend, form in declared.items()} for op, declared in _forms.items()}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
