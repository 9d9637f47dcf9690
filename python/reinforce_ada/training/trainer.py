"""The compact trainer: sample adaptively, take one policy-gradient step, send the new weights to the engine, repeat.

A step is a function of (weights, data position, seed) and of the answers of engine and rewards, which are journaled. A killed run therefore
continues from its last checkpoint: later steps are trained again from the journal, and the open one is finished.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reinforce_ada.config import Config, EngineConfig, budget_of
from reinforce_ada.driver import run
from reinforce_ada.engines.base import Engine
from reinforce_ada.engines.traced import no_span
from reinforce_ada.errors import InputError
from reinforce_ada.files import clear_leftovers
from reinforce_ada.outside import one_line
from reinforce_ada.rewards.protocol import RewardRunner
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import AdaptiveSampler, Memory, Policy
from reinforce_ada.sampling.windows import window_of
from reinforce_ada.training import checkpoint
from reinforce_ada.training.batching import Sample, collate, rows_of, shuffled_minibatches
from reinforce_ada.training.callbacks import Callback, Callbacks, TrainerView
from reinforce_ada.training.card import write_card
from reinforce_ada.training.checkpoint import Checkpoint
from reinforce_ada.training.costs import cost
from reinforce_ada.training.display import Display, length_text, step_line, truncation_warning
from reinforce_ada.training.distributed import Ranks
from reinforce_ada.training.evaluate import evaluate, refuse_only_voids
from reinforce_ada.training.language_model import LanguageModel, check_forms
from reinforce_ada.training.learner import Learner, Minibatch
from reinforce_ada.training.log import RunLog
from reinforce_ada.training.loss import inexact, num_seqs_of, samples_with_advantages
from reinforce_ada.training.meter import EngineMeter
from reinforce_ada.training.optimizer import rate_at
from reinforce_ada.training.task_defaults import max_tokens_of
from reinforce_ada.training.tasks import PromptStream
from reinforce_ada.training.track import Trackers
from reinforce_ada.types import Completion, CompletionId, Event, Prompt, SamplingResult, Scored

_RNG = "rng/torch"  # among the tensors of a checkpoint
_CHECK_TOKENS = 6  # of each made-up completion in the check of the linear operators


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The parts of a trainer."""

    model: LanguageModel
    engine: Engine
    rewards: RewardRunner
    train: Callable[[int], PromptStream]  # data position -> prompts from there
    held_out: Sequence[Prompt]
    policy: Policy
    store: RolloutStore


