"""Events of a rollout store, for its tests."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from reinforce_ada.types import Completion, CompletionId, Event, Scored


def scored(prompt_id: str, index: int, reward: float, *, step: int = 1, version: int = 1, tokens: Sequence[int] = (5, 6)) -> Scored:
    logprobs = -np.arange(1, len(tokens) + 1) / 3
    id_ = CompletionId(step, prompt_id, index)
    return Scored(Completion(id_, np.array(tokens), logprobs, f"text {prompt_id}{index}", "stop", version), reward)


def bits(event: Event) -> tuple[Any, ...]:
    """An event as something that is equal exactly when every bit is."""
    if isinstance(event, Scored):
        c = event.completion
        arrays = tuple((a.dtype.str, a.shape, a.tobytes()) for a in (c.token_ids, c.rollout_logprobs, c.token_mask) if a is not None)
        return (Scored, c.id, *arrays, c.text, c.finish_reason, c.policy_version, struct.pack("d", event.reward))
    return (type(event), *(getattr(event, f.name) for f in fields(event)))


def assert_same(got: Sequence[Event], expected: Sequence[Event]) -> None:
    assert [bits(e) for e in got] == [bits(e) for e in expected]
