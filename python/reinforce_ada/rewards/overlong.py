"""A penalty for completions that come close to the limit of their length."""

from __future__ import annotations

from dataclasses import dataclass

from reinforce_ada.errors import InputError
from reinforce_ada.types import Completion


@dataclass(frozen=True, slots=True)
class OverlongPenalty:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), times `most`.

    With |y| tokens that the policy wrote: 0 up to `longest - buffer`, -most at `longest` and beyond, linear between. `RewardPool` adds it
    to the reward, in its own process, since a reward sees the text and not its tokens. Raises: InputError unless 0 < buffer <= longest.
    """

    longest: int  # L_max, tokens
    buffer: int  # L_cache, tokens
    most: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.buffer <= self.longest:
            raise InputError("OverlongPenalty", f"buffer {self.buffer}", f"1 to longest = {self.longest} tokens are needed")

    def __call__(self, completion: Completion) -> float:
        """Return the penalty of a completion, from -most to 0."""
        over = completion.num_written - (self.longest - self.buffer)
        return -self.most * min(max(over, 0), self.buffer) / self.buffer + 0.0  # not -0.0
