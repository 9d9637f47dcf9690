"""What every engine must do with a model it samples from: played by whoever has one, judged against the model and another engine."""

from __future__ import annotations

import copy
from typing import Any

import engine_scenes as scenes

from reinforce_ada.types import CompletionId, Prompt, Request


def play(engine: Any, module: Any, *, num_syncs: int = 3) -> dict[str, Any]:
    """Facts about an engine that has not seen weights yet; the model is float32, and changed on the way."""
    scenes.spread(module)
    engine.sync_weights(scenes.weights(module), 0)
    requests = scenes.make_requests(scenes.make_prompts())
    facts: dict[str, Any] = {
        "refusals": {name: scenes.refusal(lambda r=r: engine.submit([r])) for name, r in scenes.bad_requests().items()}
    }
    first = scenes.sample(engine, requests)
    facts["tokens"], facts["reversed"] = scenes.tokens(first), scenes.tokens(scenes.sample(engine, requests[::-1]))
    facts["diff"] = scenes.largest_logprob_difference(module, requests, first, 1.0)

    slots = [engine.free_slots]
    engine.submit(requests[:3])
    slots.append(engine.free_slots)
    facts["sync_in_flight"] = scenes.refusal(lambda: engine.sync_weights(scenes.weights(module), 9))
    engine.abort([r.id for r in requests])  # most of them not running
    facts["slots"] = [*slots, engine.free_slots]
    kept, again = scenes.abort_and_reissue(engine, requests)
    facts["kept"], facts["again"] = scenes.tokens(kept), scenes.tokens(again)

    facts["num_computed"] = computed_prompt_tokens(engine)
    facts["syncs"] = []
    for version in range(1, num_syncs + 1):
        scenes.perturb(module, seed=version)
        engine.sync_weights(scenes.weights(module), version)
        done = scenes.sample(engine, requests[::4])
        frozen = copy.deepcopy(module)
        scenes.perturb(module, seed=100 + version)  # the trainer goes on; the engine must not see it before the next sync
        facts["syncs"].append(
            {
                "diff": scenes.largest_logprob_difference(frozen, requests[::4], done, 1.0),
                "tokens": scenes.tokens(done),
                "unchanged": scenes.tokens(scenes.sample(engine, requests[::4])) == scenes.tokens(done),
                "versions": sorted({c.policy_version for c in done.values()}),
            }
        )
    return facts


PROMPT_TOKENS, BLOCK, TOGETHER = 40, 32, 8  # only whole blocks of a prompt are cached


def computed_prompt_tokens(engine: Any) -> int:
    """Over the completions of one prompt, asked for at once."""
    prompt = Prompt("new", tuple(range(5, 5 + PROMPT_TOKENS)))
    done = scenes.sample(engine, [Request(CompletionId(1, "new", k), prompt, seed=k, policy_version=0) for k in range(TOGETHER)])
    return sum(PROMPT_TOKENS - c.num_cached_tokens for c in done.values())


def check(facts: dict[str, Any], other: dict[str, Any], num_replicas: int = 1) -> None:
    """Holds the facts to the contract, and the tokens to those of another engine."""
    assert "is empty" in facts["refusals"]["empty"]
    assert "raise --max-model-len" in facts["refusals"]["long"]
    assert "3 requests in flight" in facts["sync_in_flight"]
    assert len({tuple(t) for t in facts["tokens"].values()}) > 12  # of 24
    assert facts["reversed"] == facts["tokens"]
    assert facts["diff"] < 1e-4
    free, busy, freed = facts["slots"]
    assert (free - busy, freed) == (3, free)
    assert {**facts["kept"], **facts["again"]} == facts["tokens"]
    assert facts["again"]
    assert facts["num_computed"] <= num_replicas * BLOCK + TOGETHER * (PROMPT_TOKENS - BLOCK)  # the prefix once, or once a replica
    for version, sync in enumerate(facts["syncs"], 1):
        assert sync["diff"] < 1e-4
        assert sync["unchanged"]
        assert sync["versions"] == [version]
    assert len({str(sync["tokens"]) for sync in facts["syncs"]}) == len(facts["syncs"])
    assert facts["tokens"] == other["tokens"]
    assert [sync["tokens"] for sync in facts["syncs"]] == [sync["tokens"] for sync in other["syncs"]]
