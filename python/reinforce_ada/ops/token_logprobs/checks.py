"""Checks shared by the operators that score tokens: one line each, before any native code sees an address."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.ops._checks import FLOATING, IGNORED, describe

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of numbers that kernels take


def check_matrix(where: str, name: str, tensor: Tensor) -> None:
    """Check for a floating [rows, columns] tensor whose rows are contiguous; the rows may lie any distance apart."""
    if tensor.ndim != 2 or tensor.dtype not in FLOATING:
        raise InputError(where, f"{name} is {describe(tensor)}", "[rows, columns] of a floating dtype", "flatten with x.flatten(0, -2)")
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise InputError(where, f"{name} has stride {tensor.stride()}", "stride 1 in the last dimension", f"{name}.contiguous()")


def check_tokens(where: str, token_ids: Tensor, num_tokens: int, device: torch.device) -> None:
    """Check for token ids [T], int64 or int32, one for each row."""
    if token_ids.dtype not in (torch.int64, torch.int32) or tuple(token_ids.shape) != (num_tokens,) or token_ids.device != device:
        raise InputError(where, f"token_ids is {describe(token_ids)}", f"[{num_tokens}] int64 or int32 on {device}")


def check_temperature(where: str, temperature: float | Tensor, num_tokens: int, device: torch.device) -> None:
    """Check for a positive finite number, or [T] of a floating dtype without gradient, whose values `check_values` checks."""
    if isinstance(temperature, Tensor):
        if temperature.dtype not in FLOATING or tuple(temperature.shape) != (num_tokens,) or temperature.device != device:
            given = f"temperature is {describe(temperature)}"
            raise InputError(where, given, f"a number, or a floating tensor [{num_tokens}] on {device}")
        if temperature.requires_grad:
            raise InputError(where, "temperature requires a gradient", "one without: it is a constant here", "temperature.detach()")
    elif not _SMALLEST <= temperature <= _LARGEST:
        raise InputError(where, f"temperature={temperature}", "a positive finite number", "of float32's range")


def check_head(where: str, logit_scale: float, soft_cap: float | None) -> None:
    """Check for a finite scale, and a positive finite soft cap or None."""
    if not -_LARGEST <= logit_scale <= _LARGEST or (soft_cap is not None and not _SMALLEST <= soft_cap <= _LARGEST):
        given = f"logit_scale={logit_scale}, soft_cap={soft_cap}"
        raise InputError(where, given, "a finite scale, and None or a positive finite soft cap")


def check_bias(where: str, bias: Tensor | None, weight: Tensor) -> None:
    """Check for a bias [V] of the dtype and device of the weight [V, D], or None."""
    vocab = weight.shape[0]
    if bias is not None and (tuple(bias.shape) != (vocab,) or bias.dtype != weight.dtype or bias.device != weight.device):
        raise InputError(where, f"bias is {describe(bias)}", f"[{vocab}], dtype and device of the weight")


def check_values(where: str, token_ids: Tensor, vocab: int, temperature: float | Tensor) -> None:
    """Check that every id is in [0, vocab) or -100, and every temperature positive and finite. On a GPU this waits for the device."""
    wrong = (token_ids != IGNORED) & ((token_ids < 0) | (token_ids >= vocab))
    if bool(wrong.any()):
        raise wrong_token(where, token_ids, int(wrong.nonzero()[0, 0]), vocab)
    if isinstance(temperature, Tensor):
        check_temperature_values(where, temperature)


def check_temperature_values(where: str, temperature: Tensor) -> None:
    """Check that every temperature is positive and finite."""
    wrong = ~((temperature > 0) & (temperature < math.inf))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise InputError(where, f"temperature[{row}] = {temperature[row].item()}", "positive finite temperatures")


def wrong_token(where: str, token_ids: Tensor, row: int, vocab: int) -> InputError:
    """Return the error for an id outside the vocabulary."""
    return InputError(where, f"token_ids[{row}] = {int(token_ids[row])}", f"ids in [0, {vocab}), or {IGNORED} to ignore a row")
