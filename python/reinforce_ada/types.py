"""The records that travel between sampler, engines, rewards, store and trainer.

They are frozen, and need no engine and no torch. Shape letters: P prompts, G groups, N completions, T tokens, V vocabulary, D hidden, L one
completion's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line

if TYPE_CHECKING:
    from reinforce_ada.sampling import Policy
    from reinforce_ada.training.tensors import StepTensors

_NO_IDS, _NO_LOGPROBS = np.empty(0, np.int32), np.empty(0, np.float32)


class CompletionId(NamedTuple):
    """Identifies a completion: the step, the prompt, and the request's number within the prompt (from 0).

    Prompts recur every epoch, so the step is part of the identity: a late completion of another step is never credited.
    """

    step: int
    prompt_id: str
    index: int  # type: ignore[assignment]  # shadows tuple.index, which no id needs


def _shown(text: str) -> str:
    return one_line(repr(text), 60)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Prompt:
    """A prompt as the sampler sees it: an id, token ids for the engine, and the data that its reward function needs.

    Args:
        prompt_id: distinct within a step.
        token_ids: [prompt length], what the engine continues.
        text: the prompt as the engine sees it.
        data: the task's record, with its answer; must pickle.
        key: identifies the prompt across steps and runs, for a memory; "" stands for prompt_id.
    """

    prompt_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""

    def __repr__(self) -> str:
        return f"<Prompt {_shown(self.prompt_id)}: {len(self.token_ids)} tokens, {_shown(self.text)}>"


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One completion to sample. The same id always carries the same seed, even when it is issued again after a loss."""

    id: CompletionId
    prompt: Prompt
    seed: int  # in [0, 2**63)
    policy_version: int

    def completed(
        self, token_ids: Any = _NO_IDS, rollout_logprobs: Any = _NO_LOGPROBS, *, text: str = "", finish_reason: str = "stop", **others: Any
    ) -> Completion:
        """Return this request's completion under its own policy_version, for a sample function of one's own; see `Completion`."""
        return Completion(self.id, token_ids, rollout_logprobs, text, finish_reason, self.policy_version, **others)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Completion:
    """One sampled response.

    Args:
        id: that of its request.
        token_ids: [L].
        rollout_logprobs: [L], log-probabilities of the sampling distribution (after temperature).
        text: what the rewards see.
        finish_reason: "stop", "length" or "abort".
        policy_version: that of the weights that sampled it, as the engine reports it.
        num_cached_tokens: prompt tokens that the engine had cached; None if it does not report them.
        token_mask: [L], False for tokens that the policy did not write (of tools, users); None if it wrote all of them.
        output: what the caller's own sample function returned, if that was no Completion; a store does not keep it.
    Raises: InputError for a token_mask of another length, or with other values than 0 and 1.
    """

    id: CompletionId
    token_ids: NDArray[np.int32]
    rollout_logprobs: NDArray[np.float32]
    text: str
    finish_reason: str
    policy_version: int
    num_cached_tokens: int | None = None
    token_mask: NDArray[np.bool_] | None = None
    output: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", np.asarray(self.token_ids, dtype=np.int32))
        object.__setattr__(self, "rollout_logprobs", np.asarray(self.rollout_logprobs, dtype=np.float32))
        if self.token_mask is not None:
            object.__setattr__(self, "token_mask", _mask(self.token_mask, len(self.token_ids)))

    @property
    def num_written(self) -> int:
        """Return how many of the tokens the policy wrote."""
        return len(self.token_ids) if self.token_mask is None else int(self.token_mask.sum())

    def __repr__(self) -> str:
        return f"<Completion {_name(self.id)}: {len(self.token_ids)} tokens, {self.finish_reason}, {_shown(self.text)}>"


def _name(completion: CompletionId) -> str:
    return f"{completion.index} of {_shown(completion.prompt_id)} in step {completion.step}"


def _mask(given: Any, length: int) -> NDArray[np.bool_]:
    mask = np.asarray(given)
    if mask.shape != (length,) or not np.isin(mask, (0, 1)).all():
        raise InputError("Completion", f"a token_mask of shape {list(mask.shape)}", f"0 or 1 for each of {length} tokens is needed")
    return mask.astype(np.bool_)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Scored:
    """A completion with its reward (finite)."""

    completion: Completion
    reward: float

    def __repr__(self) -> str:
        return f"<Scored {_name(self.id)}: reward {self.reward:g}, {_shown(self.completion.text)}>"

    @property
    def id(self) -> CompletionId:
        return self.completion.id

    @property
    def policy_version(self) -> int:
        return self.completion.policy_version


@dataclass(frozen=True, slots=True, eq=False)
class Failed:
    """A completion that could not be scored: a void. It is committed at its index but counts in no statistic."""

    id: CompletionId
    policy_version: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Lost:
    """A request that the driver no longer waits for; the sampler issues it again with the same seed."""

    id: CompletionId
    policy_version: int
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Aborted:
    """A request that the engine dropped. It is waste if its prompt has exited; otherwise the sampler issues it again."""

    id: CompletionId
    policy_version: int
    num_tokens: int = 0  # tokens it had generated, if the engine knows


