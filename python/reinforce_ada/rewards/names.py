"""What `--reward` may say: names of rewards, functions of one's own, and weights; and what each name needs of a record."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reinforce_ada.errors import InputError, did_you_mean, needs
from reinforce_ada.loading import load, whole
from reinforce_ada.outside import one_line
from reinforce_ada.rewards.choice import choice_match, options_of_answers
from reinforce_ada.rewards.exact import answer_given, exact_match
from reinforce_ada.rewards.json_value import json_match, values_of_answers
from reinforce_ada.rewards.latex import MathMatch, formula_given
from reinforce_ada.rewards.loading import check_reward
from reinforce_ada.rewards.number import number_given, number_match, readable_answers
from reinforce_ada.rewards.protocol import Answer, Answering, Reward
from reinforce_ada.rewards.unit_tests import UnitTests, tests_of
from reinforce_ada.rewards.weighted import WeightedSum, check_weight
from reinforce_ada.types import Prompt


class BuiltIn(NamedTuple):
    """A reward with a name. All of them give a number from 0 to 1."""

    reward: Reward
    needs_answer: bool = True  # a record without an answer is refused
    check: Callable[[Prompt], object] | None = None  # raises InputError for a record that the reward cannot use
    package: str = ""  # that it needs
    runs_code: bool = False  # of the model, so that it must be allowed
    answer: Answer | None = None  # what a completion answers, without its prompt: the votes of maj@k


BUILT_IN: Mapping[str, BuiltIn] = {
    "choice": BuiltIn(choice_match, check=options_of_answers),
    "exact": BuiltIn(exact_match, answer=answer_given),
    "json": BuiltIn(json_match, check=values_of_answers),
    "math": BuiltIn(MathMatch(), package="math_verify", answer=formula_given),
    "number": BuiltIn(number_match, check=readable_answers, answer=number_given),
    "python": BuiltIn(UnitTests(), needs_answer=False, check=tests_of, runs_code=True),
}
FLAG = "--reward"
_WEIGHT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# What a program that trains has, too, which is known by such names: "__main__:f.<locals>.g", "__main__:<lambda>", "my:<partial score>".
_FUNCTION = re.compile(r"(?:[^\W0-9]\w*|<[^<>:,]+>)(?:\.(?:[^\W0-9]\w*|<[^<>:,]+>))*")


class Part(NamedTuple):
    """One reward of a sum: a name or "module:function", and its weight."""

    reward: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.reward if self.weight == 1 else f"{self.reward}:{self.weight:.12g}"


def parts_of(spec: str) -> list[Part]:
    """Return the rewards of a text such as "number, my_rewards.py:form:0.2" with their weights.

    A comma separates rewards, and ":0.2" at the end of one is its weight, as no function has such a name. A comma inside a path stays
    there, unless what stands before it is a reward by itself. Raises: InputError for a text that is neither a name nor names a function.
    """
    parts: list[Part] = []
    held = ""
    for piece in spec.split(","):
        held = f"{held},{piece}" if held else piece.strip()
        reward, _, last = held.rpartition(":")
        part = Part(reward, float(last)) if reward and _WEIGHT.fullmatch(last) else Part(held)
        if _is_whole(part.reward):
            if part.weight != 1:
                check_weight(part.weight, FLAG)
            parts.append(part)
            held = ""
        elif not any(mark in held for mark in (":", os.sep, ".")):
            raise _unknown(held)
    if held or not parts:
        raise _unknown(held)
    return parts


def load_reward(spec: str, *, run_code: bool = False) -> Reward:
    """Return the reward that a text names, with several or with a weight as a WeightedSum.

    Raises: InputError if there is none, if it lacks a package, or if it runs the model's code and `run_code` does not allow that.
    """
    parts = parts_of(spec)
    rewards = [_loaded(part.reward, run_code) for part in parts]
    if len(parts) == 1 and parts[0].weight == 1:
        return rewards[0]
    return WeightedSum([(part.weight, reward) for part, reward in zip(parts, rewards, strict=True)])


def whole_reward(spec: str, folder: Path | None = None) -> str:
    """Return a text that names the same rewards from anywhere; relative paths start from `folder`, by default the working folder."""
    return _joined(spec, lambda reward: whole(reward, folder))


def without_folders(spec: str) -> str:
    """Return a text that names files without their folders, which are those of one machine."""
    return _joined(spec, os.path.basename)


def comparable(spec: str) -> str:
    """Return a text that is the same for a file wherever it stands, and for its module; to compare the rewards of two runs."""
    return without_folders(spec).replace(".py:", ":")


def _joined(spec: str, change: Callable[[str], str]) -> str:
    return ",".join(str(part._replace(reward=change(part.reward))) for part in parts_of(spec)) if spec else ""


# -------------------- records and thresholds


def needs_answer(spec: str) -> bool:
    """Return whether one of the rewards reads the answer of a record."""
    return any(BUILT_IN[part.reward].needs_answer for part in parts_of(spec) if part.reward in BUILT_IN)


def check_records(spec: str, records: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise InputError for the first record that one of the rewards cannot use, before anything is scored."""
    checks = [check for part in parts_of(spec) if part.reward in BUILT_IN and (check := BUILT_IN[part.reward].check)]
    for number, record in enumerate(records if checks else (), 1):
        for check in checks:
            try:
                check(Prompt(str(number), data=record))
            except InputError as error:
                raise InputError("task", f"{where}, record {number}", str(error)) from None


