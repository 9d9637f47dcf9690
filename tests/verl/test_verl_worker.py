"""verl's own worker, queue, replay buffer and advantage step, with adaptive sessions: the rows are those of the one sampler."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue as tq
from scripted import TOKENIZER, Client, Reward, answer, right_answer
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils.tensordict_utils import assign_non_tensor_stack

from reinforce_ada import AdaptiveSampler, Prompt, advantages_of
from reinforce_ada.driver import run
from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.errors import InputError
from reinforce_ada.integrations.verl import AdaptiveAgentLoopWorker, AdaptiveReplayBuffer
from reinforce_ada.integrations.verl.settings import HISTORY, settings_of
from reinforce_ada.integrations.verl.worker import plain
from reinforce_ada.sampling import History, Memory, Policy
from reinforce_ada.types import SamplingResult

STOCK = plain(AgentLoopWorkerTQ)
ADAPTIVE = ("algorithm.adv_estimator=reinforce_ada", "algorithm.rollout_correction.bypass_mode=True",
            "actor_rollout_ref.rollout.calculate_log_probs=True")  # fmt: skip
POLICIES = {
    "reinforce-ada-balance": (),
    "reinforce-ada-pos": ("+reinforce_ada.round_size=4",),
    "reinforce-ada-memory": (),
    "reinforce-ada-exact": ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",),
    "pods": ("+reinforce_ada.num_completions=12",),
}


def worker_of(cls: type[Any], config: Any, client: Client | None = None) -> Any:
    return cls(config, client or Client(), None, [Reward()])


def text_of(chat: Any) -> str:
    return str(next(iter(chat))["content"])


def rollout(worker: Any, rows: Any, partition: str = "train", mode: str = "sync") -> tuple[Any, dict[str, float]]:
    """What one step of the trainer does up to its batch: submit, generate, wait, sample."""
    uids, number = [str(u) for u in rows["uid"]], len(rows)
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 1} for _ in uids]
    tq.kv_batch_put(keys=uids, partition_id=partition, tags=tags)

    async def generate() -> None:
        await worker.generate_sequences(rows)
        while worker.background_tasks:
            await asyncio.sleep(0.01)

    asyncio.run(generate())
    buffer = AdaptiveReplayBuffer(
        mode, trainer_config=None, max_off_policy_threshold=None, max_off_policy_strategy="drop", sampler_kwargs={}, poll_interval=0.05
    )
    return buffer.sample(1, partition, number)


def fields(batch: Any, *names: str) -> Any:
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(names))


def with_advantages(batch: Any, config: Any) -> list[tuple[str, float, float]]:
    """(uid, reward, advantage) of each row, through the trainer's own step."""
    PPOTrainer._compute_advantage(SimpleNamespace(config=config, kl_ctrl_in_reward=None), batch, {})
    out = fields(batch, "uid", "rm_scores", "advantages")
    return [(key, float(out["rm_scores"][i].sum()), float(out["advantages"][i][0])) for i, key in enumerate(batch.keys)]


def truth(rows: Any, policy: Policy) -> tuple[SamplingResult, list[list[float]]]:
    """The pools of the one sampler over all prompts, on the same outcomes, and the advantages of what it keeps."""
    prompts = [Prompt(str(u), text=text_of(c)) for u, c in zip(rows["uid"], rows["raw_prompt"], strict=True)]
    engine = ScriptedEngine(lambda request: answer(request.prompt.text, request.id.index), slots=999)
    result = run(AdaptiveSampler(prompts, policy, memory=Memory()), engine, lambda prompt, said: float(said == right_answer(prompt.text)))
    return result, advantages_of(result, policy)


@pytest.mark.parametrize("name", POLICIES)
def test_rows_and_advantages_are_those_of_the_one_sampler(name: str, configure: Any, queue: Any, rows_of: Any) -> None:
    config = configure(*ADAPTIVE, f"+reinforce_ada.preset={name}", *POLICIES[name])
    settings, rows = settings_of(config), rows_of(range(24))
    result, advantages = truth(rows, settings.policy)
    worker = worker_of(AdaptiveAgentLoopWorker, config)
    if settings.policy.needs_memory:  # the manager adds the histories
        assign_non_tensor_stack(rows, HISTORY, [["key", *History()]] * 24)
    batch, metrics = rollout(worker, rows)
    wanted = {}
    for group, given in zip(result.groups, advantages, strict=True):
        kept = list(zip(group.kept, given, strict=True))
        for scored, advantage in kept if any(given) else kept[:1]:
            wanted[f"{scored.id.prompt_id}_{scored.id.index}_0"] = (scored.reward, advantage)
    found = {key: (reward, advantage) for key, reward, advantage in with_advantages(batch, config)}
    assert set(found) == set(wanted)
    for key, (reward, advantage) in wanted.items():
        assert found[key] == (reward, pytest.approx(advantage, abs=1e-6))
    for logged in ("first_round_reward", "signal_fraction", "samples_per_prompt", "pass_rate", "num_completions_kept"):
        assert metrics[f"reinforce_ada/{logged}"] == pytest.approx(result.metrics[logged]), logged
    assert worker.llm_client.num_running == 0
    clear(batch)


