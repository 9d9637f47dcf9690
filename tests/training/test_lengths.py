"""How long completions are and how many are cut: counted per step and per evaluation, shown, and warned of once."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from toy_training import MAX_TOKENS, STOP, beside, toy_config, toy_trainer

from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.sampling.metrics import joined
from reinforce_ada.training.display import truncation_warning
from reinforce_ada.training.log import read_log
from reinforce_ada.types import Completion, CompletionId, Failed, Prompt, SamplingResult, Scored


def answered(request_id: CompletionId, char: str) -> Scored | Failed:
    """`s`: three tokens and a stop; `c`: five tokens and cut; `m`: a stop, two of four tokens written by the policy; others are voids."""
    if char not in "scm":
        return Failed(request_id, 0, "void")
    size = {"s": 3, "c": 5, "m": 4}[char]
    mask = np.array([True, False, False, True]) if char == "m" else None
    completion = Completion(
        request_id, np.zeros(size), np.zeros(size), "", "length" if char == "c" else "stop", 0, token_mask=mask
    )  # fmt: skip
    return Scored(completion, float(request_id.index % 2))


def sampled(**scripts: str) -> SamplingResult:
    size = len(next(iter(scripts.values())))
    sampler = AdaptiveSampler([Prompt(name) for name in scripts], preset("grpo", group_size=size))
    while not sampler.done:
        for request in sampler.next_requests(100):
            sampler.receive(answered(request.id, scripts[request.id.prompt_id][request.id.index]))
    return sampler.result()


@pytest.mark.parametrize(
    ("scripts", "length", "cut"),
    [
        ({"a": "ssss"}, 3.0, 0.0),
        ({"a": "sscc"}, 4.0, 0.5),
        ({"a": "scvv"}, 4.0, 0.5),  # voids have no text to measure
        ({"a": "mmmm"}, 2.0, 0.0),
        ({"a": "ssss", "b": "cvvv"}, 17 / 5, 1 / 5),
        ({"a": "vvvv"}, math.nan, math.nan),
    ],
)
def test_the_length_and_the_cut_share_are_those_of_the_scored_completions(scripts: dict[str, str], length: float, cut: float) -> None:
    together = sampled(**scripts).metrics
    expected = pytest.approx((length, cut), nan_ok=True)
    assert (together["completion_length_mean"], together["truncated_fraction"]) == expected
    alone = joined([sampled(**{name: script}).metrics for name, script in scripts.items()])
    assert (alone["completion_length_mean"], alone["truncated_fraction"]) == expected


@pytest.mark.parametrize(("share", "is_said"), [(0.5, False), (0.51, True), (1.0, True), (math.nan, False)])
def test_a_warning_says_what_to_raise(share: float, is_said: bool) -> None:
    said = truncation_warning(share, 64)
    assert ("were cut at max_tokens = 64" in said and "--max-tokens" in said) == is_said == bool(said)


def test_steps_and_evaluations_log_what_the_journal_has_and_one_warning_is_printed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = toy_config(out, steps=3, prompts_per_step=2)
    toy_trainer(config, out, resume=False).run()
    records = {kind: [r for r in read_log(out / "log.jsonl") if r["kind"] == kind] for kind in ("step", "eval")}
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        for record in records["step"]:
            drawn = [e.completion for e in store.events(record["step"]) if isinstance(e, Scored)]
            assert record["tokens_wasted"] == 0  # every scored completion of the journal belongs to a pool
            assert record["completion_length_mean"] == pytest.approx(np.mean([len(c.token_ids) for c in drawn]))
            assert record["truncated_fraction"] == pytest.approx(np.mean([STOP not in c.token_ids for c in drawn]))
    assert len(records["eval"]) == 3
    assert all(0 < r["completion_length_mean"] <= MAX_TOKENS and 0 <= r["truncated_fraction"] <= 1 for r in records["eval"])
    lines = beside(out, "said").read_text().splitlines()
    assert max(r["truncated_fraction"] for r in (*records["step"], *records["eval"])) > 0.5
    assert len([line for line in lines if line.startswith("warning: ")]) == 1
    (line,) = [line for line in lines if line.startswith("step   1/")]
    first = records["step"][0]
    assert f"length {first['completion_length_mean']:.0f}, {first['truncated_fraction']:.0%} cut" in line
