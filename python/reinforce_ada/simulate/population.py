"""The simulated prompts: their pass rates, and the outcomes and lengths of their completions as functions of their identity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.config.values import Range, check_fields
from reinforce_ada.errors import InputError
from reinforce_ada.outside import GarbageError, one_line, parse_json, read_text
from reinforce_ada.sampling import History
from reinforce_ada.simulate.engine_model import LengthModel

_WEYL = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_MOST_BYTES = 256 << 20  # a file of this size has ten million pass rates
_OUTCOME, _RADIUS, _ANGLE, _PROMPT_RADIUS, _PROMPT_ANGLE, _EARLIER = range(6)  # streams of random numbers


_Shape = Annotated[float, Range(1e-6, 10**6)]


@dataclass(frozen=True)
class BetaRates:
    """Pass rates drawn from Beta(a, b)."""

    a: _Shape = 1.0
    b: _Shape = 2.0

    def __post_init__(self) -> None:
        check_fields("BetaRates", self)

    def __str__(self) -> str:
        return f"Beta({self.a:.3g}, {self.b:.3g})"

    def draw(self, num_prompts: int, seed: int) -> NDArray[np.float64]:
        """Return pass rates [num_prompts] float64."""
        return np.random.default_rng([seed, num_prompts]).beta(self.a, self.b, num_prompts)


@dataclass(frozen=True)
class GivenRates:
    """Given pass rates: all of them in order if there are as many as prompts, and random draws from them otherwise."""

    rates: tuple[float, ...]
    name: str = "given rates"

    def __post_init__(self) -> None:
        if not self.rates:
            raise InputError(self.name, "no pass rates", "at least one is needed")
        for rate in self.rates:
            if not 0 <= rate <= 1:
                raise InputError(self.name, f"pass rate {rate}", "a number from 0 to 1 is needed")

    def __str__(self) -> str:
        return self.name

    def draw(self, num_prompts: int, seed: int) -> NDArray[np.float64]:
        """Return pass rates [num_prompts] float64."""
        rates = np.array(self.rates)
        return rates if num_prompts == len(rates) else np.random.default_rng([seed, num_prompts]).choice(rates, num_prompts)


Population = BetaRates | GivenRates


def read_rates(path: Path) -> GivenRates:
    """Read pass rates from a file: a JSON list, or one number per line (the last column of a CSV; a heading is skipped).

    Raises: InputError if the file cannot be read or has other content.
    """
    try:
        text = read_text(path, _MOST_BYTES)
    except GarbageError as e:
        raise InputError("simulate", f"cannot read {path}: {e}", "a file of pass rates is needed") from e
    try:
        return GivenRates(tuple(_listed(text) if path.suffix == ".json" else _lines(text)), path.name)
    except InputError:
        raise
    except (ValueError, OverflowError) as e:
        given = f"{path}: {one_line(str(e))}"
        raise InputError("simulate", given, "a JSON list of pass rates, or one a line, is needed") from e


def _listed(text: str) -> Iterator[float]:
    rates = parse_json(text)
    if not isinstance(rates, list) or not all(isinstance(rate, (int, float)) for rate in rates):
        raise ValueError("not a list of numbers")
    return map(float, rates)


def _lines(text: str) -> Iterator[float]:
    cells = [line.rpartition(",")[2].strip() for line in text.splitlines() if line.strip()]
    return map(float, cells[1:] if cells and not _is_number(cells[0]) else cells)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class World:
    """The outcomes and lengths of all possible completions, each a hash of (seed, prompt, index).

    Every policy and schedule meets the same completions, so differences between them are not chance.

    Args:
        rates: pass rate of each prompt, [P].
        lengths: the model of completion lengths.
        seed: the seed of the hash.
    """

    def __init__(self, rates: NDArray[np.float64], lengths: LengthModel, seed: int) -> None:
        self._rates = rates
        self._lengths = lengths
        self._seed = seed
        factor = lengths.sigma_prompt * self._normal(_PROMPT_RADIUS, _PROMPT_ANGLE, np.arange(len(rates)), np.zeros(1, np.int64))
        self._log_median = (math.log(lengths.median_wrong) + factor, math.log(lengths.median_correct) + factor)

    @property
    def num_prompts(self) -> int:
        return len(self._rates)

    def histories(self, num_earlier: int) -> list[History]:
        """Return the history of each prompt after `num_earlier` completions in earlier steps: Beta(1 + correct, 1 + wrong)."""
        correct = np.zeros(self.num_prompts, np.int64)
        for index in range(num_earlier):
            correct += self._uniform(_EARLIER, np.arange(self.num_prompts), np.array([index])) < self._rates
        known = {k: History(1.0 + k, 1.0 + num_earlier - k) for k in range(num_earlier + 1)}
        return [known[k] for k in correct.tolist()]

    def draw(self, prompt_of: NDArray[np.int64], index: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return (correct, tokens) of completions, both [N]."""
        correct = self._uniform(_OUTCOME, prompt_of, index) < self._rates[prompt_of]
        wrong_median, right_median = self._log_median
        median = np.where(correct, right_median[prompt_of], wrong_median[prompt_of])
        tokens = np.rint(np.exp(median + self._lengths.sigma * self._normal(_RADIUS, _ANGLE, prompt_of, index)))
        return correct, np.clip(tokens, 1, self._lengths.max_tokens).astype(np.int64)

    def _normal(self, radius: int, angle: int, prompt_of: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return normal numbers by Box and Muller: sqrt(-2 log u) cos(2 pi v)."""
        u, v = self._uniform(radius, prompt_of, index), self._uniform(angle, prompt_of, index)
        normal: NDArray[np.float64] = np.sqrt(-2 * np.log(u)) * np.cos(2 * math.pi * v)
        return normal

    def _uniform(self, stream: int, prompt_of: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return numbers in (0, 1) [N] float64, by SplitMix64 over (seed, stream), then the prompt, then the index.

        Source: Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195.
        """
        key = np.full(1, (self._seed * 8 + stream) % 2**64, np.uint64)
        for part in (prompt_of, index):
            key = _mix(key + (part.astype(np.uint64) + np.uint64(1)) * _WEYL)
        return ((key >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
