"""verl's advantage estimator "reinforce_ada": the advantages that the workers computed over whole pools, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reinforce_ada.errors import InputError
from reinforce_ada.integrations.verl.settings import ESTIMATOR, TAG, TRAIN


def estimate(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Sequence[str] = (), **_: Any
) -> tuple[Tensor, Tensor]:
    """Return the advantages of the rows of a batch, and the same as their returns.

    Args:
        token_level_rewards: [N, L], the reward of each row on one of its tokens.
        response_mask: [N, L].
        index: [N], the uid of each row's prompt; verl's padding has one that no prompt has.
    Returns: [N, L] float32 each, a row's advantage on its masked tokens.
    Raises: InputError for a row whose prompt was not sampled by an AdaptiveAgentLoopWorker.
    """
    import transfer_queue as tq

    advantages = advantages_by_prompt((tq.kv_list(partition_id=TRAIN) or {}).get(TRAIN, {}))
    rewards = token_level_rewards.sum(-1).to(torch.float32).tolist()
    rows = [_advantage(advantages, str(uid), reward) for uid, reward in zip(index, rewards, strict=True)]
    spread = torch.tensor(rows, dtype=torch.float32, device=response_mask.device)[:, None] * response_mask
    return spread, spread.clone()


def advantages_by_prompt(tags: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """Return the advantage of each reward, for each prompt, from the tags of verl's rows; rewards as float32, which is what verl keeps."""
    found: dict[str, dict[float, float]] = {}
    for key, tag in tags.items():
        if TAG in tag and not tag.get("is_prompt", False):
            found[key.split("_")[0]] = {float(np.float32(reward)): advantage for reward, advantage in tag[TAG]}
    return found


def _advantage(known: Mapping[str, Mapping[float, float]], uid: str, reward: float) -> float:
    if uid.startswith("pad"):  # verl fills up a batch with rows that have no mask
        return 0.0
    if reward not in known.get(uid, {}):
        given = f"a row of prompt {uid} with reward {reward:g}" if uid in known else f"rows of prompt {uid} without a pool"
        hint = "agent_loop_manager_class=reinforce_ada.integrations.verl.AdaptiveAgentLoopManager"
        raise InputError(f"adv_estimator={ESTIMATOR}", given, "rows that the adaptive workers published are needed", hint)
    return known[uid][reward]