def clear(batch: Any) -> None:
    """What the trainer does after a step; then nothing of it is left."""
    tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
    assert not (tq.kv_list(batch.partition_id) or {}).get(batch.partition_id)


@pytest.mark.parametrize("fault", [{"broken": 2}, {"cancelled": 2}, "several"])
def test_no_prompt_is_lost(fault: Any, configure: Any, queue: Any, rows_of: Any) -> None:
    class Several(AdaptiveAgentLoopWorker):
        """Every third session gives two outputs."""

        async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Any:
            twice = kwargs["session_id"] % 3 == 2
            return await super()._agent_loop_postprocess([output.model_copy(deep=True), output] if twice else output, validate, **kwargs)

    config, rows = configure(*ADAPTIVE, "+reinforce_ada.preset=reinforce-ada-balance"), rows_of(range(24))
    several = fault == "several"
    worker = worker_of(Several if several else AdaptiveAgentLoopWorker, config, None if several else Client(**fault))
    batch, metrics = rollout(worker, rows)
    uids = {str(u) for u in rows["uid"]}
    assert {key.split("_")[0] for key in batch.keys} == uids
    own = fields(batch, "uid", "raw_prompt", "responses")
    text = dict(zip([str(u) for u in rows["uid"]], [text_of(c) for c in rows["raw_prompt"]], strict=True))
    for i, key in enumerate(batch.keys):
        uid, session, _ = key.rsplit("_", 2)
        said = TOKENIZER.decode(own["responses"][i], skip_special_tokens=True)
        assert str(own["uid"][i]) == uid
        assert said == answer(text[uid], int(session))
    assert (metrics["reinforce_ada/num_voids"] > 0) == (not several)
    counts = Counter(key.rsplit("_", 1)[0] for key in batch.keys)
    for key in batch.keys:
        session = int(key.rsplit("_", 2)[1])
        assert counts[key.rsplit("_", 1)[0]] == (2 if several and session % 3 == 2 else 1)
        assert several or session % 3 != 2
    for key, reward, advantage in with_advantages(batch, config):
        assert advantage == 0 or (advantage > 0) == (reward > 0), key
    assert worker.llm_client.num_running == 0
    clear(batch)


def test_a_prompt_without_any_outcome_is_a_failure_and_the_others_train(configure: Any, queue: Any, rows_of: Any) -> None:
    class Down(Client):
        async def generate(self, request_id: str, *, prompt_ids: list[int], **kwargs: Any) -> Any:
            if TOKENIZER.decode(prompt_ids, skip_special_tokens=True)[0] in "345":
                raise RuntimeError("down")
            return await super().generate(request_id, prompt_ids=prompt_ids, **kwargs)

    config, rows = configure(*ADAPTIVE), rows_of(range(24))
    batch, metrics = rollout(worker_of(AdaptiveAgentLoopWorker, config, Down()), rows)
    down = {str(u) for u, c in zip(rows["uid"], rows["raw_prompt"], strict=True) if text_of(c)[0] in "345"}
    assert down
    assert {key.split("_")[0] for key in batch.keys} == {str(u) for u in rows["uid"]} - down
    assert metrics["reinforce_ada/num_voids"] == 32 * len(down)
    with_advantages(batch, config)
    clear(batch)


def test_validation_is_verls_own(configure: Any, queue: Any, rows_of: Any) -> None:
    config = configure(*ADAPTIVE)
    found = []
    for cls in (STOCK, AdaptiveAgentLoopWorker):
        rows = rows_of(range(8), validate=True)
        batch, metrics = rollout(worker_of(cls, config), rows, "val")
        out = fields(batch, "responses", "rm_scores", "uid")
        place = {str(u): i for i, u in enumerate(rows["uid"])}
        found.append(sorted((place[str(out["uid"][i])], out["responses"][i].tolist(), out["rm_scores"][i].tolist()) for i in range(8)))
        assert metrics == {}
        clear(batch)
    assert found[0] == found[1]


