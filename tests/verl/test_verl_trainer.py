"""verl's whole trainer, no line of it changed: with preset grpo it trains what it trains alone, and the adaptive policies train too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run import Report, run

SECTION = "+reinforce_ada"
ADAPTIVE = (
    "algorithm.adv_estimator=reinforce_ada",
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=reinforce_ada.integrations.verl.AdaptiveAgentLoopManager",
    "trainer.v1.sampler.custom_sampler.path=pkg://ordered",
    "trainer.v1.sampler.custom_sampler.name=OrderedAdaptiveReplayBuffer",
)
# What differs between two runs beside time: metrics that are of no interest here have the unit in their name.
_OF_TIME = ("timing", "perf", "throughput", "memory", "reinforce_ada/")


def comparable(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not any(word in name for word in _OF_TIME)}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(tmp_path_factory.mktemp("stock"), steps=5)


def test_preset_grpo_is_stock_verl(stock: Report, tmp_path: Path) -> None:
    ours = run(tmp_path, steps=5, extra=(*ADAPTIVE, f"{SECTION}.preset=grpo", f"{SECTION}.zero_rows=all"))
    assert len(ours.metrics) == len(stock.metrics) == 5
    for mine, theirs in zip(ours.metrics, stock.metrics, strict=True):
        assert comparable(mine) == pytest.approx(comparable(theirs), abs=1e-6, nan_ok=True)
        assert mine["reinforce_ada/first_round_reward"] == pytest.approx(theirs["critic/score/mean"])
    for name, weight in stock.weights.items():
        torch.testing.assert_close(ours.weights[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        (f"{SECTION}.preset=reinforce-ada-balance",),
        (f"{SECTION}.preset=reinforce-ada-memory", "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum"),
    ],
)
def test_adaptive_policies_train(settings: tuple[str, ...], tmp_path: Path) -> None:
    ours = run(tmp_path, steps=10, extra=(*ADAPTIVE, *settings))
    assert len(ours.metrics) == 10
    assert all(m["reinforce_ada/num_completions_kept"] >= 8 for m in ours.metrics)
    assert all(0 <= m["reinforce_ada/first_round_reward"] <= 1 for m in ours.metrics)
    drawn = {m["reinforce_ada/samples_per_prompt"] for m in ours.metrics}
    assert (len(drawn) > 1) == ("balance" in settings[0])
    assert all(m["actor/grad_norm"] > 0 for m in ours.metrics)
