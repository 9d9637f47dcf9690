"""Helpers for the sampler's tests: events by hand, the sequential sampler as truth, and a world where everything goes wrong."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from hypothesis import strategies as st

from reinforce_ada.sampling import (
    AdaptiveSampler,
    Balance,
    Centered,
    Counts,
    History,
    InversePowerRate,
    Knapsack,
    Never,
    Policy,
    Positive,
    Refill,
    Rounds,
    Verdict,
)
from reinforce_ada.sampling.policies.contracts import Allocation, promises_of
from reinforce_ada.sampling.policies.decide import DropOneClass
from reinforce_ada.sampling.policies.select import All, Balanced, First
from reinforce_ada.types import (
    Aborted,
    Completion,
    CompletionId,
    Event,
    ExitReason,
    Failed,
    Group,
    Lost,
    Pool,
    Prompt,
    Request,
    SamplingResult,
    Scored,
)

REWARD_OF = {"+": 1.0, "-": 0.0}  # any other character is a void


def prompts_of(names: Sequence[str]) -> list[Prompt]:
    return [Prompt(name) for name in names]


def scored(request_id: CompletionId, reward: float, num_tokens: int = 1, policy_version: int = 0) -> Scored:
    tokens = np.zeros(num_tokens, np.int32)
    return Scored(Completion(request_id, tokens, np.zeros(num_tokens, np.float32), "", "stop", policy_version), reward)


def outcome(request_id: CompletionId, char: str, policy_version: int = 0) -> Scored | Failed:
    """Return the event of one scripted character."""
    if char in REWARD_OF:
        return scored(request_id, REWARD_OF[char], policy_version=policy_version)
    return Failed(request_id, policy_version, "void")


def answer(script: Mapping[str, str]) -> Callable[[CompletionId], Scored | Failed]:
    return lambda request_id: outcome(request_id, script[request_id.prompt_id][request_id.index])


def sequential(chars: str, policy: Policy) -> tuple[str, ExitReason]:
    """Return the pool of the sequential law that the sampler must follow: draw one after another, ask the exit rule where it is due."""
    correct = wrong = void = 0
    for drawn, char in enumerate(chars[: policy.cap], start=1):
        correct, wrong, void = correct + (char == "+"), wrong + (char == "-"), void + (char not in "+-")
        if (drawn % policy.decide_every == 0 or drawn == policy.cap) and correct + wrong >= policy.min_pool:
            verdict = policy.decide(Counts(correct, wrong, void))
            if verdict is Verdict.STOP:
                return chars[:drawn], "satisfied"
            if verdict is Verdict.DROP:
                return chars[:drawn], "dropped"
    return chars[: policy.cap], "exhausted"


def drawn(pool: Pool) -> tuple[str, ExitReason]:
    """Return a pool in the form of `sequential`, after checking that position, prompt and index agree."""
    assert [o.id.index for o in pool.outcomes] == list(range(len(pool.outcomes)))
    assert {o.id.prompt_id for o in pool.outcomes} == {pool.prompt.prompt_id}
    chars = "".join(("+" if o.reward else "-") if isinstance(o, Scored) else "v" for o in pool.outcomes)
    return chars, pool.exit


def finish(sampler: AdaptiveSampler, answer_of: Callable[[CompletionId], Event], *, slots: int = 64, rng: random.Random | None = None):
    """Drive the sampler to the end, answering one request at a time: in request order, or at random."""
    running: list[CompletionId] = []
    while not sampler.done:
        running += [r.id for r in sampler.next_requests(slots - len(running))]
        event = answer_of(running.pop(rng.randrange(len(running)) if rng else 0))
        aborted = set(sampler.receive(event))
        running = [i for i in running if i not in aborted]
    return sampler.result()


class Chaos:
    """Deliver answers in any order, twice, late, after losses and aborts, among events that belong to no request.

    It checks at each step what must always hold, and keeps the journal of everything it delivered.
    """

    def __init__(self, sampler: AdaptiveSampler, script: Mapping[str, str], rng: random.Random, *, slots: int, mess: float) -> None:
        self.sampler, self.script, self.rng, self.slots, self.mess = sampler, script, rng, slots, mess
        self.running: list[CompletionId] = []
        self.stray: list[CompletionId] = []  # lost or aborted, may answer all the same
        self.seeds: dict[CompletionId, int] = {}
        self.journal: list[Event] = []
        self.num_foreign = 0

    def issue(self) -> None:
        free = self.rng.randint(0, max(self.slots - len(self.running), 0))
        requests = self.sampler.next_requests(free)
        assert len(requests) <= free
        for request in requests:
            self.check(request)
            self.running.append(request.id)

    def check(self, request: Request) -> None:
        assert request.id not in self.running
        assert self.sampler.is_open(request.id)
        assert self.seeds.setdefault(request.id, request.seed) == request.seed
        assert request.prompt is self.sampler.prompt(request.id.prompt_id)

    def deliver(self, event: Event) -> None:
        prompt_id = event.id.prompt_id
        if self.is_foreign(event):
            self.num_foreign += 1
        elif event.id in self.running:  # any attempt answers for all
            self.running.remove(event.id)
        expected = {i for i in self.running if i.prompt_id == prompt_id}
        self.journal.append(event)
        to_abort = self.sampler.receive(event)
        if to_abort:
            assert set(to_abort) == expected
            assert to_abort == sorted(to_abort)
            self.running = [i for i in self.running if i.prompt_id != prompt_id]
            self.stray += to_abort
        assert sorted(self.sampler.outstanding) == sorted(self.running)
        assert self.sampler.num_outstanding == len(self.running)

    def foreign(self) -> Event:
        """Return an event that must be rejected."""
        prompt_id = self.rng.choice(list(self.script))
        kind = self.rng.randrange(4)
        if kind == 0:
            return scored(CompletionId(8, prompt_id, 0), 1.0)
        if kind == 1:
            return scored(CompletionId(7, prompt_id, 0), 1.0, policy_version=3)
        if kind == 2:
            return Lost(CompletionId(7, "nobody", 0), 0, "?")
        return scored(CompletionId(7, prompt_id, self.rng.choice([-1, 10_000])), 1.0)

    def step(self) -> None:
        if not self.running or self.rng.random() < 0.4:
            self.issue()
        if self.rng.random() < self.mess:
            self.misfortune()
        elif self.running:
            self.deliver(answer(self.script)(self.rng.choice(self.running)))

    def misfortune(self) -> None:
        kind = self.rng.randrange(4)
        if kind == 0:
            self.deliver(self.foreign())
        elif kind == 1 and self.journal:  # twice
            self.deliver(self.rng.choice(self.journal))
        elif kind == 2 and self.running:  # lost or dropped, and it may answer all the same
            request_id = self.rng.choice(self.running)
            self.stray.append(request_id)
            lost = Lost(request_id, 0, "late") if self.rng.random() < 0.5 else Aborted(request_id, 0, 5)
            self.deliver(lost)
        elif kind == 3 and self.stray:
            self.deliver(answer(self.script)(self.stray.pop(self.rng.randrange(len(self.stray)))))

    def is_foreign(self, event: Event) -> bool:
        known = event.id.prompt_id in self.script and 0 <= event.id.index < 10_000
        return not known or event.id.step != 7 or event.policy_version != 0

    def run(self, num_steps: int | None = None) -> None:
        while not self.sampler.done and (num_steps is None or num_steps > 0):
            self.step()
            num_steps = None if num_steps is None else num_steps - 1


# -------------------- policies, rewards and windows of every kind


@dataclasses.dataclass(frozen=True)
class OwnBudgets(Allocation):
    """Give every prompt its own cap, which need not be a multiple of any size."""

    round_size: int
    cap: int

    def __call__(self, counts: Counts) -> int:
        return min((counts.committed // self.round_size + 1) * self.round_size, self.cap)

    def budgets(self, histories: Sequence[History]) -> list[int]:
        return [1 + round(7 * history.a + 3 * history.b) % self.cap for history in histories]


@dataclasses.dataclass(frozen=True)
class DropHopeless:
    """Stop, continue or drop, depending on voids too."""

    def __call__(self, counts: Counts) -> Verdict:
        if counts.wrong >= 5 and not counts.correct:
            return Verdict.DROP
        return Verdict.STOP if counts.correct >= 2 or counts.void >= 3 else Verdict.CONTINUE


@dataclasses.dataclass(frozen=True)
class Extremes:
    """Keep the highest and the lowest reward, as a user's own selection."""

    def __call__(self, rewards, correct, group_size):
        return sorted({int(rewards.argmax()), int(rewards.argmin())})