def check_threshold(spec: str, threshold: float) -> None:
    """Raise InputError if named rewards with these weights make every completion correct, or none."""
    parts = parts_of(spec)
    if any(part.reward not in BUILT_IN for part in parts):
        return
    least, most = (sum(pick(0.0, part.weight) for part in parts) for pick in (min, max))
    if not least <= threshold < most:
        given = f"{spec} gives {least:g} to {most:g}, and positive_threshold is {threshold:g}"
        needed = "a completion is correct when its reward exceeds the threshold, so that a threshold between the two is needed"
        raise InputError(FLAG, given, needed, "--positive-threshold sets it")


# -------------------- votes


def answer_of_reward(reward: object) -> Answer | None:
    """Return the function that reads a completion's answer; None for a reward that names none, and for several.

    Args:
        reward: an object with a method `answer`, a reward of ours, or the name of one of these.
    """
    if isinstance(reward, str):
        parts = parts_of(reward)
        if len(parts) > 1:
            return None
        name = parts[0].reward
        reward = BUILT_IN[name].reward if name in BUILT_IN else _loaded(name, run_code=False)
    if isinstance(reward, Answering):
        return reward.answer
    return next((built_in.answer for built_in in BUILT_IN.values() if built_in.reward is reward), None)


# -------------------- one reward


def _is_whole(reward: str) -> bool:
    return reward in BUILT_IN or (reward.isprintable() and _FUNCTION.fullmatch(reward.rpartition(":")[2]) is not None and ":" in reward[1:])


def _loaded(reward: str, run_code: bool) -> Reward:
    if reward in BUILT_IN:
        built_in = BUILT_IN[reward]
        if built_in.runs_code and not run_code:
            given, needed = f"reward {reward!r} runs code that the model wrote", "run_code = true (--run-code true) is needed to allow it"
            raise InputError(FLAG, given, needed, "docs/rewards.md says what its sandbox does not protect from")
        if built_in.package:
            needs(f"reward {reward}", built_in.package)
        return built_in.reward
    if is_of_a_program(reward):
        given, needed = (
            f"reward {reward!r} belongs to the program that called reinforce_ada.train",
            "that program is needed to go on",
        )
        raise InputError(FLAG, given, needed, "or --reward names another, where that may change")
    found: Reward = load(FLAG, "reward", reward)
    check_reward(found, f"reward {reward!r}", FLAG)
    return found


def is_of_a_program(reward: str) -> bool:
    """Return whether a name stands for a reward that only the program has which called `reinforce_ada.train`."""
    return reward.startswith("__main__:") or "<" in reward.rpartition(":")[2]


def _unknown(reward: str) -> InputError:
    needed = f'one of {", ".join(BUILT_IN)}, or the form "module:function" or "file.py:function" is needed'
    return InputError(FLAG, f"reward {one_line(repr(reward))}", needed, did_you_mean(reward, BUILT_IN))