class Trainer:
    """Trains `parts.model` in place, writing log, journal and checkpoints under `out`. Runs on rank 0 if there are several ranks."""

    def __init__(
        self, parts: Parts, config: Config, out: Path, display: Display, ranks: Ranks | None = None, trackers: Trackers | None = None,
        span: Callable[[str], AbstractContextManager[None]] = no_span, callbacks: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        self.parts, self.config, self.out, self.display, self._span = parts, config, out, display, span
        self.log = RunLog(out / "log.jsonl", trackers)
        self._callbacks = Callbacks(callbacks, display.line)
        ranks = ranks or Ranks()
        self.learner = ranks.together(lambda: Learner(parts.model, config, ranks))
        self.device = self.learner.device
        self.step = 0  # finished steps; also the policy version
        self._saved = 0  # the step of the newest checkpoint
        self.position = 0
        self.budget = budget_of(config.training)
        self.spent = 0.0  # of the budget, in the finished steps
        self.memory = self._remembered()
        self.meter = EngineMeter(parts.engine)
        self._engine_version: int | None = None  # of the weights the engine holds; None before the first sync
        self._sync_s = 0.0  # of this step
        self._has_warned = False  # of completions that are cut: once is enough

    # -------------------- the run

    def run(self) -> None:
        """Train from the current step to `steps`, or until the budget is spent, with an evaluation before and after."""
        self.learner.align()
        self.check_model()
        if warning := inexact(self.config, self.parts.policy):
            self.display.line(warning)
        if self.step == 0 or self._is_due(self.config.task.eval_every):
            self.evaluate()
        while not self._is_over():
            self.train_step()
            if self._is_due(self.config.run.checkpoint_every):
                self.save_checkpoint()
            if self._is_due(self.config.task.eval_every):
                self.evaluate()
        if self._saved != self.step:  # a callback has ended the run at an evaluation
            self.save_checkpoint()
        checkpoint.write_folder(self.out / "model", self._save_trained)
        self._tell({"kind": "end", "step": self.step})

    def _save_trained(self, folder: Path) -> None:
        self.parts.model.save(folder)
        write_card(folder, self.out.resolve().name, self.config, self.log.records)

    def _is_due(self, every: int) -> bool:
        return self._is_over() or bool(every and self.step % every == 0)

    def _is_over(self) -> bool:
        is_spent = self.budget is not None and self.spent >= self.budget.amount
        return self._callbacks.has_stopped or is_spent or self.step >= self.config.training.steps

    def _tell(self, record: Mapping[str, Any]) -> None:
        """Call the callbacks; whatever they raise, journal and log have the step already."""
        view = TrainerView(self.step, self.out, self.config, tuple(self.log.records), self.parts.model.module)
        self._callbacks.call(record, view)

    def _spend(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self.budget is not None:
            self.spent += cost(records, self.budget.unit)

    def resume(self) -> None:
        """Load the newest complete checkpoint that the journal covers; without one the journal rebuilds the run.

        Raises: InputError when the journal is another run's, or lacks what the checkpoints were trained on.
        """
        clear_leftovers(self.out)
        if self.log.run_id not in ("", self.parts.store.id):
            raise _wrong_journal(self.out, "it belongs to another run than log.jsonl")
        found = self._usable_checkpoint()
        if found is not None:
            tensors = dict(found.tensors)
            torch.set_rng_state(tensors.pop(_RNG))
            self.learner.load(tensors)
            self.step, self.position = found.step, found.position
            self._saved = found.step
            self.memory = self._remembered()
        journaled = self.parts.store.last_step() or 0
        self.display.line(f"resuming after step {self.step}; the journal reaches step {journaled}")
        for line in self.log.resume(self.step, journaled):
            self.display.line(line)
        self._spend(self.log.records)

    def _usable_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint from which the run can continue. Set newer ones aside, with a line for each."""
        reaches = _unbroken(self.parts.store.finished_steps())
        unusable: list[Path] = []
        wrong_journal = ""
        found = None
        for folder in checkpoint.folders(self.out / "checkpoints"):
            try:
                read = self._fitting(checkpoint.read(folder))
            except checkpoint.UnusableError as e:
                why = str(e)
            else:
                if read.run in ("", self.parts.store.id) and read.step <= reaches:
                    found = read
                    break
                is_foreign = read.run not in ("", self.parts.store.id)
                why = "it is of another run than the journal" if is_foreign else f"the journal reaches step {reaches} only"
                wrong_journal = wrong_journal or f"checkpoints/{folder.name}: {why}"
            self.display.line(f"checkpoint {folder.name} cannot be used: {one_line(why)}")
            unusable.append(folder)
        if found is None and unusable:
            if wrong_journal or reaches < checkpoint.step_of(unusable[0]):
                raise _wrong_journal(self.out, wrong_journal or f"no checkpoint can be used, and it reaches step {reaches} only")
            self.display.line("no checkpoint can be used: the run is trained again from its journal")
        for folder in unusable:
            checkpoint.set_aside(folder)
        return found

    def _fitting(self, found: Checkpoint) -> Checkpoint:
        tensors = dict(found.tensors)
        rng, own = tensors.pop(_RNG, None), torch.get_rng_state()
        if rng is None or rng.shape != own.shape or rng.dtype != own.dtype:
            raise checkpoint.UnusableError(f"{_RNG} is no state of torch's generator")
        if why := self.learner.misfit(tensors):
            raise checkpoint.UnusableError(why)
        return found

    def _remembered(self) -> Memory:
        """Return the memory as it was after `step`: steps that are trained again must not know their outcomes."""
        sampling, store = self.config.sampling, self.parts.store
        if sampling.memory_from and not store.remembers:
            with earlier_store(sampling.memory_from) as earlier:
                store.remember(earlier)
        memory = Memory(sampling.memory_decay)
        for seen in store.seen(self.step):
            memory.add(*seen)
        return memory

    def save_checkpoint(self) -> None:
        """Write weights, master copy, moments, random state and data position."""
        tensors = {**self.learner.tensors(), _RNG: torch.get_rng_state()}
        with self._span("checkpoint"):
            self.parts.store.flush()
            root, run_id = self.out / "checkpoints", self.parts.store.id
            checkpoint.save(root, self.step, self.position, self.parts.model.save, tensors, run=run_id)
        self._saved = self.step

    def check_model(self) -> None:
        """Compare the linear operators and rows that share a prompt with the model's own logits, and print which are used."""
        prompts = list(islice(self.parts.train(0), 2))
        samples = [Sample(p, _made_up(p, i, _CHECK_TOKENS), 0.0) for p in prompts for i in range(2)]
        pad = self.parts.model.pad_id
        plain = collate(rows_of(samples, 0), pad).to(self.device)
        shared = collate(rows_of(samples, sum(len(s.prompt.token_ids) + _CHECK_TOKENS for s in samples)), pad).to(self.device)
        head, sharing = check_forms(self.parts.model, plain, shared, self.learner.loss.temperature)
        self._say_form("linear_policy_loss", head.ok, head.max_diff, "token_logprobs on the model's logits is used instead")
        self._say_form("a row per prompt", sharing.ok, sharing.max_diff, "every completion gets a row of its own")
        if not head.ok and self.learner.loss.entropy_coef:
            raise InputError("train", "entropy_coef with a model the linear operators do not fit", "entropy_coef 0")
        if not head.ok and self.learner.predictor is not None:
            raise InputError("train", "baseline 'predicted' with a model the linear operators do not fit", "baseline 'memory'")

    def _say_form(self, what: str, ok: bool, max_diff: float, otherwise: str) -> None:
        verdict = "agrees with the model's logits" if ok else f"does not agree with the model's logits: {otherwise}"
        self.display.line(f"{what} {verdict} (largest difference {max_diff:.1e} nats)")

    # -------------------- one step

    def train_step(self) -> None:
        """Sample, update, and log."""
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
        self._spend([record])
        self.display.line(step_line(record, self.config.training.steps))
        self._warn_of_cuts(result.metrics["truncated_fraction"])
        self._tell(self.log.records[-1])

    def _warn_of_cuts(self, truncated_fraction: float) -> None:
        warning = truncation_warning(truncated_fraction, max_tokens_of(self.config))
        if warning and not self._has_warned:
            self._has_warned = True
            self.display.line(warning)

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
        sampler.restore(self._journaled(step))
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

    def _journaled(self, step: int) -> list[Event]:
        """Return the step's events. Completions that no model of this vocabulary can have produced are taken back and sampled again."""
        store, vocabulary = self.parts.store, self.parts.model.head().weight.shape[0]
        wrong = {e.id for e in store.events(step) if isinstance(e, Scored) and impossible(e.completion, vocabulary)}
        if wrong:
            self.display.line(f"step {step}: {len(wrong)} completions of the journal cannot be the model's: they are sampled again")
            store.take_back(wrong)
        return store.events(step)

    def _check_scored(self, step: int, result: SamplingResult) -> None:
        """Refuse a step with nothing but voids, and remove it, so that it is sampled again once the reward is fixed."""
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
                samples, sum(s.completion.num_written for s in samples), num_seqs_of(samples, result, self.parts.policy, t.minibatches)
            )
            for samples in shuffled_minibatches(groups, t.minibatches, (self.config.run.seed, step))
        ]
        learning_rate = rate_at(t, step)
        num_tokens = sum(m.num_tokens for m in minibatches)
        with self.display.training(f"step {step} training", num_tokens) as advance:
            trained = self.learner.update(minibatches, learning_rate, advance)
        coefficient = {"kl_coef": t.kl_coef} if t.kl_coef else {}
        return {**trained, **coefficient, "tokens_trained": float(num_tokens), "learning_rate": learning_rate}

    # -------------------- evaluation

    def evaluate(self) -> None:
        """Evaluate Avg@k on the held-out prompts with the current weights, unless the log has it already."""
        if not self.parts.held_out or self.log.evaluation(self.step) is not None:
            return
        what, started = f"step {self.step} held-out", time.monotonic()
        results: list[SamplingResult] = []
        with self._span(what):
            self._sync()
            with self.display.sampling(what, self.meter.look) as on_progress:
                e = evaluate(
                    self.parts.engine, self.parts.rewards, self.parts.held_out, k=self.config.task.eval_k, seed=self.config.run.seed,
                    policy_version=self.step, positive_threshold=self.parts.policy.positive_threshold,
                    request_timeout_s=self.config.engine.request_timeout_s or None, on_progress=on_progress, on_result=results.append,
                )  # fmt: skip
            self.parts.engine.sleep()
            kl = self.learner.kl(results[0])
        seconds = time.monotonic() - started
        self.log.write({**e.record(), **kl, "step": self.step, "eval_s": seconds})
        self.display.line(
            f"held-out after step {self.step}: Avg@{e.k} {e.avg_at_k:.3f} ± {e.stderr:.3f}, pass@{e.k} {e.pass_at_k[str(e.k)]:.3f} "
            f"on {len(e.per_prompt)} prompts{''.join(f', KL {x:.4f}' for x in kl.values())} · {length_text(e.record())} · {seconds:.1f} s"
        )
        self._warn_of_cuts(e.truncated_fraction)
        self._tell(self.log.records[-1])


