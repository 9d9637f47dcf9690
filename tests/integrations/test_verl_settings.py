"""What the verl adapter does without verl: its settings and refusals, the memory file, the advantages in the tags, the joined metrics."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reinforce_ada import AdaptiveSampler, Prompt, adaptive_group, arun, doctor, preset
from reinforce_ada.errors import InputError
from reinforce_ada.integrations.hooks import Hooks
from reinforce_ada.integrations.verl import hooks
from reinforce_ada.integrations.verl.estimator import advantages_by_prompt, estimate
from reinforce_ada.integrations.verl.memory import Given, RunMemory, Seen, key_of_chat
from reinforce_ada.integrations.verl.settings import check, settings_of
from reinforce_ada.sampling import History, Memory
from reinforce_ada.sampling.metrics import joined
from reinforce_ada.types import Request


class Node(dict):  # type: ignore[type-arg]
    """A node of a configuration, read as an attribute or by get(), as OmegaConf's are."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


def config_of(**changes: Any) -> Node:
    """verl's configuration, as far as it is read; changes are given by dotted names with __ for the dots."""
    config = Node(
        algorithm=Node(adv_estimator="reinforce_ada", use_kl_in_reward=False, rollout_correction=Node(bypass_mode=False)),
        actor_rollout_ref=Node(rollout=Node(n=4, calculate_log_probs=False), actor=Node(loss_agg_mode="token-mean")),
        reinforce_ada=Node(),
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def test_the_default_is_balance_with_verls_n() -> None:
    settings = settings_of(config_of(actor_rollout_ref__rollout__n=6))
    assert (settings.policy.name, settings.policy.group_size) == ("reinforce-ada-balance", 6)
    assert (settings.window, settings.zero_rows) == (None, "one")
    without = config_of()
    del without["reinforce_ada"]
    assert settings_of(without) == settings_of(config_of())


def test_keywords_go_to_the_preset() -> None:
    section = Node(preset="reinforce-ada-pos", round_size=4, max_rounds=2, window=3, zero_rows="none")
    settings = settings_of(config_of(reinforce_ada=section))
    assert settings.policy == preset("reinforce-ada-pos", group_size=4, round_size=4, max_rounds=2)
    assert (settings.window, settings.zero_rows) == (3, "none")
    check(config_of(reinforce_ada=section), settings.policy, has_rewards=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reinforce_ada": Node(preset="reinforce-ada-balanced")}, "did you mean 'reinforce-ada-balance'?"),
        ({"reinforce_ada": Node(round_siz=4)}, "did you mean 'round_size'?"),
        ({"reinforce_ada": Node(window=0)}, "window 0; an integer of at least 1 is needed"),
        (
            {"reinforce_ada": Node(zero_rows="on")},
            "unknown value of reinforce_ada.zero_rows 'on'; known: all, none, one; did you mean 'one'?",
        ),
        (
            {"reinforce_ada": Node(group_size=8)},
            "group_size 8; that of the trainer, 4, is needed; leave group_size out",
        ),
        ({"reinforce_ada": Node(preset="dapo")}, "with Refill, which draws further prompts"),
        ({"reinforce_ada": Node(preset="knapsack")}, "which divides a budget between the prompts of a step"),
        ({"reinforce_ada": Node(preset="grpo", scale="batch")}, "scale 'batch'; each prompt is sampled alone"),
        ({"reinforce_ada": Node(preset="reinforce-ada-memory", baseline="predicted")}, "a baseline that is predicted"),
        ({"reinforce_ada": "grpo"}, "reinforce_ada='grpo'; names with values are needed; +reinforce_ada.preset=grpo"),
        ({"reinforce_ada": {1: 2}}, "names with values are needed"),
        ({"reinforce_ada": Node(preset=3)}, "preset 3; the name of a preset is needed"),
        ({"reinforce_ada": Node(positive_threshold="0.5")}, "values of the keywords' types are needed"),
        ({"actor_rollout_ref__rollout__n": None}, "n None; an integer of at least 1 is needed"),
        ({"algorithm__filter_groups": Node(enable=True)}, "algorithm.filter_groups.enable=True"),
        (
            {"reinforce_ada": Node(preset="reinforce-ada-exact"), "actor_rollout_ref__actor__loss_agg_mode": "seq-mean-token-sum-norm"},
            "loss_agg_mode=seq-mean-token-sum-norm, whose denominator depends on the outcomes",
        ),
        ({"reinforce_ada": Node(preset="reinforce-ada-exact")}, "loss_agg_mode=token-mean, whose denominator depends on the outcomes"),
        ({"algorithm__adv_estimator": "grpo"}, "the advantages come from whole pools; algorithm.adv_estimator=reinforce_ada"),
        ({"algorithm__use_kl_in_reward": True}, "use_kl_in_reward=True"),
        ({"algorithm__rollout_correction": Node(bypass_mode=True)}, "bypass_mode=True without the logprobs of the rollout"),
    ],
)
def test_what_cannot_be_combined_is_one_line(changes: dict[str, Any], message: str) -> None:
    config = config_of(**changes)
    with pytest.raises(InputError) as caught:
        check(config, settings_of(config).policy, has_rewards=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_can_be_combined() -> None:
    with pytest.raises(InputError, match="a colocated reward model; rewards are needed while completions are sampled"):
        check(config_of(), settings_of(config_of()).policy, has_rewards=False)
    for changes in (
        {"algorithm__rollout_correction": None},
        {"algorithm__rollout_correction": Node(bypass_mode=True), "actor_rollout_ref__rollout__calculate_log_probs": True},
        {"reinforce_ada": Node(preset="reinforce-ada-exact"), "actor_rollout_ref__actor__loss_agg_mode": "seq-mean-token-sum"},
        {
            "reinforce_ada": Node(preset="reinforce-ada-exact"),
            "actor_rollout_ref__actor": Node(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=8),
        },
        {"reinforce_ada": Node(preset="pods", num_completions=16)},
    ):
        config = config_of(**changes)
        check(config, settings_of(config).policy, has_rewards=True)


# -------------------- hooks


def test_the_doctor_and_the_hooks_read_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.examine(check=False)["integrations"]["verl"] == hooks.state()
    worker, loop, buffer = hooks.VERL
    sources = {
        worker.source: "class AgentLoopWorkerTQ:\n    async def _run_prompt(self, prompt, sampling_params, trajectory, trace=False): ...\n"
        "    async def _agent_loop_postprocess(self, output, validate, **kwargs): ...\n",
        loop.source: "class AgentLoopWorker:\n"
        "    async def _run_agent_loop(self, sampling_params, trajectory, *, agent_name, trace=1, **kwargs): ...\n"
        "    async def _compute_score(self, outputs, kwargs): ...\n",
        buffer.source: "class ReplayBuffer:\n"
        "    def _materialize_batch(self, partition_id, selected_prompt_uids, partition_snapshot): ...\n",
    }
    for source, text in sources.items():
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).write_text(text)
    monkeypatch.setattr("reinforce_ada.integrations.hooks.is_installed", lambda package: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[tmp_path], origin="verl"))
    assert hooks.state() == "ok"
    (tmp_path / loop.source).write_text(sources[loop.source].replace("outputs", "output"))
    assert hooks.state() == f"its _compute_score takes (output, kwargs) instead of (outputs, kwargs); {loop.needed()}"


