"""The work of every rank: forward and backward over its share of each minibatch, then the same optimizer step as the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from reinforce_ada import ops
from reinforce_ada.config import Config
from reinforce_ada.sampling import configured
from reinforce_ada.training import heap, out_of_memory
from reinforce_ada.training.batching import Batch, Sample, micro_batches, shares_of
from reinforce_ada.training.distributed import Ranks
from reinforce_ada.training.language_model import LanguageModel, token_logprobs
from reinforce_ada.training.loss import RunLoss, combine_metrics
from reinforce_ada.training.memory_estimate import KEPT_BY_HEAP, Shapes, estimate
from reinforce_ada.training.optimizer import MasterAdamW
from reinforce_ada.training.predictor import PassRatePredictor
from reinforce_ada.training.reference import ReferencePolicy
from reinforce_ada.types import Prompt, SamplingResult


@dataclass(frozen=True, slots=True, eq=False)
class Minibatch:
    """Samples of one optimizer step, or a rank's share of them. The counts are those of all ranks, so that losses and gradients add up."""

    samples: Sequence[Sample]
    num_tokens: int  # of the completions, written by the policy
    num_seqs: float  # see `num_seqs_of`


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A rank's part of one training step."""

    minibatches: Sequence[Minibatch]
    learning_rate: float
    share_prompts: bool  # rank 0's findings about the model
    use_head: bool


@dataclass(frozen=True, slots=True)
class Align:
    """An order to take the optimizer state of rank 0: name -> shape and dtype of the tensors that follow."""

    layout: Mapping[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True, slots=True, eq=False)
class _Report:
    """A rank's result for its share of a minibatch."""

    parts: list[tuple[dict[str, float], int]]  # metrics of a pass, its tokens
    loss: float
    touched: set[str]  # parameters with a gradient


