"""A bounded sample of the completions of a store, for a page that shows them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reinforce_ada.rollouts.rows import utf8

# The columns of the tokens are not read. A text is cut by SQLite, so that a long one is never in memory as a whole; the length of one that
# is kept as bytes (see `sql_text`) is in bytes.
_POOLS = """
SELECT prompt_id, num_correct, num_wrong, num_void, substr(text, -:most), COALESCE(length(text), 0),
       CASE WHEN length(data) <= :most THEN data END
FROM pools WHERE step = :step ORDER BY position LIMIT :prompts
"""
_COMPLETIONS = """
SELECT e.idx, e.reward, e.num_tokens, e.finish_reason, c.kept, substr(e.text, 1, :most), COALESCE(length(e.text), 0)
FROM events e JOIN committed c ON c.seq = e.seq
WHERE e.step = :step AND e.prompt_id = :prompt ORDER BY c.kept DESC, e.idx LIMIT :completions
"""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The end of a prompt, or the beginning of a completion; all of it if it is short."""

    text: str
    is_cut: bool


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """A completion of a pool; a void one has no reward and no tokens."""

    index: int
    text: Excerpt
    reward: float | None
    num_tokens: int | None
    finish_reason: str
    is_kept: bool  # in the group that was trained on


@dataclass(frozen=True, slots=True)
class SampledPool:
    """A pool of a finished step, with some of its completions: the kept ones first, each part in the order of the requests."""

    step: int
    prompt_id: str
    prompt: Excerpt
    data: str | None  # the prompt's record as JSON, None if it is longer than an excerpt
    num_correct: int
    num_wrong: int
    num_void: int
    completions: tuple[SampledCompletion, ...]

    @property
    def num_completions(self) -> int:
        return self.num_correct + self.num_wrong + self.num_void


def sample(
    connection: sqlite3.Connection, step: int, *, num_prompts: int, num_completions: int, num_characters: int
) -> Iterator[SampledPool]:
    """Yield the first pools of a finished step, see `RolloutStore.sample`."""
    limits = {"step": step, "most": num_characters, "prompts": num_prompts, "completions": num_completions}
    for prompt_id, correct, wrong, void, text, length, data in connection.execute(_POOLS, limits).fetchall():
        rows = connection.execute(_COMPLETIONS, {**limits, "prompt": prompt_id})
        completions = tuple(_completion(num_characters, *row) for row in rows)
        name, prompt = utf8(prompt_id) or "", Excerpt(utf8(text) or "", length > num_characters)
        yield SampledPool(step, name, prompt, utf8(data), correct, wrong, void, completions)


def _completion(
    most: int, index: int, reward: Any, num_tokens: int | None, reason: Any, kept: int, text: str | bytes | None, length: int
) -> SampledCompletion:
    number = float(reward) if isinstance(reward, (int, float)) else None
    return SampledCompletion(index, Excerpt(utf8(text) or "", length > most), number, num_tokens, utf8(reason) or "", bool(kept))
