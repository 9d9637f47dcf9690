"""The compact trainer: sample adaptively, take one policy-gradient step, send the new weights to the engine, repeat.

A step is a function of (weights, data position, seed) and of what the engine and the rewards answered, and the answers are journaled. So
a killed run goes on from its last checkpoint: steps since then are trained again from the journal, the open one is finished.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reinforce_ada.config import Config, SamplingConfig
from reinforce_ada.driver import run
from reinforce_ada.engines.base import Engine
from reinforce_ada.engines.traced import no_span
from reinforce_ada.errors import InputError
from reinforce_ada.rewards.protocol import RewardRunner
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import AdaptiveSampler, Memory, Policy
from reinforce_ada.sampling.windows import window_of
from reinforce_ada.training import checkpoint
from reinforce_ada.training.batching import Sample, collate, rows_of, shuffled_minibatches
from reinforce_ada.training.display import Display, step_line
from reinforce_ada.training.distributed import Ranks
from reinforce_ada.training.evaluate import evaluate, refuse_only_voids
from reinforce_ada.training.language_model import LanguageModel, check_forms
from reinforce_ada.training.learner import Learner, Minibatch
from reinforce_ada.training.log import RunLog
from reinforce_ada.training.meter import EngineMeter
from reinforce_ada.training.objectives import inexact, num_seqs_of, samples_with_advantages
from reinforce_ada.training.optimizer import warmed_up
from reinforce_ada.training.tasks import PromptStream
from reinforce_ada.training.track import Trackers
from reinforce_ada.types import Completion, CompletionId, Prompt, SamplingResult

_CHECK_TOKENS = 6  # of each made-up completion in the check of the linear operators


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """What a trainer is made of."""

    model: LanguageModel
    engine: Engine
    rewards: RewardRunner
    train: Callable[[int], PromptStream]  # data position -> prompts from there
    held_out: Sequence[Prompt]
    policy: Policy
    store: RolloutStore


class Trainer:
    """Trains `parts.model` in place, writing log, journal and checkpoints under `out`; on rank 0, where there are several."""

    def __init__(
        self, parts: Parts, config: Config, out: Path, display: Display, ranks: Ranks | None = None, trackers: Trackers | None = None,
        span: Callable[[str], AbstractContextManager[None]] = no_span,
    ) -> None:  # fmt: skip
        self.parts, self.config, self.out, self.display, self._span = parts, config, out, display, span
        self.log = RunLog(out / "log.jsonl", trackers)
        self.learner = Learner(parts.model, config, ranks or Ranks())
        self.device = self.learner.device
        self.step = 0  # finished steps; also the policy version
        self.position = 0
        self.memory = self._remembered()
        self.meter = EngineMeter(parts.engine)
        self._engine_version: int | None = None  # of the weights the engine holds; None before the first sync
        self._sync_s = 0.0  # of this step

    # -------------------- the run

    def run(self) -> None:
        """From where it stands to `steps`, with an evaluation before and after."""
        self.learner.align()
        self.check_model()
        if warning := inexact(self.config, self.parts.policy):
            self.display.line(warning)
        if self.step == 0 or self._wants_evaluation():
            self.evaluate()
        while self.step < self.config.training.steps:
            self.train_step()
            if self._wants_checkpoint():
                self.save_checkpoint()
            if self._wants_evaluation():
                self.evaluate()
        checkpoint.with_aside(self.out / "model", self.parts.model.save)

    def _wants_checkpoint(self) -> bool:
        every = self.config.run.checkpoint_every
        return self.step == self.config.training.steps or bool(every and self.step % every == 0)

    def _wants_evaluation(self) -> bool:
        every = self.config.task.eval_every
        return self.step == self.config.training.steps or bool(every and self.step % every == 0)

    def resume(self) -> None:
        """Take up the newest checkpoint; without one the run starts over, with its journal."""
        found = checkpoint.latest(self.out / "checkpoints")
        if found is not None:
            tensors = found.tensors()
            torch.set_rng_state(tensors.pop("rng/torch"))
            self.learner.optimizer.load(tensors)
            self.step, self.position = found.step, found.position
            self.memory = self._remembered()
        self.log.cut_after(self.step)
        self.display.line(f"resuming after step {self.step}; the journal reaches step {self.parts.store.last_step() or 0}")

    def _remembered(self) -> Memory:
        """The memory as it was after `step`: steps that are trained again must not know how they went."""
        sampling, store = self.config.sampling, self.parts.store
        if sampling.memory_from and not store.remembers:
            with earlier_store(sampling.memory_from) as earlier:
                store.remember(earlier)
        memory = Memory(sampling.memory_decay)
        for seen in store.seen(self.step):
            memory.add(*seen)
        return memory

    def save_checkpoint(self) -> None:
        """Weights, master copy, moments, random state and data position."""
        tensors = {**self.learner.optimizer.tensors(), "rng/torch": torch.get_rng_state()}
        with self._span("checkpoint"):
            checkpoint.save(self.out / "checkpoints", self.step, self.position, self.parts.model.save, tensors)

    def check_model(self) -> None:
        """Compare the linear operators and rows that share a prompt with the model's own logits, and say what is used."""
        prompts = list(islice(self.parts.train(0), 2))
        samples = [Sample(p, _made_up(p, i, _CHECK_TOKENS), 0.0) for p in prompts for i in range(2)]
        pad = self.parts.model.pad_id
        plain = collate(rows_of(samples, 0), pad).to(self.device)
        shared = collate(rows_of(samples, sum(len(s.prompt.token_ids) + _CHECK_TOKENS for s in samples)), pad).to(self.device)
        head, sharing = check_forms(self.parts.model, plain, shared, self.learner.objective.temperature)
        self._say_form("linear_policy_loss", head.ok, head.max_diff, "token_logprobs on the model's logits is used instead")
        self._say_form("a row per prompt", sharing.ok, sharing.max_diff, "every completion gets a row of its own")
        if not head.ok and self.learner.objective.entropy_coef:
            raise InputError("train", "entropy_coef with a model the linear operators do not fit", "entropy_coef 0")

    def _say_form(self, what: str, ok: bool, max_diff: float, otherwise: str) -> None:
        verdict = "agrees with the model's logits" if ok else f"does not agree with the model's logits: {otherwise}"
        self.display.line(f"{what} {verdict} (largest difference {max_diff:.1e} nats)")

    # -------------------- one step

    def train_step(self) -> None:
        """Sample, update, log."""
        step, started = self.step + 1, time.monotonic()
        self.meter.start()
        with self._span(f"step {step} sampling"):
            result = self._sample(step)
        engine = self.meter.step()
        sampled = time.monotonic()
        with self._span(f"step {step} training"):
            trained = self._update(step, result)
        self.step = step
        record = {
            "kind": "step",
            "step": step,
            **result.metrics,
            **engine,
            **trained,
            "sync_s": self._sync_s,
            "sampling_s": sampled - started,
            "sampling_tokens_per_s": (result.metrics["tokens_committed"] + result.metrics["tokens_wasted"]) / (sampled - started),
            "training_s": time.monotonic() - sampled,
        }
        self.log.write(record)
        self.display.line(step_line(record, self.config.training.steps))

    def _sample(self, step: int) -> SamplingResult:
        sampling, parts = self.config.sampling, self.parts
        stream = parts.train(self.position)
        sampler = AdaptiveSampler(
            stream,
            parts.policy,
            step=step,
            policy_version=self.step,
            schedule=sampling.schedule,
            seed=self.config.run.seed,
            window=window_of(sampling, parts.policy, latency_bound=self.device.type != "cpu"),
            num_prompts=sampling.prompts_per_step,
            memory=self.memory,
        )
        sampler.restore(parts.store.events(step))
        self._sync_s = 0.0
        if not sampler.done:
            self._sync()
        with self.display.sampling(f"step {step} sampling", self.meter.look) as on_progress:
            result = run(
                sampler, parts.engine, parts.rewards, parts.store, request_timeout_s=self.config.engine.request_timeout_s or None,
                on_progress=on_progress,
            )  # fmt: skip
        parts.engine.sleep()
        self._check_scored(step, result)
        if stream.num_too_long:
            self.display.line(f"step {step}: {stream.num_too_long} prompts were too long for --max-model-len and left out")
        parts.store.finish_step(step, result)
        self.memory.update(step, result.pools)
        self.position = stream.position
        return result

    def _check_scored(self, step: int, result: SamplingResult) -> None:
        """A step of nothing but voids teaches nothing, and leaves nothing: once the reward is mended it is sampled anew."""
        if step in self.parts.store.finished_steps():  # trained again as it was
            return
        try:
            refuse_only_voids(result, self.parts.rewards, f"step {step}")
        except InputError:
            self.parts.store.forget(step)
            raise

    def _sync(self) -> None:
        started = time.monotonic()
        if self._engine_version != self.step:
            self.parts.engine.sync_weights(self.parts.model.named_tensors(), self.step)
            self._engine_version = self.step
        self.parts.engine.wake()
        self._sync_s = time.monotonic() - started

    def _update(self, step: int, result: SamplingResult) -> dict[str, float]:
        t = self.config.training
        groups = samples_with_advantages(result, self.parts.policy)
        minibatches = [
            Minibatch(
                samples, sum(s.completion.token_ids.size for s in samples), num_seqs_of(samples, result, self.parts.policy, t.minibatches)
            )
            for samples in shuffled_minibatches(groups, t.minibatches, (self.config.run.seed, step))
        ]
        learning_rate = warmed_up(t.learning_rate, step, t.warmup_steps)
        with self.display.training(f"step {step} training", sum(m.num_tokens for m in minibatches)) as advance:
            trained = self.learner.update(minibatches, learning_rate, advance)
        return {**trained, "learning_rate": learning_rate}

    # -------------------- evaluation

    def evaluate(self) -> None:
        """Avg@k on the held-out prompts at the present weights, unless the log has it already."""
        if not self.parts.held_out or self.log.evaluation(self.step) is not None:
            return
        with self._span(f"step {self.step} held-out"):
            self._evaluate()

    def _evaluate(self) -> None:
        started = time.monotonic()
        self._sync()
        with self.display.sampling(f"step {self.step} held-out", self.meter.look) as on_progress:
            e = evaluate(
                self.parts.engine, self.parts.rewards, self.parts.held_out, k=self.config.task.eval_k, seed=self.config.run.seed,
                policy_version=self.step, positive_threshold=self.parts.policy.positive_threshold,
                request_timeout_s=self.config.engine.request_timeout_s or None, on_progress=on_progress,
            )  # fmt: skip
        self.parts.engine.sleep()
        seconds = time.monotonic() - started
        self.log.write({**e.record(), "step": self.step, "eval_s": seconds})
        self.display.line(
            f"held-out after step {self.step}: Avg@{e.k} {e.avg_at_k:.3f} ± {e.stderr:.3f}, pass@{e.k} {e.pass_at_k[str(e.k)]:.3f} "
            f"on {len(e.per_prompt)} prompts · {seconds:.1f} s"
        )