def test_with_preset_grpo_the_rows_and_advantages_are_verls(configure: Any, queue: Any, rows_of: Any) -> None:
    adaptive = (*ADAPTIVE, "+reinforce_ada.preset=grpo", "+reinforce_ada.zero_rows=all")
    found = []
    for cls, config in ((STOCK, configure(*ADAPTIVE[1:])), (AdaptiveAgentLoopWorker, configure(*adaptive))):
        rows = rows_of(range(24))
        place = {str(u): i for i, u in enumerate(rows["uid"])}
        batch, _ = rollout(worker_of(cls, config), rows)
        names = [f"{place[uid]} {session}" for uid, session in (key.split("_", 1) for key in batch.keys)]
        advantages = {name: row[1:] for name, row in zip(names, with_advantages(batch, config), strict=True)}
        out = fields(batch, "input_ids", "position_ids", "response_mask", "loss_mask", "rollout_log_probs", "prompts", "rm_scores")
        values = {name: [column[i].tolist() for column in out.values()] for i, name in enumerate(names)}
        tags = {name: {k: v for k, v in tag.items() if k != "reinforce_ada"} for name, tag in zip(names, batch.tags, strict=True)}
        found.append((values, tags, advantages))
        clear(batch)
    (values, tags, advantages), ours = found
    assert len(values) == 96
    assert ours[:2] == (values, tags)
    for name, (reward, advantage) in advantages.items():
        assert ours[2][name] == (reward, pytest.approx(advantage, abs=1e-6))


def test_one_class_prompts_publish_as_many_rows_as_asked(configure: Any, queue: Any, rows_of: Any) -> None:
    for zero_rows, expected in (("all", 4), ("one", 1), ("none", 0)):
        config, rows = configure(*ADAPTIVE, f"+reinforce_ada.zero_rows={zero_rows}"), rows_of(range(64))
        one_class = {str(u) for u, c in zip(rows["uid"], rows["raw_prompt"], strict=True) if text_of(c)[0] in "01"}
        batch, _ = rollout(worker_of(AdaptiveAgentLoopWorker, config), rows)
        counts = Counter(key.split("_")[0] for key in batch.keys)
        assert {counts[uid] for uid in one_class} == {expected}
        assert torch.tensor([a for k, _, a in with_advantages(batch, config) if k.split("_")[0] in one_class]).count_nonzero() == 0
        clear(batch)


class Panic(BaseException):
    """What a tokenizer written in Rust raises: no Exception."""


def test_a_session_without_a_token_or_with_a_panic_is_a_void(configure: Any, queue: Any, rows_of: Any) -> None:
    class Odd(AdaptiveAgentLoopWorker):
        async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Any:
            if kwargs["session_id"] % 4 == 1:
                raise Panic("tokenizers panicked")
            if kwargs["session_id"] % 4 == 2:
                output.response_ids = []
            return await super()._agent_loop_postprocess(output, validate, **kwargs)

    config, rows = configure(*ADAPTIVE), rows_of(range(8))
    batch, metrics = rollout(worker_of(Odd, config), rows)
    assert {key.split("_")[0] for key in batch.keys} == {str(u) for u in rows["uid"]}
    assert {int(key.rsplit("_", 2)[1]) % 4 for key in batch.keys} <= {0, 3}
    assert metrics["reinforce_ada/num_voids"] >= 8 * 4
    with_advantages(batch, config)
    clear(batch)


class Near(Reward):
    """Two rewards that differ in float64 only."""

    async def remote(self, data: Any) -> dict[str, Any]:
        scored = await super().remote(data)
        return {**scored, "reward_score": 1 + 1e-9 * scored["reward_score"]}


def test_rewards_that_verl_cannot_tell_apart_are_one(configure: Any, queue: Any, rows_of: Any) -> None:
    config = configure(*ADAPTIVE, "+reinforce_ada.preset=grpo", "+reinforce_ada.zero_rows=all")
    batch, metrics = rollout(AdaptiveAgentLoopWorker(config, Client(), None, [Near()]), rows_of(range(8)))
    assert metrics["reinforce_ada/signal_fraction"] == 0
    assert [advantage for _, _, advantage in with_advantages(batch, config)] == [0.0] * 32
    clear(batch)


def test_a_replay_buffer_with_another_hook_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReplayBuffer, "_materialize_batch", lambda self, partition, uids: None)
    with pytest.raises(InputError, match="its _materialize_batch takes"):
        AdaptiveReplayBuffer("sync")