def test_a_class_has_the_hooks_or_says_which_one_it_lacks() -> None:
    class Fits:
        def f(self, a: int, *rest: int, b: int = 1, **others: int) -> None: ...

    wanted = Hooks("verl", "verl 0.9.1", "x.py", "Fits", {"f": ("a", "*rest", "b", "**others")})
    assert wanted.difference_of(Fits) == ""
    assert wanted._replace(methods={"g": ()}).difference_of(Fits) == "it has no g"
    with pytest.raises(InputError, match="its f takes \\(a, \\*rest, b, \\*\\*others\\) instead of \\(a\\)"):
        wanted._replace(methods={"f": ("a",)}).check("here", Fits)


# -------------------- advantages


def estimated(tags: dict[str, Any], rewards: list[float], uids: list[str], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    queue = SimpleNamespace(kv_list=lambda partition_id: {partition_id: tags})
    monkeypatch.setitem(__import__("sys").modules, "transfer_queue", queue)
    mask = torch.tensor([[1, 1, 0]] * len(uids))
    given = torch.zeros(len(uids), 3)
    given[:, 1] = torch.tensor(rewards)
    advantages, returns = estimate(given, mask, index=np.array(uids, dtype=object))
    assert torch.equal(advantages, returns)
    assert advantages[:, 2].tolist() == [0.0] * len(uids)
    assert torch.equal(advantages[:, 0], advantages[:, 1])
    return advantages[:, 0]


TAGS = {
    "a": {"is_prompt": True, "status": "finished", "reinforce_ada": {"num_voids": 0.0}},
    "a_0_0": {"status": "success", "reinforce_ada": [[1.0, 0.75], [0.1, -0.15]]},
    "a_3_0": {"status": "success", "reinforce_ada": [[1.0, 0.75], [0.1, -0.15]]},
    "b_1_0": {"reinforce_ada": [[0.0, -0.5]]},
    "padX_0_0": {"is_padding": True, "reinforce_ada": [[1.0, 0.75], [0.1, -0.15]]},
    "c_0_0": {"status": "success"},
}


def test_a_row_has_the_advantage_of_its_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    assert advantages_by_prompt(TAGS)["b"] == {0.0: -0.5}
    found = estimated(TAGS, [0.1, 1.0, 0.0, 0.0], ["a", "a", "b", "padX"], monkeypatch)
    assert found.tolist() == pytest.approx([-0.15, 0.75, -0.5, 0.0])


@pytest.mark.parametrize(
    ("uid", "reward", "message"), [("c", 1.0, "rows of prompt c without a pool"), ("a", 0.5, "a row of prompt a with reward 0.5")]
)
def test_a_row_that_the_workers_did_not_publish_is_one_line(uid: str, reward: float, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=message):
        estimated(TAGS, [reward], [uid], monkeypatch)


# -------------------- memory


def test_the_memory_survives_a_restart_and_forgets_what_was_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "run/reinforce_ada_memory.jsonl"
    first, truth = RunMemory(path), Memory()
    first.open(1)
    rows = [Seen(step, f"p{i}", i, 3 - i) for step in (1, 2, 3) for i in range(3)]
    first.add(rows[:3])
    first.add(reversed(rows[3:]))
    with path.open("a") as file:
        file.write('[2, "p0", -5, 0]\n[2, "p0", 1e400, 0]\n[2, "p0"]\nnull\n')
        file.write('[4, "p0", 1')  # killed while writing
    path.write_bytes(path.read_bytes() + b"\xff\n")
    again = RunMemory(path)
    again.open(3)
    for row in rows[:6]:
        truth.add(row.step, row.key, row.num_correct, row.num_wrong)
    assert [again.history(f"p{i}") for i in range(4)] == [truth.history(Prompt(f"p{i}")) for i in range(4)]
    assert sorted(Seen(*json.loads(line)) for line in path.read_text().splitlines()) == rows[:6]
    again.open(1)  # only the first call reads
    again.add([Seen(1, "p9", 0, 1)])  # it comes late
    assert again.history("p9") == History(1.0, 2.0, 1, False)
    assert Given(list(again.history("p9"))).history(Prompt("x")) == again.history("p9")


def test_a_chat_has_one_key() -> None:
    chat = [{"role": "user", "content": "1+1?"}]
    assert key_of_chat(chat) == key_of_chat(np.array(chat, dtype=object)) == key_of_chat([{"content": "1+1?", "role": "user"}])
    assert key_of_chat(chat) != key_of_chat([{"role": "user", "content": "1+2?"}])
    long = [np.arange(5000), np.arange(5000)]
    long[1][2500] = 0
    first, other = ([{"role": "user", "content": [{"image": image}]}] for image in long)
    assert key_of_chat(first) == key_of_chat([{"role": "user", "content": [{"image": long[0].copy()}]}]) != key_of_chat(other)
    with pytest.raises(InputError, match="a message that cannot be remembered: a object; text"):
        key_of_chat([{"content": object()}])
    with pytest.raises(InputError, match="a message that cannot be remembered"):
        key_of_chat([{1: 2, "a": 3}])


# -------------------- metrics


@pytest.mark.parametrize("policy", [preset("reinforce-ada-balance"), preset("grpo", group_size=3), preset("reinforce-ada-exact")])
def test_the_metrics_of_prompts_join_to_those_of_one_sampler(policy: Any) -> None:
    async def sample(request: Request) -> tuple[None, float]:
        law = random.Random(request.seed)
        if law.random() < 0.1:
            raise RuntimeError
        return None, float(law.random() < request.prompt.data["rate"])

    async def both() -> tuple[dict[str, float], dict[str, float]]:
        prompts = [Prompt(f"p{i}", data={"rate": i / 9}) for i in range(10)]
        sampler = AdaptiveSampler(prompts, policy, window=policy.decide_every)
        together = await arun(sampler, sample, concurrency=10_000)
        alone = [await adaptive_group(policy, sample, prompt=p) for p in prompts]
        return dict(together.metrics), joined([result.metrics for result in alone])

    together, alone = asyncio.run(both())
    assert set(alone) == set(together)
    for name, value in together.items():
        assert alone[name] == pytest.approx(value, nan_ok=True), name
    assert not math.isnan(together["kept_reward"])
