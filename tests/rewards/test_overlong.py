"""DAPO's soft overlong punishment by its formula, alone and in the pool."""

from __future__ import annotations

import numpy as np
import pytest

from reinforce_ada import config
from reinforce_ada.errors import InputError
from reinforce_ada.rewards import OverlongPenalty, RewardPool
from reinforce_ada.training.task_defaults import completed
from reinforce_ada.types import Completion, CompletionId, Prompt, Scored


def completion(prompt_id: str, num_tokens: int, num_written: int | None = None) -> Completion:
    mask = None if num_written is None else np.arange(num_tokens) < num_written
    return Completion(CompletionId(1, prompt_id, 0), np.arange(num_tokens), np.zeros(num_tokens), "7", "stop", 0, token_mask=mask)


@pytest.mark.parametrize(
    ("num_tokens", "penalty"), [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (20481, -1.0), (40000, -1.0)]
)
def test_the_formula_of_the_paper(num_tokens: int, penalty: float) -> None:
    """L_max 20480 and L_cache 4096 are those of its experiments."""
    assert OverlongPenalty(20480, 4096)(completion("p", num_tokens)) == penalty
    assert OverlongPenalty(20480, 4096, most=0.25)(completion("p", num_tokens)) == penalty / 4
    assert np.signbit(OverlongPenalty(20480, 4096)(completion("p", 3))) == np.False_


def test_only_what_the_policy_wrote_counts() -> None:
    assert OverlongPenalty(8, 4)(completion("p", 20, num_written=6)) == -0.5


def test_the_pool_adds_it_to_the_reward() -> None:
    lengths = [4, 6, 8]
    with RewardPool("exact", num_workers=1, penalty=OverlongPenalty(8, 4)) as pool:
        prompts = [Prompt(str(n), data={"answer": answer}) for answer in ("7", "8") for n in lengths]
        pool.submit(prompts, [completion(f"{i}", n) for i, n in enumerate(lengths * 2)])
        found: dict[str, float] = {}
        while len(found) < 6:
            found |= {e.id.prompt_id: e.reward for e in pool.poll(60.0) if isinstance(e, Scored)}
    assert [found[str(i)] for i in range(6)] == [1.0, 0.5, 0.0, 0.0, -0.5, -1.0]


@pytest.mark.parametrize("buffer", [0, 9, -1])
def test_a_buffer_out_of_range_is_refused(buffer: int) -> None:
    with pytest.raises(InputError, match=r"^OverlongPenalty: buffer .*; 1 to longest = 8 tokens are needed$"):
        OverlongPenalty(8, buffer)


def test_a_buffer_longer_than_a_completion_is_refused() -> None:
    with pytest.raises(InputError, match=r"^config: overlong_buffer = 13 with max_tokens = 12; a buffer of at most max_tokens$"):
        config.load(None, {"overlong_buffer": "13", "max_tokens": "12"})
    with pytest.raises(InputError, match=r"^config: overlong_buffer = 13 with max_tokens = 12; a buffer of at most max_tokens$"):
        completed(config.load(None, {"overlong_buffer": "13"}))  # a generated task's own
    assert config.load(None, {"overlong_buffer": "12", "overlong_penalty": "0.25"}).task.overlong_penalty == 0.25
