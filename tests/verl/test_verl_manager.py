"""The manager: refusals when it is made, its workers as Ray actors, and the memory that it keeps for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import transfer_queue as tq
from hydra import compose, initialize_config_module
from scripted import Client, Reward
from test_verl_worker import ADAPTIVE, clear, rollout
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

from reinforce_ada.errors import InputError
from reinforce_ada.integrations.verl import AdaptiveAgentLoopManager
from reinforce_ada.integrations.verl.estimator import estimate
from reinforce_ada.integrations.verl.memory import key_of_chat
from reinforce_ada.integrations.verl.settings import check, settings_of


def test_verl_finds_the_estimator_by_its_entry_point() -> None:
    assert get_adv_estimator_fn("reinforce_ada") is estimate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("+reinforce_ada.preset=nothing",), "unknown name 'nothing'"),
        (("+reinforce_ada.group_size=8",), "group_size 8; that of the trainer, 4, is needed"),
        (("algorithm.adv_estimator=grpo",), "the advantages come from whole pools"),
        (("+reinforce_ada.preset=dapo",), "which draws further prompts"),
        (("actor_rollout_ref.rollout.calculate_log_probs=False",), "bypass_mode=True without the logprobs of the rollout"),
    ],
)
def test_what_cannot_be_combined_is_refused_when_the_manager_is_made(changes: tuple[str, ...], message: str, configure: Any) -> None:
    with pytest.raises(InputError) as caught:
        AdaptiveAgentLoopManager(config=configure(*ADAPTIVE, *changes), llm_client=None, reward_loop_worker_handles=[Reward()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_colocated_reward_model_is_refused(configure: Any) -> None:
    with pytest.raises(InputError, match="a colocated reward model"):
        AdaptiveAgentLoopManager(config=configure(*ADAPTIVE), llm_client=None, reward_loop_worker_handles=None)


class InActors:
    """A manager and its actors in the place of one worker, for `rollout`."""

    def __init__(self, manager: Any) -> None:
        self.manager = manager
        self.background_tasks: tuple[()] = ()

    async def generate_sequences(self, rows: Any) -> None:
        self.manager.generate_sequences(rows)


@pytest.fixture
def made(request: pytest.FixtureRequest, configure: Any, queue: Any, tmp_path: Path) -> Iterator[Any]:
    """A manager with two workers; the parameter is its class and the overrides."""
    cls, changes = request.param
    config = configure(*changes, "actor_rollout_ref.rollout.agent.num_workers=2", f"trainer.default_local_dir={tmp_path}")
    manager = cls.create(config=config, llm_client=Client(), teacher_client=None, reward_loop_worker_handles=[Reward()])
    yield manager
    for worker in manager.agent_loop_workers:
        ray.kill(worker)


FIXED = "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum"
MEMORY = (AdaptiveAgentLoopManager, (*ADAPTIVE, "+reinforce_ada.preset=reinforce-ada-memory", FIXED))


@pytest.mark.parametrize("made", [MEMORY], indirect=True)
def test_prompts_are_remembered_across_steps(made: Any, rows_of: Any, tmp_path: Path) -> None:
    def step(number: int) -> dict[str, list[list[float]]]:
        rows = rows_of(range(6), step=number)
        chats = {str(u): key_of_chat(c) for u, c in zip(rows["uid"], rows["raw_prompt"], strict=True)}
        batch, _ = rollout(InActors(made), rows)
        found = {chats[key.split("_")[0]]: tag["reinforce_ada"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
        clear(batch)
        return found

    first = step(1)
    validation_batch, _ = rollout(InActors(made), rows_of(range(3), validate=True), "val")
    assert len(validation_batch.keys) == 3
    clear(validation_batch)
    second = step(2)
    lines = [json.loads(line) for line in (tmp_path / "reinforce_ada_memory.jsonl").read_text().splitlines()]
    counts = {key: (correct, wrong) for step, key, correct, wrong in lines if step == 1}
    assert set(counts) == set(first)
    for key, (correct, wrong) in counts.items():
        assert correct + wrong == 4
        # The same four answers come again. A+ = (b + wrong) / (a + b + 3), A- = -(a + correct) / (a + b + 3).
        for a, b, table in ((1, 1, first[key]), (1 + 0.99 * 0 + correct, 1 + wrong, second[key])):
            for reward, advantage in table:
                wanted = (b + wrong if reward else -(a + correct)) / (a + b + 3)
                assert advantage == pytest.approx(wanted)
    assert made._memory.history(next(iter(counts))) != (1, 1, 0, False)


@pytest.mark.parametrize("made", [(AgentLoopManagerTQ, ADAPTIVE[1:]), (AdaptiveAgentLoopManager, ADAPTIVE)], indirect=True)
def test_a_killed_worker_is_an_error_of_ray_as_in_verl(made: Any, rows_of: Any) -> None:
    batch, _ = rollout(InActors(made), rows_of(range(4)))
    assert {key.split("_")[0] for key in batch.keys}
    clear(batch)
    ray.kill(made.agent_loop_workers[0])
    time.sleep(0.5)
    rows = rows_of(range(4))
    uids = [str(u) for u in rows["uid"]]
    tq.kv_batch_put(keys=uids, partition_id="train", tags=[{"is_prompt": True, "status": "pending", "global_steps": 1} for _ in uids])
    with pytest.raises(ray.exceptions.RayActorError):
        made.generate_sequences(rows)
    time.sleep(1)  # the other worker goes on
    tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")


@pytest.mark.parametrize("made", [(AdaptiveAgentLoopManager, ADAPTIVE)], indirect=True)
def test_prompts_with_an_n_of_their_own_are_refused(made: Any, rows_of: Any) -> None:
    from verl.utils.tensordict_utils import assign_non_tensor_stack

    rows = rows_of(range(2))
    assign_non_tensor_stack(rows, "__rollout_n__", [1, 2])
    with pytest.raises(InputError, match="the policy decides how many sessions one gets"):
        made.generate_sequences(rows)


def test_the_script_of_the_examples_is_a_configuration_of_verl(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples/verl_adaptive.sh"
    python = tmp_path / "python"  # prints the arguments in the place of running verl.trainer.main_ppo
    python.write_text(f"#!/bin/sh\nshift 2\nexec {sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"\n")
    python.chmod(0o755)
    done = subprocess.run(
        [script, "trainer.nnodes=2"], capture_output=True, text=True, check=True, env={**os.environ, "PYTHON": str(python)}
    )
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=json.loads(done.stdout))
    settings = settings_of(config)
    check(config, settings.policy, has_rewards=True)
    assert (settings.policy.group_size, config.trainer.nnodes) == (4, 2)
