"""What the adapters of slime and AReaL are compared with: the real sampler over all prompts, on outcomes that are known beforehand."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest

from reinforce_ada import AdaptiveSampler, Prompt, arun
from reinforce_ada.advantages import advantages_of
from reinforce_ada.sampling import Policy
from reinforce_ada.types import Request

RATES = (0.0, 0.1, 0.35, 0.5, 0.8, 1.0)
PRESETS = ("reinforce-ada-balance", "reinforce-ada-pos", "grpo")
Rows = list[tuple[int, float, float]]  # index, reward and advantage of each kept completion of a prompt


def reward_of(prompt: int, index: int, disturbed: bool = False) -> float:
    """Raises: RuntimeError or CancelledError for some completions, if disturbed."""
    law = random.Random(f"{prompt} {index}")
    if disturbed and (failure := law.random()) < 0.3:
        raise RuntimeError("no answer") if failure < 0.15 else asyncio.CancelledError
    return float(law.random() < RATES[prompt])


def expected(policy: Policy, disturbed: bool = False) -> list[Rows]:
    """What one sampler over all prompts keeps."""

    async def sample(request: Request) -> tuple[None, float]:
        return None, reward_of(int(request.id.prompt_id), request.id.index, disturbed)

    sampler = AdaptiveSampler([Prompt(str(i)) for i in range(len(RATES))], policy, window=policy.decide_every)
    result = asyncio.run(arun(sampler, sample, concurrency=10_000))
    rows: list[Rows] = [[] for _ in RATES]
    for group, advantages in zip(result.groups, advantages_of(result, policy), strict=True):
        kept = zip(group.kept, advantages, strict=True)
        rows[int(group.pool.prompt.prompt_id)] = [(s.id.index, s.reward, advantage) for s, advantage in kept]
    return rows


def assert_same(found: list[Rows], truth: list[Rows]) -> None:
    assert [[row[:2] for row in rows] for rows in found] == [[row[:2] for row in rows] for rows in truth]
    flat = [[row[2] for rows in side for row in rows] for side in (found, truth)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-6)


def stand_in(modules: Mapping[str, Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put modules with these contents in the place of a library; parents come before their children."""
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
