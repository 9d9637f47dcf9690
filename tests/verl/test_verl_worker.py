"""verl's own worker, queue, replay buffer and advantage step, with adaptive sessions: the rows are those of the one sampler."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue as tq
from scripted import TOKENIZER, Client, Reward, answer
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from reinforce_ada import AdaptiveSampler, Prompt, advantages_of, preset
from reinforce_ada.driver import run
from reinforce_ada.engines.scripted import ScriptedEngine
from reinforce_ada.integrations.verl import AdaptiveAgentLoopWorker, AdaptiveReplayBuffer
from reinforce_ada.integrations.verl.worker import _plain
from reinforce_ada.types import SamplingResult

STOCK = _plain(AgentLoopWorkerTQ)
ADAPTIVE = ("algorithm.adv_estimator=reinforce_ada", "algorithm.rollout_correction.bypass_mode=True",
            "actor_rollout_ref.rollout.calculate_log_probs=True")  # fmt: skip
POLICIES = {
    "balance": ("reinforce-ada-balance", {}, ()),
    "pos": ("reinforce-ada-pos", {"round_size": 4}, ("+reinforce_ada.round_size=4",)),
    "memory": ("reinforce-ada-memory", {}, ("+reinforce_ada.zero_rows=all",)),
    "exact": ("reinforce-ada-exact", {}, ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum",)),
    "pods": ("pods", {"num_completions": 12}, ("+reinforce_ada.num_completions=12",)),
}


def worker_of(cls: type[Any], config: Any, client: Client | None = None) -> Any:
    return cls(config, client or Client(), None, [Reward()])


def text_of(chat: Any) -> str:
    return str(list(chat)[0]["content"])


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


def truth(rows: Any, name: str, options: dict[str, Any]) -> tuple[SamplingResult, list[list[float]]]:
    """The pools of the one sampler over all prompts, on the same outcomes."""
    policy = preset(name, **{**({} if name == "reinforce-ada-memory" else {"group_size": 4}), **options})
    if name == "reinforce-ada-memory":
        policy = preset(name, group_size=4)
    prompts = [Prompt(str(u), text=text_of(c)) for u, c in zip(rows["uid"], rows["raw_prompt"], strict=True)]
    engine = ScriptedEngine(lambda request: answer(request.prompt.text, request.id.index), slots=999)
    from reinforce_ada.sampling import Memory

    sampler = AdaptiveSampler(prompts, policy, memory=Memory())
    result = run(sampler, engine, lambda prompt, said: float(said == str(int(prompt.text[0]) + int(prompt.text[2]))))
    return result, advantages_of(result, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_and_advantages_are_those_of_the_one_sampler(policy: str, configure: Any, queue: Any, rows_of: Any) -> None:
    name, options, changes = POLICIES[policy]
    config = configure(*ADAPTIVE, f"+reinforce_ada.preset={name}", *changes)
    rows = rows_of(range(24))
    result, advantages = truth(rows, name, options)
    worker = worker_of(AdaptiveAgentLoopWorker, config)
    if name == "reinforce-ada-memory":  # what the manager adds
        from verl.utils.tensordict_utils import assign_non_tensor_stack

        assign_non_tensor_stack(rows, "__reinforce_ada_history__", [[1.0, 1.0, 0, False]] * 24)
    batch, metrics = rollout(worker, rows)
    wanted = {}
    for group, given in zip(result.groups, advantages, strict=True):
        kept = list(zip(group.kept, given, strict=True))
        for scored, advantage in kept if any(given) or "+reinforce_ada.zero_rows=all" in changes else kept[:1]:
            wanted[f"{scored.id.prompt_id}_{scored.id.index}_0"] = (scored.reward, advantage)
    found = with_advantages(batch, config)
    assert {key for key, _, _ in found} == set(wanted)
    for key, reward, advantage in found:
        assert reward == wanted[key][0]
        assert advantage == pytest.approx(wanted[key][1], abs=1e-6)
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
    parity = ("+reinforce_ada.preset=grpo", "+reinforce_ada.zero_rows=all", "actor_rollout_ref.rollout.calculate_log_probs=True")
    stock, ours = configure(*parity[2:], "algorithm.rollout_correction.bypass_mode=True"), configure(*ADAPTIVE, *parity[:2])
    found = []
    for cls, config in ((STOCK, stock), (AdaptiveAgentLoopWorker, ours)):
        rows = rows_of(range(24))
        place = {str(u): i for i, u in enumerate(rows["uid"])}
        batch, _ = rollout(worker_of(cls, config), rows)
        named = {f"{place[k.split('_')[0]]}_{k.split('_', 1)[1]}": (r, a) for k, r, a in with_advantages(batch, config)}
        out = fields(batch, "input_ids", "position_ids", "response_mask", "loss_mask", "rollout_log_probs", "prompts", "rm_scores")
        rows_found = {
            f"{place[k.split('_')[0]]}_{k.split('_', 1)[1]}": {name: out[name][i].tolist() for name in out.keys()} for i, k in enumerate(batch.keys)
        }
        tags = {f"{place[k.split('_')[0]]}_{k.split('_', 1)[1]}": {n: v for n, v in t.items() if n != "reinforce_ada"} for k, t in zip(batch.keys, batch.tags, strict=True)}
        found.append((named, rows_found, tags))
        clear(batch)
    (stock_named, *stock_rest), (our_named, *our_rest) = found
    assert our_rest == stock_rest
    assert set(our_named) == set(stock_named)
    assert len(our_named) == 96
    for key, (reward, advantage) in stock_named.items():
        assert our_named[key] == (reward, pytest.approx(advantage, abs=1e-6))


def test_one_class_prompts_publish_as_many_rows_as_asked(configure: Any, queue: Any, rows_of: Any) -> None:
    for zero_rows, expected in (("all", 4), ("one", 1), ("none", 0)):
        config, rows = configure(*ADAPTIVE, f"+reinforce_ada.zero_rows={zero_rows}"), rows_of(range(64))
        one_class = {str(u) for u, c in zip(rows["uid"], rows["raw_prompt"], strict=True) if text_of(c)[0] in "01"}
        batch, _ = rollout(worker_of(AdaptiveAgentLoopWorker, config), rows)
        counts = Counter(key.split("_")[0] for key in batch.keys)
        assert {counts[uid] for uid in one_class} == {expected}
        assert torch.tensor([a for k, _, a in with_advantages(batch, config) if k.split("_")[0] in one_class]).count_nonzero() == 0
        clear(batch)