@dataclasses.dataclass(frozen=True)
class Widening:
    """Return a window that depends on counts, history and cap."""

    slope: int

    def __call__(self, counts: Counts, history: History, cap: int) -> int:
        return 1 + (self.slope * counts.wrong + round(history.a) + counts.void) % cap


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    group_size = draw(st.integers(1, 5) | st.sampled_from([7, 64]))
    round_size = draw(st.integers(1, 6))
    allocate = draw(
        st.builds(Rounds, st.just(round_size), st.integers(-(-group_size // round_size), 3 - (-group_size // round_size)))
        | st.builds(OwnBudgets, st.just(round_size), st.integers(group_size, group_size + 12))
    )
    rules = [Never(), Positive(1), Balance(group_size // 2, group_size - group_size // 2), DropOneClass(), DropHopeless()]
    return Policy(
        name="drawn",
        group_size=group_size,
        allocate=allocate,
        decide=draw(st.sampled_from([rule for rule in rules if sum(promises_of(rule).needs) <= allocate.cap])),
        select=draw(st.sampled_from([Balanced(), First(), All(), Extremes()])),
        weight=Centered(),
        decide_every=draw(st.integers(1, allocate.cap + 1)),
        min_pool=draw(st.integers(0, min(allocate.cap, 8))),
        propose=draw(st.sampled_from([Refill(1.0), Refill(1.5), Refill(3.0)])),
        degenerate=draw(st.sampled_from(["keep", "drop"])),
    )


VOID = None
REWARDS = st.sampled_from([1.0, 0.0, 1.0, 0.0, 0.1, 0.7, -2.5, 0.8, VOID]) | st.floats(-1e9, 1e9)


@st.composite
def tables(draw: st.DrawFn, policy: Policy, most_prompts: int) -> list[list[float | None]]:
    """Draw the rewards of all possible completions, a row for each prompt; VOID means that there is none."""
    common = draw(st.sampled_from([REWARDS, st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0, VOID]), st.just(0.0), st.just(VOID)]))
    return draw(st.lists(st.lists(common, min_size=policy.cap, max_size=policy.cap), min_size=1, max_size=most_prompts))


def histories(num_prompts: int) -> st.SearchStrategy[list[History]]:
    return st.lists(st.builds(History, st.integers(1, 5), st.integers(1, 5)), min_size=num_prompts, max_size=num_prompts)


def windows(policy: Policy, *, own: bool) -> st.SearchStrategy[int | Widening | None]:
    """Draw None, a number, or with `own` a function."""
    numbers = st.none() | st.integers(1, policy.cap + 2)
    return numbers | st.builds(Widening, st.integers(0, 3)) if own else numbers


class Remembered:
    """A memory with the histories of the prompts "0", "1", .."""

    def __init__(self, histories: Sequence[History]) -> None:
        self.histories = histories

    def history(self, prompt: Prompt) -> History:
        return self.histories[int(prompt.prompt_id)]


def est(mean: int = 8, floor: int = 4, cap: int = 32, **others) -> InversePowerRate:
    return InversePowerRate(mean=mean, floor=floor, cap=cap, round_size=cap, **others)


def bag(mean: int = 8, floor: int = 2, cap: int = 128, **others) -> Knapsack:
    return Knapsack(mean=mean, floor=floor, cap=cap, round_size=cap, **others)


def sample(policy: Policy, **scripts: str) -> SamplingResult:
    """Drive the sampler with one script per prompt; scripts are padded with wrong answers, which no pool may reach."""
    padded = {name: chars.ljust(policy.cap, "-") for name, chars in scripts.items()}
    return finish(AdaptiveSampler(prompts_of(list(padded)), policy), answer(padded))


def kept(group: Group) -> list[int]:
    return [s.id.index for s in group.kept]


def cid(prompt_id: str, index: int, step: int = 0) -> CompletionId:
    return CompletionId(step, prompt_id, index)
