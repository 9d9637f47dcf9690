"""A completion with all that TRL keeps of it, and the tuple of such that TRL's `_generate` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from reinforce_ada.errors import InputError
from reinforce_ada.integrations.trl.hooks import TRL

_NUM_FIXED = 4  # prompt_ids, completion_ids, tool_mask and completions come first in every version


@dataclass(frozen=True)
class Row:
    """One completion: what TRL generated, what the reward functions gave and logged."""

    prompt_ids: list[int]
    completion_ids: list[int]
    tool_mask: list[int] | None  # 1 for the model's own tokens
    completion: Any  # a text, or messages
    logprobs: list[float] | None
    extra_fields: Mapping[str, Any]  # of a rollout_func
    extra_logs: Mapping[str, Any] = field(default_factory=dict)  # column of the completions' table -> value
    rewards: tuple[float, ...] = ()  # of each reward function; nan for None
    reward: float = 0.0  # their weighted sum; nan if none gave any

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that the model generated."""
        return len(self.completion_ids) if self.tool_mask is None else sum(self.tool_mask)

    def as_padding(self) -> Row:
        """Return the row with its first token alone and without rewards.

        Where every completion token is masked, the first one still has the logprob it had unmasked, as it follows the prompt. A ratio of
        the two is then 1 and cannot overflow into inf * 0.
        """
        return replace(
            self,
            completion_ids=self.completion_ids[:1],
            tool_mask=None if self.tool_mask is None else self.tool_mask[:1],
            logprobs=None if self.logprobs is None else self.logprobs[:1],
            rewards=(math.nan,) * len(self.rewards),
            reward=math.nan,
        )


class Generated:
    """The tuple that `_generate` returned, as a form into which other rows can be put.

    After the first four items it has 3 in TRL 1.0, 5 in 1.8 and 4 in 1.16: a tensor with the number of tokens (up to 1.8), logprobs, the
    fields of a rollout_func, images.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = tuple(items)
        counts = [i for i in range(_NUM_FIXED, len(items)) if isinstance(items[i], torch.Tensor)]
        others = [i for i in range(_NUM_FIXED, len(items)) if i not in counts]
        if len(others) < 2 or not isinstance(items[others[1]], dict):
            raise InputError("adaptive", f"_generate of TRL {TRL.version()} returned {len(items)} items", TRL.needed("_generate"))
        if any(items[i] for i in others[2:]):
            raise InputError("adaptive", "prompts with images", "prompts of text are needed")
        self._counts, self._logprobs_at, self._extra_at = counts, *others[:2]

    @property
    def counts_tokens(self) -> bool:
        """Return whether the number of tokens to divide by comes from here; later versions count them afterwards."""
        return bool(self._counts)

    def rows(self) -> list[Row]:
        """Return what was generated, without rewards."""
        prompt_ids, completion_ids, tool_mask, completions = self._items[:_NUM_FIXED]
        logprobs, extra = self._items[self._logprobs_at], self._items[self._extra_at]
        return [
            Row(
                list(prompt_ids[i]),
                list(completion_ids[i]),
                None if tool_mask is None else list(tool_mask[i]),
                completions[i],
                None if logprobs is None else list(logprobs[i]),
                {name: values[i] if isinstance(values, list) else values for name, values in extra.items()},
            )
            for i in range(len(completion_ids))
        ]

    def with_rows(self, rows: Sequence[Row], num_tokens: int) -> tuple[Any, ...]:
        """Return a tuple of the same form with these rows, and this number of tokens over all processes."""
        items = list(self._items)
        items[0], items[1] = [r.prompt_ids for r in rows], [r.completion_ids for r in rows]
        items[2] = None if items[2] is None else [r.tool_mask for r in rows]
        items[3] = [r.completion for r in rows]
        items[self._logprobs_at] = None if items[self._logprobs_at] is None else [r.logprobs for r in rows]
        items[self._extra_at] = {name: [r.extra_fields[name] for r in rows] for name in items[self._extra_at]}
        for i in self._counts:
            items[i] = torch.full_like(items[i], num_tokens)
        return tuple(items)
