"""Checks of the policy losses, before any native code sees an address; `where` is the operator that was called."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.ops._checks import FLOATING, describe
from reinforce_ada.ops._ragged import check_cu_seqlens, first_wrong_offset, wrong_offset
from reinforce_ada.ops.policy_loss.contract import Settings
from reinforce_ada.ops.policy_loss.custom import shown
from reinforce_ada.ops.policy_loss.reference import BUILT_IN
from reinforce_ada.ops.policy_loss.settings import (
    ADVANTAGES_PER,
    KL_ESTIMATORS,
    KL_WEIGHTINGS,
    LOSS_AGGS,
    RATIO_LEVELS,
    RolloutCorrection,
    check_integers,
)

_NUMBERS = (
    *("clip_low", "clip_high", "dual_clip", "log_ratio_bound", "num_tokens_global", "num_seqs_global", "norm_length"),
    *("kl_coef", "kl_bound", "entropy_coef"),
)


def check_layout(where: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
    """Check for packed [T] with cu_seqlens, or padded [N, L] without."""
    if tokens.ndim != (2 if cu_seqlens is None else 1):
        given = f"{name} of shape {list(tokens.shape)} with{'out' if cu_seqlens is None else ''} cu_seqlens"
        raise InputError(where, given, "packed [T] with cu_seqlens, or padded [N, L] without")
    if cu_seqlens is not None:
        check_cu_seqlens(where, cu_seqlens, tokens.device)


def check_tensors(where: str, tokens: Tensor, mask: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Check that there is one value per token, in the shape of `tokens` and on its device."""
    shape, device = tokens.shape, tokens.device
    if mask.shape != shape or mask.device != device or mask.dtype not in (torch.bool, *FLOATING):
        raise InputError(where, f"mask is {describe(mask)}", f"{list(shape)} bool or floating on {device}")
    for name, x in others.items():
        if x is not None and (x.shape != shape or x.device != device or x.dtype not in FLOATING):
            raise InputError(where, f"{name} is {describe(x)}", f"{list(shape)} floating on {device}, one value a token")


def advantages_are_per_token(where: str, tokens: Tensor, cu_seqlens: Tensor | None, advantages: Tensor, per: str | None) -> bool:
    """Return whether there is one advantage per token, not one per sequence: `per` says so, or else the shape."""
    if per not in (None, *ADVANTAGES_PER):
        raise unknown_name(where, "advantages_per", per, ADVANTAGES_PER)
    shape, num_seqs = tokens.shape, tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    of_tokens, of_sequences = advantages.shape == shape and per != "sequence", tuple(advantages.shape) == (num_seqs,) and per != "token"
    if not (of_tokens or of_sequences) or advantages.device != tokens.device or advantages.dtype not in FLOATING:
        forms = {"sequence": f"[{num_seqs}] (one a sequence)", "token": f"{list(shape)} (one a token)"}
        needed = f"floating on {tokens.device}, {forms[per] if per else ' or '.join(forms.values())}"
        raise InputError(where, f"advantages is {describe(advantages)}", needed)
    if of_tokens and of_sequences and cu_seqlens is not None and not _of_one_token_each(cu_seqlens):
        given = f"advantages {list(shape)} for as many tokens as sequences"
        raise InputError(where, given, "to know which of them they belong to", 'advantages_per="sequence" or advantages_per="token"')
    return of_tokens and not of_sequences


def _of_one_token_each(cu_seqlens: Tensor) -> bool:
    """Return whether these tokens are known to be one per sequence; on another device and under tracing, more than one token is not."""
    if cu_seqlens.shape[0] <= 2 or torch.compiler.is_compiling() or not cu_seqlens.is_cpu:
        return cu_seqlens.shape[0] <= 2
    return bool((cu_seqlens.diff() == 1).all())


_PLAIN = frozenset((str, int, float, bool, type(None), RolloutCorrection))


