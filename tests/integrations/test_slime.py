"""The adapter for slime, with stand-ins of the functions it calls.

Their signatures and effects are those of slime 0.3.1 at commit 624b824a898ab0ec1fcb4d373004c7f3852bf515: Sample of slime/utils/types.py,
DataSource of slime/rollout/data_source.py, GenerateState, generate_and_rm and generate_rollout of slime/rollout/sglang_rollout.py, run of
slime/utils/async_utils.py, RolloutFnTrainOutput of slime/rollout/base_types.py.
"""

from __future__ import annotations

import asyncio
import enum
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from one_sampler import PRESETS, RATES, Rows, assert_same, expected, reward_of, stand_in

from reinforce_ada.errors import InputError
from reinforce_ada.integrations import slime as adapter
from reinforce_ada.integrations.settings import settings_of
from reinforce_ada.sampling import preset

N = 4
Status = enum.Enum("Status", {"PENDING": "pending", "COMPLETED": "completed", "ABORTED": "aborted"})


@dataclass
class Sample:
    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    tokens: list[int] = field(default_factory=list)
    response_length: int = 0
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    session_id: str | None = None

    def get_reward_value(self, args: Any) -> Any:
        return self.reward if not args.reward_key else self.reward[args.reward_key]


class DataSource:
    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        return [[Sample(group_index=i, index=i * N + j) for j in range(N)] for i in range(num_samples)]


def args_of(**changes: Any) -> SimpleNamespace:
    """slime's arguments, as far as they are read, with its defaults; the seed tells a stand-in the index of its request."""
    values = {
        "n_samples_per_prompt": N, "rollout_batch_size": len(RATES), "over_sampling_batch_size": len(RATES), "rollout_seed": 42,
        "custom_reward_post_process_path": "reinforce_ada.integrations.slime.advantages", "custom_convert_samples_to_train_data_path": None,
        "custom_advantage_function_path": None, "custom_pg_loss_reducer_function_path": None, "advantage_estimator": "grpo",
        "normalize_advantages": False, "partial_rollout": False, "dynamic_sampling_filter_path": None, "rollout_sample_filter_path": None,
        "rollout_all_samples_process_path": None, "group_rm": False, "reward_key": None, "sglang_enable_deterministic_inference": True,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


async def respond(args: Any, sample: Sample, index: int, disturbed: bool) -> Sample | list[Sample]:
    sample.metadata["drawn"] = index
    sample.response_length = 3 + index % 5
    sample.tokens = [7] * (2 + sample.response_length)
    sample.reward = reward_of(sample.group_index, index, disturbed)
    sample.status = Status.COMPLETED
    return sample


def install(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any] = respond, disturbed: bool = False) -> None:
    async def generate_and_rm(args: Any, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False) -> Any:
        assert not evaluation
        assert sample.status is Status.PENDING
        sampling_params["max_new_tokens"] -= 1  # slime's generate changes what it is given
        assert sampling_params["max_new_tokens"] == 9
        await asyncio.sleep(0)
        return await answer(args, sample, sampling_params["sampling_seed"] - args.rollout_seed, disturbed)

    def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> str:
        assert evaluation
        return "slime's own"

    class GenerateState:  # there is one
        sampling_params: ClassVar = {"max_new_tokens": 10}

        def __init__(self, args: Any) -> None: ...

    modules = {
        "slime": {}, "slime.rollout": {}, "slime.utils": {}, "slime.utils.async_utils": {"run": asyncio.run},
        "slime.rollout.base_types": {"RolloutFnTrainOutput": lambda samples, metrics: SimpleNamespace(samples=samples, metrics=metrics)},
        "slime.rollout.sglang_rollout": {
            "GenerateState": GenerateState, "generate_and_rm": generate_and_rm, "generate_rollout": generate_rollout,
        },
    }  # fmt: skip
    stand_in(modules, monkeypatch)


def trained(samples: list[list[Sample]], args: Any) -> list[Rows]:
    """The rows that train, as slime's RolloutManager gets them from the two functions."""
    rewards, advantages = adapter.advantages(args, [s for group in samples for s in group])
    values = iter(zip(rewards, advantages, strict=True))
    rows = [[(s, *next(values)) for s in group] for group in samples]
    filled = [(s, advantage) for group in rows for s, _, advantage in group if s.remove_sample]
    assert all(advantage == 0 and s.loss_mask == [0] * s.response_length for s, advantage in filled)
    return [[(s.metadata["drawn"], reward, advantage) for s, reward, advantage in group if not s.remove_sample] for group in rows]