def _made_up(prompt: Prompt, index: int, length: int) -> Completion:
    """Tokens of the prompt itself as a completion: in the vocabulary, and different for each index."""
    ids = np.array([prompt.token_ids[(index * length + i) % len(prompt.token_ids)] for i in range(length)], dtype=np.int32)
    return Completion(CompletionId(0, prompt.prompt_id, index), ids, np.zeros(length, dtype=np.float32), "", "stop", 0)


def earlier_store(run_dir: str) -> RolloutStore:
    """The store of the run that `memory_from` names. Raises: InputError where there is none."""
    return RolloutStore(Path(run_dir) / "rollouts.sqlite", read_only=True)


def fingerprint(config: Config) -> dict[str, Any]:
    """What must not change when a run resumes: everything but its length, its place, its limits and how fast it goes."""
    free = {
        "steps", "out", "checkpoint_every", "track", "profile", "eval_every", "reward_workers", "reward_timeout_s", "request_timeout_s",
        "max_num_seqs", "max_model_len", "memory_fraction", "tokens_per_pass",  # what one lowers, or raises, after running out
        "servers", "weights_dir", "replicas", "ray_address", "cpus_per_replica", "tensor_parallel", "hung_after_s", "give_up_s",
    }  # fmt: skip
    # Keys that stores of earlier versions do not have; at their defaults a run is what it was.
    later = {"memory_decay", "memory_from", "mean_budget", "propose", "objective", "alpha"}
    defaults = {f.name: f.default for f in dataclasses.fields(SamplingConfig) if f.name in later}
    defaults["data_seed"] = config.run.seed  # one seed was all there was
    sections = dataclasses.asdict(config)
    return {
        section: {k: v for k, v in values.items() if k not in free and not (k in defaults and v == defaults[k])}
        for section, values in sections.items()
    }
