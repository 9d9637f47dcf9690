from __future__ import annotations

import itertools
import logging
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from reinforce_ada.driver import run
from reinforce_ada.engines.base import Engine
from reinforce_ada.engines.function import FunctionEngine
from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.errors import InputError
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rewards.protocol import RewardRunner
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import Aborted, Completion, CompletionId, Event, Failed, Lost, Prompt, Request, SamplingResult, Scored

BALANCE = "reinforce-ada-balance"


def plus(prompt: Prompt, text: str) -> float:
    return float(text == "+")


def sampler_of(names: Sequence[str], policy: str = BALANCE, **options) -> AdaptiveSampler:
    overrides = options.pop("overrides", {})
    return AdaptiveSampler([Prompt(n) for n in names], preset(policy, **overrides), **options)


def pools(result: SamplingResult) -> list[list[tuple[CompletionId, float]]]:
    return [[(s.id, s.reward) for s in pool.scored] for pool in result.pools]


def by_seed(request: Request) -> str:
    return "+" if random.Random(request.seed).random() < 0.3 else "-"


class Clock:
    """A second passes at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class Deaf(ScriptedEngine):
    """Never answers the first `num_deaf` submissions of the ids in `deaf`."""

    def __init__(self, *args, deaf: Sequence[CompletionId], num_deaf: int = 1, echo: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.left = dict.fromkeys(deaf, num_deaf)
        self.echo = echo
        self.swallowed: dict[CompletionId, Request] = {}
        self.echoes: list[Completion] = []
        self.submissions: Counter[CompletionId] = Counter()
        self.seeds: dict[CompletionId, set[int]] = {}

    @property
    def free_slots(self) -> int:
        return super().free_slots - len(self.swallowed)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.submissions[request.id] += 1
            self.seeds.setdefault(request.id, set()).add(request.seed)
        deaf = [r for r in requests if self.left.get(r.id, 0) > 0]
        super().submit([r for r in requests if r not in deaf])
        for request in deaf:
            self.left[request.id] -= 1
            self.swallowed[request.id] = request

    def poll(self) -> list[Completion]:
        echoes, self.echoes = self.echoes, []
        return super().poll() + echoes

    def abort(self, ids: Sequence[CompletionId]) -> None:
        super().abort(ids)
        for request_id in ids:
            request = self.swallowed.pop(request_id, None)
            if request is not None and self.echo:
                self.echoes.append(Completion(request_id, np.zeros(3, np.int32), np.zeros(3, np.float32), "", "abort", 0))


class List:
    """A journal in memory."""

    def __init__(self) -> None:
        self.polls: list[list[Event]] = []

    def append(self, events: Sequence[Event]) -> Sequence[Event]:
        self.polls.append(list(events))
        return events


class Later:
    """Scores a completion `delay` polls after it came, newest first; says how long it was asked to wait."""

    def __init__(self, delay: int) -> None:
        self.delay, self.time = delay, 0
        self.pending: list[tuple[int, Completion]] = []
        self.waits: list[float] = []

    def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
        self.pending += [(self.time + self.delay, c) for c in completions]

    def poll(self, wait_s: float = 0.0) -> list[Scored | Failed]:
        self.time += 1
        self.waits.append(wait_s)
        due = [c for at, c in self.pending if at <= self.time]
        self.pending = [(at, c) for at, c in self.pending if at > self.time]
        return [Scored(c, plus(Prompt(""), c.text)) for c in reversed(due)]

    def close(self) -> None:
        self.pending = []


def test_protocols() -> None:
    assert isinstance(ScriptedEngine({"a": "+"}), Engine)
    assert isinstance(FunctionEngine(lambda prompts, seeds: []), Engine)
    assert isinstance(InlineRewards(plus), RewardRunner)


def test_one_scripted_step() -> None:
    engine = ScriptedEngine({"a": "++++++++----++++", "b": "-"}, slots=5, num_per_poll=2, shuffle_seed=0)
    result = run(sampler_of("ab"), engine, plus)
    assert [pool.exit for pool in result.pools] == ["satisfied", "exhausted"]
    assert [[s.id.index for s in g.kept] for g in result.groups] == [[0, 1, 8, 9], [0, 1, 2, 3]]
    assert result.groups[0].pool.mean == 0.75
    assert engine.max_running == 5
    assert engine.num_submitted == result.metrics["num_completions_issued"] == engine.num_finished + engine.num_aborted


@pytest.mark.parametrize("decide_every", [1, 8])
def test_schedule_window_slots_and_timing_change_nothing(decide_every: int) -> None:
    names = [f"p{i}" for i in range(12)]
    seen = []
    for schedule, window, slots, per_poll, shuffle in (
        ("rounds", None, 7, None, None),
        ("rounds", None, 200, 3, 1),
        ("stream", None, 64, 5, 2),
        ("stream", 1, 64, None, 3),
        ("stream", 32, 1, 1, None),
        ("stream", 13, 100, 7, 4),
    ):
        sampler = sampler_of(names, overrides={"decide_every": decide_every}, schedule=schedule, window=window, seed=3)
        result = run(sampler, ScriptedEngine(by_seed, slots=slots, num_per_poll=per_poll, shuffle_seed=shuffle), Later(delay=slots % 3))
        seen.append((pools(result), [[s.id for s in g.kept] for g in result.groups]))
    assert all(other == seen[0] for other in seen[1:])
    assert sum(map(len, seen[0][0])) == {1: 79, 8: 112}[decide_every]


def test_every_completion_is_scored_once_and_groups_keep_prompt_order() -> None:
    calls: Counter[str] = Counter()

    def counted(prompt: Prompt, text: str) -> float:
        calls[prompt.prompt_id] += 1
        return plus(prompt, text)

    engine = ScriptedEngine(by_seed, slots=16, num_per_poll=3, shuffle_seed=5)
    result = run(sampler_of("dcba", overrides={"decide_every": 1}), engine, counted)
    assert [g.pool.prompt.prompt_id for g in result.groups] == list("dcba")
    assert sum(calls.values()) <= engine.num_finished
    assert all(calls[p.prompt.prompt_id] >= p.count for p in result.pools)


def test_the_engine_is_never_given_more_than_its_slots_and_is_left_empty() -> None:
    engine = ScriptedEngine(by_seed, slots=3, num_per_poll=1, shuffle_seed=0)
    run(sampler_of("abcd", overrides={"decide_every": 1}, window=9), engine, plus)
    assert engine.max_running == 3
    assert engine.free_slots == 3


def test_an_error_in_the_loop_leaves_the_engine_empty() -> None:
    class Broken(Later):
        def submit(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> None:
            raise OSError("no workers")

    engine = ScriptedEngine(by_seed, slots=8, num_per_poll=1)
    with pytest.raises(OSError, match="no workers"):
        run(sampler_of("ab"), engine, Broken(0))
    assert engine.free_slots == 8


# -------------------- losses


@pytest.mark.parametrize("echo", [False, True])
def test_a_silent_request_is_issued_again_with_its_seed(echo: bool) -> None:
    lost = [CompletionId(0, "a", 2), CompletionId(0, "b", 0)]
    quiet = run(sampler_of("ab", seed=1), ScriptedEngine(by_seed), plus)
    engine = Deaf(by_seed, deaf=lost, echo=echo)
    result = run(sampler_of("ab", seed=1), engine, plus, request_timeout_s=5, clock=Clock())
    assert pools(result) == pools(quiet)
    assert result.metrics["num_lost"] == 2
    assert (result.metrics["num_aborted"], result.metrics["num_duplicates"]) == (0, 0)
    assert {i: engine.submissions[i] for i in lost} == dict.fromkeys(lost, 2)
    assert all(len(engine.seeds[i]) == 1 for i in lost)
    assert engine.free_slots == 64


def test_a_request_lost_too_often_becomes_a_void() -> None:
    lost = CompletionId(0, "a", 1)
    engine = Deaf({"a": "+-"}, deaf=[lost], num_deaf=99)
    result = run(sampler_of("a"), engine, plus, request_timeout_s=5, max_losses=3, clock=Clock())
    (pool,) = result.pools
    assert engine.submissions[lost] == 3
    assert (result.metrics["num_lost"], pool.num_void, pool.outcomes[1].id) == (2, 1, lost)
    assert isinstance(pool.outcomes[1], Failed)
    assert pool.outcomes[1].reason == "no answer after 5 s (3 times)"


def test_an_answer_after_the_deadline_still_counts_and_stops_the_second_attempt() -> None:
    slow = CompletionId(0, "a", 0)

    class Late(Deaf):
        def abort(self, ids: Sequence[CompletionId]) -> None:
            for request_id in set(ids) & set(self.swallowed):  # finished before the abort reached it
                self.echoes.append(self._complete(self.swallowed[request_id]))
            super().abort(ids)

    engine = Late(by_seed, deaf=[slow], num_deaf=9)
    result = run(sampler_of("a", seed=1), engine, plus, request_timeout_s=5, clock=Clock())
    assert pools(result) == pools(run(sampler_of("a", seed=1), ScriptedEngine(by_seed), plus))
    assert engine.free_slots == 64


def test_dropped_by_the_engine() -> None:
    seen: Counter[int] = Counter()

    class Dropping(ScriptedEngine):
        def _complete(self, request: Request) -> Completion:
            whole, index = super()._complete(request), request.id.index
            seen[index] += 1
            if index == 3 or (index == 1 and seen[index] == 1):
                return Completion(whole.id, whole.token_ids, whole.rollout_logprobs, "+", "abort", whole.policy_version)
            return whole

    journal = List()
    result = run(sampler_of("a", window=8), Dropping({"a": "-+"}), plus, journal, max_losses=2)
    (pool,) = result.pools
    assert [isinstance(o, Failed) for o in pool.outcomes] == [False, False, False, True] + [False] * 4
    assert pool.outcomes[3].reason == "dropped by the engine (2 times)"
    assert result.metrics["num_aborted"] == 2
    assert result.metrics["tokens_wasted"] == 2
    kinds = Counter(type(event) for poll in journal.polls for event in poll)
    assert kinds == {Scored: 7, Aborted: 2, Failed: 1}


# -------------------- rewards


def test_no_busy_wait_when_only_rewards_are_pending() -> None:
    rewards = Later(delay=4)
    run(sampler_of("a", window=8), ScriptedEngine({"a": "+-"}, slots=8), rewards)
    assert rewards.waits == [0.0, 1.0, 1.0, 1.0]


def test_answers_of_exited_prompts_are_not_scored() -> None:
    scored: list[str] = []

    def reward(prompt: Prompt, text: str) -> float:
        scored.append(prompt.prompt_id)
        return plus(prompt, text)

    class Stubborn(ScriptedEngine):
        def abort(self, ids: Sequence[CompletionId]) -> None:
            """Too late for every abort."""

    overrides = {"decide_every": 1, "min_pool": 0}
    engine = Stubborn({"a": "+", "b": "-"}, slots=64, num_per_poll=1)
    result = run(sampler_of("ab", "reinforce-ada-pos", overrides=overrides, window=4), engine, reward)
    assert scored.count("a") == 1
    assert result.metrics["tokens_wasted"] == 3
    assert result.metrics["num_aborted"] == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
        (None, "ValueError: the reward returned nan, not a finite float"),
    ],
)
def test_a_failing_reward_becomes_a_void(fault: Exception | None, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    calls: Counter[str] = Counter()

    def reward(prompt: Prompt, text: str) -> float:
        calls[text] += 1
        if text == "!" or (text == "?" and calls[text] < 3):
            if fault is None:
                return float("nan")
            raise fault
        return plus(prompt, text)

    with caplog.at_level(logging.WARNING):
        result = run(sampler_of("a", "grpo", overrides={"group_size": 4}), ScriptedEngine({"a": "+!?!"}), reward)
    (pool,) = result.pools
    assert [isinstance(o, Failed) for o in pool.outcomes] == [False, True, False, True]
    assert pool.outcomes[1].reason == f"{reason} (3 attempts)"
    assert calls == {"+": 1, "!": 6, "?": 3}
    (record,) = caplog.records  # shown once
    assert reason in record.getMessage()
    assert record.exc_info is not None


def test_interrupting_a_reward_interrupts_the_run() -> None:
    def reward(prompt: Prompt, text: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(sampler_of("a"), ScriptedEngine({"a": "+"}), reward)


# -------------------- journal


def test_the_journal_sees_each_poll_first_and_resumes_it_anywhere() -> None:
    def fresh() -> AdaptiveSampler:
        return sampler_of("abc", overrides={"decide_every": 1}, seed=2)

    class Watching(List):
        def append(self, events: Sequence[Event]) -> Sequence[Event]:
            assert events
            assert all(sampler.is_open(e.id) or isinstance(e, Aborted) for e in events)
            return super().append(events)

    sampler, journal = fresh(), Watching()
    whole = run(sampler, ScriptedEngine(by_seed, slots=9, num_per_poll=4, shuffle_seed=1), plus, journal)
    assert len(journal.polls) > 5
    for cut in range(len(journal.polls) + 1):
        resumed = fresh()
        resumed.restore(itertools.chain.from_iterable(journal.polls[:cut]))
        was_done = resumed.done
        engine = ScriptedEngine(by_seed, slots=5, num_per_poll=2, shuffle_seed=cut)
        again = run(resumed, engine, plus)
        assert pools(again) == pools(whole)
        assert (engine.num_submitted == 0) == was_done
    # the whole journal leaves nothing to do, and knows what was issued and wasted, too
    assert was_done
    assert whole.metrics["waste_fraction"] > 0
    assert {k: again.metrics[k] for k in ("issued_per_prompt", "waste_fraction")} == {
        k: whole.metrics[k] for k in ("issued_per_prompt", "waste_fraction")
    }


def test_a_crash_between_journal_and_sampler_loses_nothing() -> None:
    class Crashing(List):
        def append(self, events: Sequence[Event]) -> Sequence[Event]:
            super().append(events)
            if len(self.polls) == 3:
                raise SystemExit(1)
            return events

    journal = Crashing()
    with pytest.raises(SystemExit):
        run(sampler_of("ab", seed=2), ScriptedEngine(by_seed, slots=6), plus, journal)
    resumed = sampler_of("ab", seed=2)
    resumed.restore(itertools.chain.from_iterable(journal.polls))
    assert resumed.progress().num_committed + sum(len(s) for s in [journal.polls[2]]) >= 12
    assert pools(run(resumed, ScriptedEngine(by_seed), plus)) == pools(run(sampler_of("ab", seed=2), ScriptedEngine(by_seed), plus))


# -------------------- the loop itself


def test_progress_is_reported() -> None:
    seen = []
    result = run(sampler_of("ab"), ScriptedEngine({"a": "+-", "b": "-"}, slots=8), plus, on_progress=seen.append)
    assert [p.num_committed for p in seen] == sorted(p.num_committed for p in seen)
    assert seen[-1].num_active == 0
    assert seen[-1].num_committed == result.metrics["num_completions_committed"] == 40
    assert seen[-1].num_satisfied == 1


def test_answers_of_other_weights_stall_with_a_reason() -> None:
    engine = ScriptedEngine({"a": "+-"})
    engine.sync_weights([], 4)
    with pytest.raises(RuntimeError, match=r"1 of 1 prompts are open, 32 requests unanswered.*64 free slots.*policy_version"):
        run(sampler_of("a"), engine, plus)
    assert run(sampler_of("a", policy_version=4), engine, plus).metrics["num_rejected"] == 0


def test_answers_of_an_earlier_step_are_rejected_unscored() -> None:
    engine = ScriptedEngine({"a": "+-"}, slots=16)
    engine.submit(sampler_of("a", step=1).next_requests(4))
    calls = []
    result = run(sampler_of("a", step=2, window=8), engine, lambda prompt, text: calls.append(text) or plus(prompt, text))
    assert result.metrics["num_rejected"] == 4
    assert len(calls) == result.metrics["num_completions_committed"] == 8


def test_an_engine_without_slots_stalls() -> None:
    engine = ScriptedEngine({"a": "+-"}, slots=1, num_per_poll=1)

    class Full(ScriptedEngine):
        free_slots = 0

    with pytest.raises(RuntimeError, match=r"1 of 1 prompts are open, 0 requests unanswered.*0 free slots"):
        run(sampler_of("a"), Full({"a": "+-"}), plus)
    assert run(sampler_of("a"), engine, plus).pools[0].exit == "satisfied"


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="run: max_losses 0; at least 1 is needed"):
        run(sampler_of("a"), ScriptedEngine({"a": "+"}), plus, max_losses=0)
    with pytest.raises(InputError, match="InlineRewards: max_attempts 0"):
        InlineRewards(plus, max_attempts=0)
    with pytest.raises(InputError, match="ScriptedEngine: no outcomes for prompt 'a'"):
        ScriptedEngine({"a": ""})
    with pytest.raises(InputError, match="ScriptedEngine: slots 0"):
        ScriptedEngine({"a": "+"}, slots=0)
    with pytest.raises(InputError, match="ScriptedEngine: 2 requests; at most free_slots 1"):
        ScriptedEngine({"a": "+"}, slots=1).submit(sampler_of("a").next_requests(2))
    with pytest.raises(InputError, match="FunctionEngine: batch_size 0"):
        FunctionEngine(lambda prompts, seeds: [], batch_size=0)


# -------------------- your own generate


def test_function_engine_batches_and_passes_seeds() -> None:
    batches: list[int] = []

    def generate(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[str]:
        batches.append(len(prompts))
        return [by_seed(Request(CompletionId(0, p.prompt_id, 0), p, seed, 0)) for p, seed in zip(prompts, seeds, strict=True)]

    result = run(sampler_of("ab", seed=1), FunctionEngine(generate, batch_size=7), plus)
    assert pools(result) == pools(run(sampler_of("ab", seed=1), ScriptedEngine(by_seed), plus))
    assert max(batches) == 7
    assert result.metrics["tokens_committed"] == 0


def test_function_engine_counts_the_texts() -> None:
    with pytest.raises(InputError, match=r"FunctionEngine: 1 answers from generate for 8 prompts; a text, or .* for each prompt is needed"):
        run(sampler_of("a"), FunctionEngine(lambda prompts, seeds: ["+"], batch_size=8), plus)


def test_the_documented_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/sampling.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" [")[0] for line in printed[:8]] == [f"guess my digit ({i})" for i in range(8)]
    assert [round(float(x), 3) for x in printed[8].split()] == [20.962, 0.966, 0.032]


def test_losses_are_events_of_the_journal_too() -> None:
    journal = List()
    engine = Deaf(by_seed, deaf=[CompletionId(0, "a", 0)])
    run(sampler_of("a"), engine, plus, journal, request_timeout_s=5, clock=Clock())
    assert [e.id for poll in journal.polls for e in poll if isinstance(e, Lost)] == [CompletionId(0, "a", 0)]


@pytest.mark.parametrize("texts", [None, 7, "one text", b"x", [None], [7], [b"x"], ["\ud800"], (t for t in ["+"])])
def test_what_a_function_returns_must_be_texts(texts):
    with pytest.raises(InputError, match=r"^FunctionEngine: .* from generate.*needed$"):
        run(sampler_of("a"), FunctionEngine(lambda prompts, seeds: texts, batch_size=1), plus)
