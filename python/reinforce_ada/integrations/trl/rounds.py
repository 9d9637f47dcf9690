"""A sampler's requests, answered in rounds by TRL's own generation and reward functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from reinforce_ada.integrations.trl.rows import Generated, Row
from reinforce_ada.sampling import AdaptiveSampler, Policy
from reinforce_ada.sampling.policies.contracts import Window
from reinforce_ada.sampling.sampler import Schedule
from reinforce_ada.types import Completion, CompletionId, Failed, Prompt, Request, SamplingResult, Scored


class Rounds:
    """Drives one sampler to its end, on every process alike: each call's requests are split evenly and the answers gathered.

    Args:
        trainer: the TRL trainer.
        generate, score: its own `_generate` and `_calculate_rewards`.
    """

    schedule: Schedule = "rounds"

    def __init__(self, trainer: Any, generate: Callable[..., Any], score: Callable[..., Any]) -> None:
        self._trainer, self._generate, self._score = trainer, generate, score
        self._rank, self._world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        self.rows: dict[CompletionId, Row] = {}
        self.num_calls = 0
        self.generated: Generated  # of the latest call

    def window(self, policy: Policy) -> Window | None:
        """Return the sampler's window; rounds have none."""
        return None

    def tokenized(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the prompts as they are wanted; TRL makes the tokens itself."""
        return prompts

    def run(self, sampler: AdaptiveSampler) -> SamplingResult:
        """Return the result of the sampler. No call has more rows than a batch of TRL's, so no more memory is needed than TRL needs."""
        most = max(self._trainer.args.generation_batch_size, self._world)
        while not sampler.done:
            # By prompt, as TRL orders the rows of a batch: one round of a fixed number of completions is then TRL's own batch.
            requests = sorted(sampler.next_requests(most), key=lambda r: (int(r.id.prompt_id), r.id.index))
            for request, row in zip(requests, self._share(requests), strict=True):
                self.rows[request.id] = row
                sampler.receive(event_of(request.id, row))
            self.num_calls += 1
        return sampler.result()

    def _share(self, requests: Sequence[Request]) -> list[Row]:
        """Return the answers to these requests, of which each process generates as many."""
        share = math.ceil(len(requests) / self._world)
        mine = list(requests[self._rank * share : (self._rank + 1) * share])
        mine += [requests[0]] * (share - len(mine))  # collectives want equal counts; what is over is thrown away
        return self._answer([dict(request.prompt.data) for request in mine])[: len(requests)]

    def _answer(self, inputs: list[dict[str, Any]]) -> list[Row]:
        """Return what TRL generates for these rows of its data, with rewards, and for those of the other processes."""
        with self._one_generation_a_row():
            self.generated = Generated(self._generate([row["prompt"] for row in inputs]))
        rows = self.generated.rows()
        for given, row in zip(inputs, rows, strict=True):
            given.update(row.extra_fields)
        rewards = self._score(inputs, [row["prompt"] for row in inputs], [r.completion for r in rows], [r.completion_ids for r in rows])
        logs = self._extra_logs(len(rows))
        gathered = gather_object([replace(row, extra_logs=log) for row, log in zip(rows, logs, strict=True)])
        return [
            replace(row, rewards=tuple(scores), reward=total)
            for row, scores, total in zip(gathered, rewards.tolist(), self._totals(rewards), strict=True)
        ]

    @contextmanager
    def _one_generation_a_row(self) -> Iterator[None]:
        """TRL's servers are asked for every num_generations-th row, with that number of completions."""
        num_generations, self._trainer.num_generations = self._trainer.num_generations, 1
        try:
            yield
        finally:
            self._trainer.num_generations = num_generations

    def _extra_logs(self, num_rows: int) -> list[dict[str, Any]]:
        """Take what the reward functions logged of each row, so that only kept rows reach the table of completions."""
        pending = self._trainer._pending_extra_logs
        logs = [{name: values[i] for name, values in pending.items() if i < len(values)} for i in range(num_rows)]
        pending.clear()
        return logs

    def _totals(self, rewards: torch.Tensor) -> list[float]:
        """Return the weighted sum of each row's rewards, in float32 as TRL adds them; nan where no function gave any."""
        sums = (rewards * self._trainer.reward_weights.to(rewards.device)).nansum(1)
        return torch.where(rewards.isnan().all(1), math.nan, sums).tolist()


def event_of(request_id: CompletionId, row: Row) -> Scored | Failed:
    """Return the answer to a request; a void where no reward function gave a reward."""
    if math.isnan(row.reward):
        return Failed(request_id, 0, "every reward function returned None")
    text = row.completion if isinstance(row.completion, str) else ""
    logprobs = np.array([0.0] * len(row.completion_ids) if row.logprobs is None else row.logprobs, dtype=np.float32)
    return Scored(Completion(request_id, np.array(row.completion_ids, dtype=np.int32), logprobs, text, "stop", 0), row.reward)