def checked_settings(where: str, others: Mapping[str, Tensor | None], *values: Any) -> Settings:
    """Return the settings of these values, in the order of the fields, after checking that they fit each other and the tensors.

    A run passes the same values at every call, so they are checked once: the check takes 7 us of the 38 of a small call.
    """
    kept = _PLAIN.issuperset(map(type, values)) and not torch.compiler.is_compiling()
    settings = (_settings_of_plain if kept else _settings_of)(where, *values)
    _check_companions(where, settings, others)
    return settings


def _settings_of(where: str, *values: Any) -> Settings:
    settings = Settings(*values)
    _check_settings(where, settings)
    return settings


_settings_of_plain = lru_cache(maxsize=64)(_settings_of)


def _check_settings(where: str, s: Settings) -> None:
    _check_names(where, s)
    check_integers(where, s, _NUMBERS)
    if not (0 <= s.clip_low <= 1 and s.clip_high >= 0):
        raise InputError(where, f"clip_low={s.clip_low}, clip_high={s.clip_high}", "0 <= clip_low <= 1 and clip_high >= 0")
    if s.dual_clip is not None and not (s.loss == "ppo" and s.dual_clip > 1):
        raise InputError(where, f"dual_clip={s.dual_clip} with loss={shown(s.loss)}", 'dual_clip > 1 with loss="ppo"')
    if s.ratio_level == "sequence" and s.loss == "gspo":
        raise InputError(where, 'ratio_level="sequence" with loss="gspo"', "one of them", 'loss="ppo" where the gradient is to be spread')
    if s.ratio_level == "sequence" and not isinstance(s.loss, str):
        raise InputError(
            where, f'ratio_level="sequence" with loss={shown(s.loss)}', "a built-in loss", "a custom loss makes its ratios itself"
        )
    for name in ("log_ratio_bound", "num_tokens_global", "num_seqs_global", "norm_length", "kl_bound"):
        value = getattr(s, name)
        if value is not None and not value > 0:
            raise InputError(where, f"{name}={value}", f"{name} > 0")
    if s.norm_length is not None and s.loss_agg != "seq-mean-token-sum-norm":
        raise InputError(where, f"norm_length={s.norm_length} with loss_agg={s.loss_agg!r}", 'loss_agg="seq-mean-token-sum-norm"')


def _check_names(where: str, s: Settings) -> None:
    for kind, value, known in (
        ("loss", s.loss if isinstance(s.loss, str) else None, tuple(BUILT_IN)),
        ("ratio_level", s.ratio_level, RATIO_LEVELS),
        ("loss_agg", s.loss_agg, LOSS_AGGS),
        ("kl", s.kl, KL_ESTIMATORS),
        ("kl_weighting", s.kl_weighting, KL_WEIGHTINGS),
    ):
        if value is not None and value not in known:
            raise unknown_name(where, kind, value, known)


def _check_companions(where: str, s: Settings, others: Mapping[str, Tensor | None]) -> None:
    if s.kl is None and s.kl_coef != 0:
        raise InputError(where, f"kl_coef={s.kl_coef} without kl", "kl, the estimator", f"one of {', '.join(KL_ESTIMATORS)}")
    if s.kl is None and s.kl_weighting != "none":
        raise InputError(where, f"kl_weighting={s.kl_weighting!r} without kl", "kl, the estimator")
    if (s.kl is None) != (others["ref_logprobs"] is None):
        given = "ref_logprobs without kl" if s.kl is None else f"kl={s.kl!r} without ref_logprobs"
        raise InputError(where, given, "both or neither")
    if s.rollout_correction is not None and others["rollout_logprobs"] is None:
        raise InputError(where, "rollout_correction without rollout_logprobs", "rollout_logprobs, the engine's")


def check_offsets(where: str, cu_seqlens: Tensor | None, num_tokens: int) -> None:
    """Check the values of cu_seqlens; a traced tensor has none to check."""
    if cu_seqlens is None or torch.compiler.is_compiling():
        return
    at = first_wrong_offset(cu_seqlens, num_tokens)
    if at is not None:
        raise wrong_offset(where, cu_seqlens, at, num_tokens)
