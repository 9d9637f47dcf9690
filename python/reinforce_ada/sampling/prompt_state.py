"""The state that the sampler keeps for one prompt while it is being sampled."""

from __future__ import annotations

from reinforce_ada.sampling.policies.contracts import History
from reinforce_ada.sampling.pool import GrowingPool
from reinforce_ada.types import ExitReason, Prompt


class PromptState(GrowingPool):
    """A growing pool with the requests of its prompt. Sets of indices are bit masks, which take a fifth of the memory of a set."""

    __slots__ = (
        "behind",
        "cap",
        "discarded",
        "exit",
        "history",
        "limit",
        "lost",
        "num_issued",
        "order",
        "outstanding",
        "prompt",
        "queued",
        "round_limit",
        "waits_for",
    )

    def __init__(self, order: int, prompt: Prompt, history: History, cap: int, positive_threshold: float) -> None:
        super().__init__(positive_threshold)
        self.order = order  # position in the source, which breaks ties
        self.prompt = prompt
        self.history = history
        self.cap = cap
        self.limit = cap  # no index at or past this will ever be committed
        self.num_issued = 0  # the next fresh index
        self.outstanding = 0  # mask of the indices handed out and not yet answered
        self.lost = 0  # mask of the indices to issue again
        self.discarded = 0  # mask of the indices whose answers will never be committed
        self.exit: ExitReason | None = None
        self.queued = False  # has an entry in the ready heap
        self.waits_for = 0  # the window it waits for; 0 if it waits for none
        self.round_limit = 0  # rounds: no index at or past this is issued before the next barrier
        self.behind = False  # rounds: the barrier waits for this prompt

    def is_answered(self, index: int) -> bool:
        return index < self.committed or self.has(index) or bool(self.discarded >> index & 1)

    def is_lost(self, index: int) -> bool:
        return bool(self.lost >> index & 1)

    def is_open(self, index: int) -> bool:
        """Return whether an answer at this index could still be committed."""
        return self.exit is None and self.committed <= index < min(self.num_issued, self.limit) and not self.has(index)

    def abort(self, first: int) -> list[int]:
        """Mark the outstanding requests from index `first` on as no longer outstanding, and return their indices."""
        aborted = indices_of(self.outstanding >> first << first)
        self.outstanding &= (1 << first) - 1
        return aborted


def indices_of(mask: int) -> list[int]:
    """Return the positions of the bits that are set, in increasing order."""
    found = []
    while mask:
        found.append((mask & -mask).bit_length() - 1)
        mask &= mask - 1
    return found
