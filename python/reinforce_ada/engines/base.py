"""The engine protocol: anything that turns requests into completions.

An engine is polled; it never calls back. `submit` takes at most `free_slots` requests, `poll` advances the engine and returns what has
finished since the last call (possibly nothing), in any order. Completions that end because of `abort` may be returned with
finish_reason "abort" or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

from reinforce_ada.types import Completion, CompletionId, Request


@runtime_checkable
class Engine(Protocol):
    """What the driver loop needs of a generator."""

    @property
    def free_slots(self) -> int:
        """How many more requests it can usefully take now."""
        ...

    def submit(self, requests: Sequence[Request]) -> None:
        """Start these requests. Raises InputError when a request cannot be served (an over-long prompt, say)."""
        ...

    def poll(self) -> list[Completion]:
        """Advance, and return the completions that finished since the last call."""
        ...

    def abort(self, ids: Sequence[CompletionId]) -> None:
        """Stop these requests; ids that are not running are ignored."""
        ...

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Take new weights; completions submitted from now on carry `policy_version`. Called with nothing in flight."""
        ...

    def close(self) -> None:
        """Release what it holds; further calls are errors."""
        ...
