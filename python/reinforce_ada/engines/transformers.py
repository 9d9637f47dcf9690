"""Plain transformers as an engine: static batches with a key-value cache, one seeded generator per request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reinforce_ada.engines.base import Engine, Launch, check_own, check_prompt_length
from reinforce_ada.engines.text import decode_after, find_stop, tail_for_stop
from reinforce_ada.engines.truncation import truncated
from reinforce_ada.errors import InputError
from reinforce_ada.types import Completion, CompletionId, Request


@dataclass(slots=True, eq=False)
class _Row:
    """One running request: its generator and the tokens it has sampled."""

    request: Request
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine(Engine):
    """An engine that samples from a Hugging Face causal LM, one token of the running batch per poll.

    A batch is formed from everything submitted while the engine was idle; later submissions wait for the next one. Rows that finish or are
    aborted leave the batch immediately. The engine takes only the end tokens from the model's generation_config: its top_k, penalties and
    so on would sample from another distribution than the configured one. It is slower than vLLM, but needs nothing else installed.
    `poll` raises EngineLost for NaN logits.

    Args:
        module, tokenizer: the model to sample from.
        is_trained: whether `module` is the model that is trained, so that new weights, adapters among them, are in it already.
        max_num_seqs: requests per batch.
        max_tokens, max_model_len, temperature, top_p, top_k, min_p, stop: see `VllmEngine`.
    """

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        max_tokens: int,
        max_model_len: int = 512,
        max_num_seqs: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        is_trained: bool = False,
    ) -> None:
        self._module, self._tokenizer, self._is_trained = module, tokenizer, is_trained
        self._max_tokens, self._max_model_len, self._max_num_seqs = max_tokens, max_model_len, max_num_seqs
        self._temperature, self._stop = temperature, stop
        self._truncation: dict[str, Any] = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
        self._stop_ids = _stop_ids(module, tokenizer)
        self._pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._vocab_size: int = module.config.get_text_config().vocab_size
        self._device = next(module.parameters()).device
        self._queue: list[Request] = []
        self._rows: list[_Row] = []
        self._cache: Any = None
        self._mask = torch.empty(0)  # [rows, tokens so far], 1 where not padding
        self._policy_version = 0

    @property
    def free_slots(self) -> int:
        """Return how many more requests fit into the next batch; 0 while one runs."""
        return 0 if self._rows else self._max_num_seqs - len(self._queue)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue these requests. Raises InputError for a prompt that leaves no room for max_tokens."""
        for r in requests:
            check_prompt_length("transformers", r, self._max_tokens, self._max_model_len)
        self._queue += requests

    @torch.no_grad()
    def poll(self) -> list[Completion]:
        """Sample one token for every row of the batch, and return the completions that it finishes."""
        if self._rows:
            ids = torch.tensor([[row.token_ids[-1]] for row in self._rows], device=self._device)
        elif self._queue:
            ids = self._start_batch()
        else:
            return []
        positions = (self._mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = self._module(
            input_ids=ids, attention_mask=self._mask, position_ids=positions, past_key_values=self._cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        self._cache = output.past_key_values
        self._sample(output.logits[:, -1].float())
        done = [i for i, row in enumerate(self._rows) if self._has_stopped(row) or len(row.token_ids) == self._max_tokens]
        finished = [self._completion(self._rows[i]) for i in done]
        self._keep([i for i in range(len(self._rows)) if i not in set(done)])
        return finished

    def _start_batch(self) -> Tensor:
        """Make the queued requests the batch, and return their prompts, padded on the left."""
        from transformers import DynamicCache

        batch, self._queue = self._queue[: self._max_num_seqs], self._queue[self._max_num_seqs :]
        self._rows = [_Row(r, torch.Generator().manual_seed(r.seed)) for r in batch]
        size = max(len(r.prompt.token_ids) for r in batch)
        ids = torch.full((len(batch), size), self._pad_id)
        mask = torch.zeros(len(batch), size, dtype=torch.long)
        for i, r in enumerate(batch):
            ids[i, size - len(r.prompt.token_ids) :] = torch.tensor(r.prompt.token_ids)
            mask[i, size - len(r.prompt.token_ids) :] = 1
        self._mask = mask.to(self._device)
        self._cache = DynamicCache(config=self._module.config)
        return ids.to(self._device)

    def _sample(self, logits: Tensor) -> None:
        if self._temperature > 0:
            logits = truncated(logits / self._temperature, **self._truncation)
        logprobs = logits.log_softmax(-1).cpu()
        for row, row_logprobs in zip(self._rows, logprobs, strict=True):
            if self._temperature > 0:
                # Inverse CDF with the request's own uniform: the token depends on its seed, not on its neighbours.
                uniform = torch.rand((), generator=row.generator, dtype=torch.float64)
                cdf = row_logprobs.double().exp().cumsum(0)
                token = min(int(torch.searchsorted(cdf, uniform * cdf[-1], right=True)), cdf.numel() - 1)
            else:
                token = int(row_logprobs.argmax())
            row.token_ids.append(token)
            row.logprobs.append(float(row_logprobs[token]))
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._rows), 1)], dim=1)

    def _has_stopped(self, row: _Row) -> bool:
        if row.token_ids[-1] in self._stop_ids or not self._stop:
            return row.token_ids[-1] in self._stop_ids
        tail = row.token_ids[-tail_for_stop(self._stop) :]
        return find_stop(decode_after(self._tokenizer, row.request.prompt.token_ids, tail), self._stop) >= 0

    def _keep(self, kept: list[int]) -> None:
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        if not kept:
            self._cache = None
            return
        index = torch.tensor(kept, device=self._device)
        self._mask = self._mask[index]
        self._cache.batch_select_indices(index)

    def _completion(self, row: _Row) -> Completion:
        ids = row.token_ids[:-1] if row.token_ids[-1] in self._stop_ids else row.token_ids
        text = decode_after(self._tokenizer, row.request.prompt.token_ids, ids)
        end = find_stop(text, self._stop)
        completion = Completion(
            id=row.request.id,
            token_ids=np.asarray(row.token_ids, dtype=np.int32),
            rollout_logprobs=np.asarray(row.logprobs, dtype=np.float32),
            text=text if end < 0 else text[:end],
            finish_reason="stop" if self._has_stopped(row) else "length",
            policy_version=self._policy_version,
        )
        return check_own("transformers", completion, self._max_tokens, self._vocab_size)

    def abort(self, ids: Sequence[CompletionId]) -> None:
        gone = set(ids)
        self._queue = [r for r in self._queue if r.id not in gone]
        self._keep([i for i, row in enumerate(self._rows) if row.request.id not in gone])

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Copy new weights in, unless they are there already."""
        if self._rows or self._queue:
            raise InputError("transformers", f"sync_weights with {len(self._rows) + len(self._queue)} requests in flight", "none")
        if not self._is_trained:
            own = self._module.state_dict()
            with torch.no_grad():
                for name, tensor in named_tensors:
                    own[name].copy_(tensor)
        self._policy_version = policy_version

    def close(self) -> None:
        self._queue, self._rows, self._cache = [], [], None


def _stop_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, getattr(getattr(module, "generation_config", None), "eos_token_id", None)):
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)


def launch(run: Launch) -> TransformersEngine:
    """Return the engine of a run."""
    why = "" if run.settings.engine == "transformers" else " (vllm is not installed)"
    run.say(f"engine: transformers{why}, sharing the trainer's weights")
    return TransformersEngine(run.module, run.tokenizer, is_trained=True, **run.limits)