def _made_up(prompt: Prompt, index: int, length: int) -> Completion:
    """Return tokens of the prompt itself as a completion: in the vocabulary, and different for each index."""
    ids = np.array([prompt.token_ids[(index * length + i) % len(prompt.token_ids)] for i in range(length)], dtype=np.int32)
    return Completion(CompletionId(0, prompt.prompt_id, index), ids, np.zeros(length, dtype=np.float32), "", "stop", 0)


def impossible(completion: Completion, vocabulary: int) -> bool:
    """Return whether the completion has a token outside the vocabulary, or an invalid logprob."""
    ids, logprobs = completion.token_ids, completion.rollout_logprobs
    if ids.shape != logprobs.shape or ((ids < 0) | (ids >= vocabulary)).any():
        return True
    written = logprobs if completion.token_mask is None else logprobs[completion.token_mask]
    return not bool(np.isfinite(written).all())


def _unbroken(steps: Sequence[int]) -> int:
    """Return the last step before the first gap in 1, 2, 3, .."""
    return next((n - 1 for n, step in enumerate(steps, 1) if n != step), len(steps))


def _wrong_journal(out: Path, why: str) -> InputError:
    hint = f"put that file back; train --model {out}/checkpoints/.../model begins a new run with the weights"
    return InputError("train", f"{out / 'rollouts.sqlite'} is not the journal of this run: {why}", "the journal it was trained on", hint)