Event: TypeAlias = Scored | Failed | Lost | Aborted
Outcome: TypeAlias = Scored | Failed  # what is committed to a pool
ExitReason: TypeAlias = Literal["satisfied", "exhausted", "dropped"]


class PoolStats(NamedTuple):
    """Raw-reward statistics of G pools, each [G] float64. They are numpy arrays from the sampler; the operators accept tensors too.

    A pool is degenerate (no signal) when min == max, exactly. An empty pool has count 0, mean 0, m2 0, min +inf, max -inf.

    Attributes:
        count: [G], scored completions.
        mean: [G], of their rewards.
        m2: [G], centred second moment, the sum of (reward - mean)^2.
        min: [G].
        max: [G].
    """

    count: Any
    mean: Any
    m2: Any
    min: Any
    max: Any


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Pool:
    """Every committed completion of one prompt in one step, in request order, with the statistics of the raw rewards.

    Args:
        prompt: the prompt.
        outcomes: [committed], each at the place of its request.
        num_correct: completions with a reward above positive_threshold.
        num_wrong: the other scored completions.
        num_void: completions that could not be scored.
        mean: mean reward of the scored ones; 0.0 if there is none.
        m2: their centred second moment, the sum of (reward - mean)^2.
        min, max: their smallest and largest reward.
        num_issued: requests handed out, committed or not.
        exit: "satisfied", "exhausted" or "dropped".
        cap: the most completions that this prompt could have used.
        prior: Beta(a, b) of the pass rate before the first draw, for a policy that reads it.
    """

    prompt: Prompt
    outcomes: tuple[Outcome, ...]
    num_correct: int
    num_wrong: int
    num_void: int
    mean: float
    m2: float
    min: float
    max: float
    num_issued: int
    exit: ExitReason
    cap: int
    prior: tuple[float, float] = (1.0, 1.0)

    @property
    def count(self) -> int:
        """Return the number of scored completions (voids are not counted)."""
        return self.num_correct + self.num_wrong

    @property
    def has_signal(self) -> bool:
        """Return whether any two rewards differ: max != min, exactly."""
        return self.count > 0 and self.min != self.max

    @property
    def scored(self) -> tuple[Scored, ...]:
        return tuple(o for o in self.outcomes if isinstance(o, Scored))

    def __repr__(self) -> str:
        counts = f"{self.num_correct} correct, {self.num_wrong} wrong, {self.num_void} void"
        return f"<Pool {_shown(self.prompt.prompt_id)}: {counts}, {self.exit}>"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Group:
    """The completions kept for the loss, in request order, with the pool they came from.

    Args:
        pool: the pool of the prompt.
        kept: [<= group_size].
    """

    pool: Pool
    kept: tuple[Scored, ...]

    def __repr__(self) -> str:
        return f"<Group {_shown(self.pool.prompt.prompt_id)}: {len(self.kept)} kept of {self.pool.count} scored>"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SamplingResult:
    """The result of sampling one step.

    Args:
        pools: [P], in the order in which the prompts entered.
        groups: [G], G <= P; a prompt that was dropped, or of which nothing was kept, has none.
        metrics: the numbers of the step by name, see docs/metrics.md.
    """

    pools: tuple[Pool, ...]
    groups: tuple[Group, ...]
    metrics: Mapping[str, float]

    def __repr__(self) -> str:
        """Return one line: asyncio.run() prints the result of its coroutine into a message, and every token took seconds."""
        kept = sum(len(group.kept) for group in self.groups)
        return f"<SamplingResult: {len(self.pools)} pools, {kept} completions kept in {len(self.groups)} groups>"

    def pool_stats(self) -> PoolStats:
        """Return the statistics of the groups' pools, each [G] float64, ready for `ops.group_advantages(pool=...)`."""
        rows = [(g.pool.count, g.pool.mean, g.pool.m2, g.pool.min, g.pool.max) for g in self.groups]
        columns = np.asarray(rows, dtype=np.float64).reshape(len(rows), 5).T
        return PoolStats(*columns)

    def to_tensors(self, policy: Policy, *, pad_id: int = 0) -> StepTensors:
        """Return the kept completions as the tensors that a training loop needs, with their advantages.

        Args:
            policy: the one that sampled; its weight hook says how advantages are computed, over the statistics of the whole pools.
            pad_id: any id of the vocabulary, for the ends of shorter rows, which `attention_mask` leaves out.
        Returns: `StepTensors`, which has shapes and dtypes, on the CPU; rows are in the order of `groups` and of their `kept`.
        Raises: InputError when nothing was kept, when a prompt or a completion has no token ids, and for a policy whose baseline is
            predicted, which needs the trainer.
        """
        from reinforce_ada.training.tensors import tensors_of  # the records need no torch; this method alone does

        return tensors_of(self, policy, pad_id)