class Learner:
    """Model, loss and optimizer on this rank."""

    def __init__(self, model: LanguageModel, config: Config, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.device = next(model.module.parameters()).device
        self.loss = RunLoss.from_config(config)
        self._fits = partial(out_of_memory.told, module=model.module, config=config, device=self.device)
        with self._fits("the reference policy"):
            self.reference = None if self.loss.kl is None else ReferencePolicy(model)
        if config.training.gradient_checkpointing:
            model.checkpoint_layers()
        with self._fits("the float32 copy of the weights"):
            self.optimizer = MasterAdamW(
                model.module.named_parameters(),
                weight_decay=config.training.weight_decay,
                max_grad_norm=config.training.max_grad_norm,
                moments=getattr(torch, config.training.moments),
            )
        self.predictor: PassRatePredictor | None = None
        if configured(config.sampling).needs_prediction:
            self.predictor = PassRatePredictor(model.head().weight.shape[1], config.sampling.memory_decay, self.device)
        self._tokens_per_pass = config.training.tokens_per_pass
        kept = estimate(Shapes.of(model.module), config, self.device.type).trainer[KEPT_BY_HEAP]  # 0 on a GPU
        self._trims = kept >= heap.WORTH_TRIMMING

    # -------------------- state

    def tensors(self) -> dict[str, Tensor]:
        """Return everything needed to resume, by name."""
        return {**self.optimizer.tensors(), **(self.predictor.tensors() if self.predictor else {})}

    def misfit(self, tensors: Mapping[str, Tensor]) -> str:
        """Return in a few words why `load` cannot take these tensors; "" if it can."""
        if self.predictor is None:
            return self.optimizer.misfit(tensors)
        own = self.predictor.tensors()
        others = {name: tensor for name, tensor in tensors.items() if name not in own}
        return self.predictor.misfit(tensors) or self.optimizer.misfit(others)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned (no `misfit`)."""
        self.optimizer.load(tensors)
        if self.predictor is not None:
            self.predictor.load(tensors)

    # -------------------- on rank 0

    def align(self) -> None:
        """Send this rank's weights and moments to every rank."""
        if self.ranks.size == 1:
            return
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        self.ranks.send([Align({name: (t.shape, t.dtype) for name, t in tensors.items()})] * self.ranks.size)
        for tensor in tensors.values():
            self.ranks.copy_from_first(tensor)

    def update(self, minibatches: Sequence[Minibatch], learning_rate: float, advance: Callable[[int], None]) -> dict[str, float]:
        """Take one optimizer step for each minibatch, whose samples are spread over the ranks by their tokens.

        Args:
            advance: called with the number of further completion tokens that this rank has trained on.
        Returns: the metrics of the loss over all ranks, `loss` (mean over minibatches) and `grad_norm` (the largest).
        """
        per_rank = zip(*(self._shares(m) for m in minibatches), strict=True) if minibatches else [()] * self.ranks.size
        work = [Work(m, learning_rate, self.model.share_prompts, self.model.use_head) for m in per_rank]
        self.ranks.send(work)
        return self._train(work[0], advance)

    @torch.no_grad()
    def kl(self, result: SamplingResult) -> dict[str, float]:
        """Return `kl`, the mean estimate over the tokens of these completions of the current weights; nothing without a reference."""
        if self.reference is None:
            return {}
        samples = [Sample(pool.prompt, s.completion, 0.0) for pool in result.pools for s in pool.scored]
        parts: list[tuple[dict[str, float], int]] = []
        with self._fits("a pass without a gradient"):
            for batch in self._passes(samples):
                logprobs = token_logprobs(self.model, batch, self.loss.temperature)
                _, metrics = ops.policy_loss(
                    logprobs, batch.advantages, batch.token_mask, ref_logprobs=batch.ref_logprobs, cu_seqlens=batch.cu_seqlens,
                    advantages_per="sequence", kl=self.loss.kl,
                )  # fmt: skip
                parts.append(({"kl": float(metrics["kl"])}, batch.num_written))
        return combine_metrics(parts)

    def _shares(self, minibatch: Minibatch) -> list[Minibatch]:
        if self.ranks.size == 1:
            return [minibatch]
        # Only what the loss needs: a prompt's record may be large, or of a class that another process does not have.
        bare = [
            s._replace(prompt=Prompt(s.prompt.prompt_id, s.prompt.token_ids), completion=replace(s.completion, text=""))
            for s in minibatch.samples
        ]
        return [replace(minibatch, samples=share) for share in shares_of(bare, self.ranks.size)]

    # -------------------- on the others

    def follow(self) -> None:
        """Follow the orders of rank 0 until it releases this rank. Raises: RankError when rank 0 is gone."""
        while (order := self.ranks.receive()) is not None:
            match order:
                case Align(layout):
                    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
                    for tensor in tensors.values():
                        self.ranks.copy_from_first(tensor)
                    self.load(tensors)
                case Work():
                    self.model.share_prompts, self.model.use_head = order.share_prompts, order.use_head
                    self._train(order, lambda count: None)

    # -------------------- on all

    def _train(self, work: Work, advance: Callable[[int], None]) -> dict[str, float]:
        ranks, fits = self.ranks, self._fits
        prepared = ranks.together(fits("a pass without a gradient")(partial(self._prepare, work.minibatches)))
        parts: list[tuple[dict[str, float], int]] = []
        losses: list[float] = []
        norms: list[float] = []
        for minibatch, (passes, old) in zip(work.minibatches, prepared, strict=True):
            report = ranks.together(fits("a training pass")(partial(self._gradient, minibatch, passes, old, advance)))
            reports = ranks.exchange(report)
            self.optimizer.add_up(ranks.add_up, set().union(*(r.touched for r in reports)))
            norms.append(ranks.together(fits("the optimizer's step")(partial(self.optimizer.step, work.learning_rate))))
            losses.append(sum(r.loss for r in reports))
            parts += [part for r in reports for part in r.parts]
        predicted = {} if self.predictor is None else self.predictor.update(ranks.add_up)
        return {**combine_metrics(parts), **predicted, "loss": sum(losses) / max(len(losses), 1), "grad_norm": max(norms, default=0.0)}

    @torch.no_grad()
    def _prepare(self, minibatches: Sequence[Minibatch]) -> list[tuple[list[Batch], list[Tensor | None]]]:
        """Return the passes and their logprobs before the step's first update. The first minibatch needs none: its ratio is 1."""
        prepared: list[tuple[list[Batch], list[Tensor | None]]] = []
        for m, minibatch in enumerate(minibatches):
            passes = self._passes(minibatch.samples)
            prepared.append((passes, [None if m == 0 else token_logprobs(self.model, b, self.loss.temperature) for b in passes]))
        return prepared

    def _passes(self, samples: Sequence[Sample]) -> list[Batch]:
        """Return the samples as forward passes, with the reference's logprobs if there is one."""
        batches = micro_batches(samples, self._tokens_per_pass, share_prompts=self.model.share_prompts, pad_id=self.model.pad_id)
        passes = [b.to(self.device) for b in batches]
        return passes if self.reference is None else [self.reference.scored(b, self.loss.temperature) for b in passes]

    def _gradient(
        self, minibatch: Minibatch, passes: Sequence[Batch], old: Sequence[Tensor | None], advance: Callable[[int], None]
    ) -> _Report:
        """Run backward over every pass, into the optimizer's accumulators."""
        parts: list[tuple[Mapping[str, Tensor], int]] = []
        losses: list[Tensor] = []
        for batch, old_logprobs in zip(passes, old, strict=True):
            loss, metrics = self.loss(self.model, batch, old_logprobs, minibatch.num_tokens, minibatch.num_seqs, self.predictor)
            torch.autograd.backward(loss)
            self.optimizer.accumulate()
            if self._trims:
                heap.trim()
            losses.append(loss.detach())
            parts.append((metrics, batch.num_written))
            advance(batch.num_written)
        as_numbers = [({name: float(value) for name, value in metrics.items()}, count) for metrics, count in parts]
        return _Report(as_numbers, sum(map(float, losses), 0.0), self.optimizer.touched())
