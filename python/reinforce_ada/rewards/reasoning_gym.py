"""Tasks of reasoning_gym: their entries, and their own scoring as a reward. reasoning_gym is imported on use (1 s)."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Callable, Hashable
from typing import Any

from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.rewards.answers import extract_answer
from reinforce_ada.rewards.exact import answer_given
from reinforce_ada.types import Prompt


class ReasoningGymReward:
    """The dataset's own `score_answer` on the entry in `prompt.data` (question, answer, metadata).

    `extract_answer` finds the answer in the completion. A text on which the scorer raises is a wrong answer, 0.0, as long as the scorer
    accepts the entry's own answer; if it raises on that too, the exception is passed on. Many datasets give partial credit: set the
    sampler's positive_threshold to match. The reward is pickled as its arguments; a worker builds the dataset again while it loads, outside
    the time limit.

    Args:
        dataset: a registered name, such as "chain_sum".
        **config: the dataset's settings.
    Raises: InputError for an unknown dataset or setting, or when reasoning_gym is missing.
    """

    def __init__(self, dataset: str, **config: Any) -> None:
        self._dataset = dataset
        self._config = config
        self._task = _create(dataset, config)

    def __call__(self, prompt: Prompt, completion: str) -> float:
        try:
            return self._score(extract_answer(completion), prompt)
        except Exception:  # some scorers parse the text as what they expect: a number, a list, a move
            own = prompt.data.get("answer")
            self._score("" if own is None else str(own), prompt)
            return 0.0

    def answer(self, completion: str) -> Hashable | None:
        """Return the text that is scored, with numbers in one form; None if it is empty."""
        return answer_given(completion)

    def _score(self, answer: str, prompt: Prompt) -> float:
        return float(self._task.score_answer(answer, copy.deepcopy(dict(prompt.data))))

    def __reduce__(self) -> tuple[Callable[[], ReasoningGymReward], tuple[()]]:
        return functools.partial(ReasoningGymReward, self._dataset, **self._config), ()


def make_entries(dataset: str, size: int, seed: int, **config: Any) -> list[dict[str, Any]]:
    """Return `size` entries of a dataset with these settings, each {"question", "answer", "metadata"}; the same for the same seed.

    Raises: InputError as ReasoningGymReward does.
    """
    task = _create(dataset, {**config, "size": size, "seed": seed})
    return [dict(task[i]) for i in range(size)]


def _create(dataset: str, config: dict[str, Any]) -> Any:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise InputError("reasoning_gym", "the package is not installed", "it is needed for this task", "pip install reasoning-gym")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise unknown_name("reasoning_gym", "dataset", dataset, DATASETS)
    try:
        return reasoning_gym.create_dataset(dataset, **config)
    except (TypeError, AssertionError, ValueError) as error:  # a setting that the dataset does not have, or out of its range
        raise InputError("reasoning_gym", f"{dataset} with {config}: {error}", "settings that dataset takes are needed") from error