def earlier_store(run_dir: str) -> RolloutStore:
    """Return the store of the run that `memory_from` names. Raises: InputError if there is none."""
    return RolloutStore(Path(run_dir) / "rollouts.sqlite", read_only=True)


# A resumed run may change its length, its place, its limits and its speed. Everything of the engine except its kind belongs to these.
_FREE = {
    "model": set(), "task": {"eval_every"}, "sampling": set(), "training": {"steps", "budget", "tokens_per_pass", "gradient_checkpointing"},
    "run": {"out", "checkpoint_every", "push_to_hub", "track", "profile"},
    "engine": {f.name for f in dataclasses.fields(EngineConfig)} - {"engine"},
}  # fmt: skip


def fingerprint(config: Config) -> dict[str, Any]:
    """Return the settings that must not change when a run resumes: everything that determines what is learned."""
    return compared(dataclasses.asdict(config))


def compared(run: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a stored `fingerprint`, of this or an earlier version: leave out what is free now, and add new settings at their defaults.

    The number of steps is free with a constant learning rate only. With another schedule it decides the rate of every step, also of those
    that are trained again from the journal, whose completions would then not be those of the weights.
    """
    out = dict(run)
    one_seed = run.get("run", {}).get("seed", 0)  # a run without a data_seed took its data from this seed
    for section, defaults in dataclasses.asdict(Config()).items():
        given = run.get(section)
        new = {"data_seed": one_seed} if section == "run" else {}
        if isinstance(given, Mapping):
            merged = {**defaults, **new, **given}
            kept = {"steps"} if merged.get("lr_schedule", "constant") != "constant" else set()
            out[section] = {k: v for k, v in merged.items() if k not in _FREE[section] - kept}
    return out
