"""What a sampler refuses, a custom policy, and that a run is the same in any process."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sampling_world import cid, kept, prompts_of, sample, scored

from reinforce_ada.errors import InputError
from reinforce_ada.sampling import AdaptiveSampler, Balance, Centered, Policy, Rounds, preset
from reinforce_ada.sampling.policies.select import Balanced
from reinforce_ada.types import Prompt

POS, BALANCE = "reinforce-ada-pos", "reinforce-ada-balance"
PACKAGE_ROOT = Path(sys.modules["reinforce_ada.sampling"].__file__).parents[2]


# -------------------- errors


@pytest.mark.parametrize(
    ("prompts", "policy", "options", "message"),
    [
        ([], POS, {}, "AdaptiveSampler: no prompts; at least one is needed"),
        (iter([]), POS, {"num_prompts": 1}, "AdaptiveSampler: no prompts"),
        (["a", "a"], POS, {}, "AdaptiveSampler: two prompts with id 'a'; distinct ids are needed"),
        (iter(["a"]), POS, {}, "an iterator of prompts; num_prompts is needed"),
        (["a", "b"], "dapo", {}, "policy 'dapo', which refills dropped prompts, without num_prompts"),
        (["a"], POS, {"num_prompts": 2}, "num_prompts 2 of 1 prompts"),
        (["a"], POS, {"num_prompts": 0}, "num_prompts 0; an integer of at least 1"),
        (["a"], POS, {"window": 0}, "window 0; an integer of at least 1"),
        (["a"], POS, {"window": 4, "schedule": "rounds"}, "window 4 with schedule 'rounds'; rounds have no window; leave it out"),
        (["a"], POS, {"window": lambda *_: 4, "schedule": "rounds"}, "Sampler: a window function with schedule 'rounds'; rounds have"),
        (["a"], POS, {"schedule": "streem"}, "unknown schedule 'streem'; known: rounds, stream; did you mean 'stream'?"),
    ],
)
def test_constructor_errors(prompts, policy: str, options: dict, message: str) -> None:
    made = [Prompt(p) for p in prompts] if isinstance(prompts, list) else map(Prompt, prompts)
    with pytest.raises(InputError) as caught:
        AdaptiveSampler(made, preset(policy), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_must_be_finite(reward: float) -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), preset(POS))
    sampler.next_requests(1)
    with pytest.raises(InputError, match=r"reward (nan|inf) for \(0, 'a', 0\); a finite reward is needed; send a Failed"):
        sampler.receive(scored(cid("a", 0), reward))


@pytest.mark.parametrize(("budgets", "given"), [([4, 0], "a budget of 0 completions"), ([9, 4], "a budget of 9"), ([4], "1 budgets of 2")])
def test_budgets_lie_between_one_and_the_cap(budgets: list[int], given: str) -> None:
    class Own(Rounds):
        def budgets(self, histories):
            return budgets

    policy = dataclasses.replace(preset("grpo"), allocate=Own(8, 1))
    with pytest.raises(InputError, match=f"Policy 'grpo': {given}"):
        AdaptiveSampler(prompts_of(["a", "b"]), policy)


def test_misuse() -> None:
    sampler = AdaptiveSampler(prompts_of(["a"]), preset(POS))
    with pytest.raises(InputError, match="1 of 1 prompts still active; every prompt must have exited"):
        sampler.result()
    with pytest.raises(InputError, match="free_slots -1"):
        sampler.next_requests(-1)


def test_a_policy_of_ones_own() -> None:
    """Hooks are plain callables, such as this selection of three completions."""

    @dataclasses.dataclass(frozen=True)
    class LastCorrect:
        def __call__(self, rewards, correct, group_size):
            return [i for i in range(len(rewards)) if correct[i]][-group_size:]

    policy = Policy("own", 2, Rounds(4, 1), Balance(0, 0), LastCorrect(), Centered("leave-one-out"), decide_every=4, min_pool=0)
    assert policy.select != Balanced()
    (group,) = sample(policy, a="+-++").groups
    assert kept(group) == [2, 3]


# -------------------- the process


SCRIPT = """
import random, sys
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import Completion, Prompt, Scored
assert "torch" not in sys.modules
sampler = AdaptiveSampler([Prompt(f"p{i}") for i in range(20)], preset("reinforce-ada-balance", decide_every=1))
trace, running, rng = [], [], random.Random(0)
while not sampler.done:
    running += [r.id for r in sampler.next_requests(64 - len(running))]
    i = running.pop(rng.randrange(len(running)))
    gone = sampler.receive(Scored(Completion(i, [], [], "", "stop", 0), float(rng.random() < .3)))
    trace.append((tuple(i), gone))
    running = [r for r in running if r not in gone]
print(trace, sampler.result().metrics, [[s.id for s in g.kept] for g in sampler.result().groups])
"""


def test_runs_are_identical_under_any_hash_seed_and_import_no_torch() -> None:
    outputs = []
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(PACKAGE_ROOT)}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 1000
