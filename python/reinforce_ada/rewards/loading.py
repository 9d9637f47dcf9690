"""Refuse what cannot be called as a reward before any process starts, and turn results of rewards into numbers."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import traceback
from decimal import Decimal
from typing import Any

from reinforce_ada.errors import InputError

MAX_REWARD = 1e15  # in magnitude: sums of its squares over a batch are finite in float32, the dtype of the gradients
_TRACEBACK_CHARS = 2000  # a chunk of 16 answers must fit in the buffer of a socket, or the worker waits for the pool to read
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


def describe(error: BaseException) -> tuple[str, str]:
    """Return what a reward raised: one line, and the end of the traceback."""
    line = " ".join(traceback.format_exception_only(type(error), error)[-1].split())
    return line[:300], "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]


def check_reward(reward: object, shown: str, where: str = "reward") -> None:
    """Raise InputError, naming the reward as it is `shown`, if it cannot be called with (prompt, text), or would not return a number."""
    if not callable(reward):
        raise InputError(where, f"{shown} is not callable", _CALLED_WITH)
    if inspect.isclass(reward):
        raise InputError(where, f"{shown} is a class", _CALLED_WITH, "an object of it can be a reward")
    for form in (reward, getattr(reward, "__call__", None), getattr(reward, "batch", None)):  # noqa: B004 - the method itself
        plain = form.func if isinstance(form, functools.partial) else form
        if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
            given, needed = f"{shown} is an async function", "one that returns a number is needed: nobody awaits it"
            raise InputError(where, given, needed, "await it inside the sample function of reinforce_ada.arun")
        if inspect.isgeneratorfunction(plain):
            raise InputError(where, f"{shown} is a generator function", "one that returns a number is needed")
    try:
        signature = inspect.signature(reward)
    except (ValueError, TypeError):  # some builtins have no signature
        return
    try:
        signature.bind(None, "")
    except TypeError as error:
        raise InputError(where, f"{shown}: {error}", _CALLED_WITH) from error