@pytest.mark.parametrize("disturbed", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_the_rows_and_advantages_are_those_of_one_sampler(name: str, disturbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, disturbed=disturbed)
    args = args_of(reinforce_ada={"preset": name})
    output = adapter.generate_rollout(args, 3, DataSource())
    assert [[s.index for s in group] for group in output.samples] == [[i * N + j for j in range(N)] for i in range(len(RATES))]
    assert all(s.group_index == s.index // N and s.rollout_id == s.index for group in output.samples for s in group)
    truth = expected(preset(name, group_size=N), disturbed)
    assert_same(trained(output.samples, args), truth)
    assert disturbed == any(len(rows) < N for rows in truth) or name != "grpo"  # GRPO does not replace what failed
    assert output.metrics["reinforce_ada/num_completions_kept"] == sum(map(len, truth))


def test_an_objective_needs_a_reducer_and_a_list_is_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    async def two(args: Any, sample: Sample, index: int, disturbed: bool) -> list[Sample]:
        last = await respond(args, sample, index, disturbed)
        return [Sample(tokens=[1, 2], response_length=1, reward=0.5, status=Status.COMPLETED), last]

    install(monkeypatch, two)
    args = args_of(reinforce_ada={"preset": "reinforce-ada-exact"}, custom_pg_loss_reducer_function_path="mine.reduce")
    output = adapter.generate_rollout(args, 0, DataSource())
    pairs = [list(zip(group[::2], group[1::2], strict=True)) for group in output.samples]
    assert all(len(group) == N for group in pairs)
    assert all(a.rollout_id == b.rollout_id and a.metadata["reinforce_ada"] == b.metadata["reinforce_ada"] for g in pairs for a, b in g)
    assert_same(trained([[b for _, b in group] for group in pairs], args), expected(preset("reinforce-ada-exact")))


@pytest.mark.parametrize("failing", ["aborted", "raises"])
def test_a_prompt_that_only_fails_keeps_its_place(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(args: Any, sample: Sample, index: int, disturbed: bool) -> Any:
        if sample.group_index in args.lost:
            if failing == "raises":
                raise RuntimeError("no answer")
            sample.status, sample.reward = Status.ABORTED, 1.0  # what a function of the user had written into it
            return sample
        return await respond(args, sample, index, disturbed)

    install(monkeypatch, answer)
    args = args_of(lost={3})
    output = adapter.generate_rollout(args, 0, DataSource())
    assert [s.index for s in output.samples[3]] == [12, 13, 14, 15]
    rows = trained(output.samples, args)
    assert rows[3] == []
    assert_same(rows, [[] if i == 3 else group for i, group in enumerate(expected(preset("reinforce-ada-balance")))])
    with pytest.raises(RuntimeError, match="no completion of any of 6 prompts could be scored"):
        adapter.generate_rollout(args_of(lost=set(range(6))), 0, DataSource())


def test_evaluation_is_slimes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert adapter.generate_rollout(args_of(partial_rollout=True), 0, DataSource(), evaluation=True) == "slime's own"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reinforce_ada": {"preset": "reinforce-ada-balanced"}}, "did you mean 'reinforce-ada-balance'?"),
        ({"reinforce_ada": {"window": 0}}, "window 0; an integer of at least 1 is needed"),
        ({"reinforce_ada": {"group_size": 8}}, "group_size 8; that of the trainer, 4, is needed; leave"),
        ({"reinforce_ada": {"preset": "dapo"}}, "with Refill, which draws further prompts"),
        ({"reinforce_ada": {"preset": "knapsack"}}, "which divides a budget between the prompts of a step"),
        ({"reinforce_ada": {"preset": "grpo", "scale": "batch"}}, "scale 'batch'; each prompt is sampled alone"),
        ({"reinforce_ada": {"preset": "reinforce-ada-memory"}}, "a policy that remembers earlier steps; this trainer has no place"),
        ({"reinforce_ada": {"preset": "reinforce-ada-memory", "baseline": "predicted"}}, "a baseline that is predicted"),
        ({"reinforce_ada": {"preset": "reinforce-ada-exact"}}, "with slime's loss, whose denominators depend on the outcomes"),
        ({"custom_reward_post_process_path": None}, "custom_reward_post_process_path=reinforce_ada.integrations.slime.advantages"),
        ({"advantage_estimator": "ppo"}, "advantage_estimator=ppo; the others do not take a row's reward as its advantage"),
        ({"normalize_advantages": True}, "normalize_advantages=True; the advantages come from whole pools"),
        ({"partial_rollout": True}, "partial_rollout=True; the sampler decides"),
        ({"custom_convert_samples_to_train_data_path": "a.b"}, "custom_convert_samples_to_train_data_path=a.b; the advantages come"),
        ({"custom_advantage_function_path": "a.b"}, "custom_advantage_function_path=a.b; the advantages come"),
        ({"rollout_sample_filter_path": "a.b"}, "rollout_sample_filter_path=a.b; the sampler decides"),
        ({"rollout_all_samples_process_path": "a.b"}, "rollout_all_samples_process_path=a.b; completions that are not kept"),
        ({"dynamic_sampling_filter_path": "a.b"}, "dynamic_sampling_filter_path=a.b; the sampler decides"),
        ({"over_sampling_batch_size": 12}, "over_sampling_batch_size=12; the prompts that finish first"),
        ({"group_rm": True}, "group_rm=True; each completion is scored as soon as it ends"),
    ],
)
def test_what_cannot_be_combined_is_one_line(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(InputError) as caught:
        adapter.generate_rollout(args_of(**changes), 0, DataSource())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_samples_of_another_rollout_and_another_slime_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(InputError, match="samples without an advantage; those of an adaptive rollout are needed; --rollout"):
        adapter.advantages(args_of(), [Sample(reward=1.0)])
    sys.modules["slime.rollout.sglang_rollout"].generate_and_rm = lambda args, sample, params: None
    with pytest.raises(InputError, match=r"its generate_and_rm takes \(args, sample, params\) instead of \(args, sample, sampling_params"):
        adapter.generate_rollout(args_of(), 0, DataSource())
    adapter.check(args_of(), settings_of("here", {}, N))


def test_the_functions_of_a_module_are_found_in_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / adapter.ROLLOUT.source
    source.parent.mkdir()
    text = (
        "@trace_function('x', target='sample')\nasync def generate_and_rm(args, sample, sampling_params, evaluation=False): ...\n"
        "def generate_rollout(args, rollout_id, data_source, evaluation=False): ...\n"
    )
    source.write_text(text)
    monkeypatch.setattr("reinforce_ada.integrations.hooks.is_installed", lambda package: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path]))
    assert adapter.ROLLOUT.state() == "ok"
    source.write_text(text.replace("data_source", "data_buffer"))
    assert adapter.ROLLOUT.state().startswith("its generate_rollout takes (args, rollout_id, data_buffer, evaluation) instead of (args,")
