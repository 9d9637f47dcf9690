"""verl's agent loop worker with a number of sessions that each prompt decides on; it runs in a Ray actor."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ, apply_greedy_sampling_params

from reinforce_ada.advantages import advantages_of
from reinforce_ada.async_driver import adaptive_group
from reinforce_ada.integrations.verl.memory import Given, Seen
from reinforce_ada.integrations.verl.settings import HISTORY, TAG, TRAIN, Settings, settings_of
from reinforce_ada.types import Prompt, Request, SamplingResult, Scored

_log = logging.getLogger(__name__)


class Session(NamedTuple):
    """What one agent loop gave: one output or several, scored and not yet published."""

    output: Any
    kwargs: dict[str, Any]

    @property
    def outputs(self) -> list[Any]:
        return self.output if isinstance(self.output, list) else [self.output]


def plain(actor_class: Any) -> type[Any]:
    """Return the class that a Ray actor class was made of."""
    made = actor_class.__ray_metadata__.modified_class
    return getattr(made, "__ray_actor_class__", made)  # type: ignore[no-any-return]


class AdaptiveAgentLoopWorker(plain(AgentLoopWorkerTQ)):  # type: ignore[misc]
    """Samples each training prompt until its policy has what it needs, and publishes the kept sessions; validation is verl's own.

    Sessions are scored when they end and held back. When the prompt is done, the kept ones become rows, whose tag has the prompt's
    advantages; then the prompt gets its terminal status. A session that raises, is cancelled or gives no output is a void.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._settings: Settings = settings_of(config)
        self._seen: list[Seen] = []

    def take_seen(self) -> list[Seen]:
        """Return the pools that were finished since the last call."""
        seen, self._seen = self._seen, []
        return seen

    async def _run_prompt(
        self, prompt: dict[str, Any], sampling_params: dict[str, Any], trajectory: dict[str, Any], trace: bool = False
    ) -> None:
        if trajectory["validate"]:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        uid = prompt["uid"]
        tag: dict[str, Any] = {"status": "failure"}
        await tq.async_kv_put(key=uid, partition_id=TRAIN, tag={"status": "running"})
        try:
            result = await self._sample(dict(prompt), dict(sampling_params), trajectory, trace)
            is_whole = await self._publish(result)
            tag = {"status": "finished" if is_whole and result.pools[0].count else "failure", TAG: dict(result.metrics)}
        except Exception:
            _log.exception("prompt %s failed", uid)
        finally:  # whatever ends it: verl waits for a terminal status
            await tq.async_kv_put(key=uid, partition_id=TRAIN, tag=tag)

    async def _sample(self, prompt: dict[str, Any], params: dict[str, Any], trajectory: dict[str, Any], trace: bool) -> SamplingResult:
        if not prompt.pop("__do_sample__", True):
            apply_greedy_sampling_params(params)
        key, *history = prompt.pop(HISTORY, ("",))

        async def session(request: Request) -> tuple[Session, Any]:
            held = await self._run_agent_loop(params, trajectory=trajectory, trace=trace, session_id=request.id.index, **prompt)
            score = held.outputs[-1].reward_score
            return held, score if score is None else float(np.float32(score))  # verl keeps rewards in float32

        step = int(trajectory["step"])
        result = await adaptive_group(
            self._settings.policy, session, prompt=Prompt(prompt["uid"]), step=step, window=self._settings.window,
            memory=Given(history) if history else None,
        )  # fmt: skip
        pool = result.pools[0]
        if history:  # the manager asks for them
            self._seen.append(Seen(step, key, pool.num_correct, pool.num_wrong))
        return result

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> Session | None:
        """Score the output of a training session, and hold it back. Raises: ValueError for one without a token."""
        if validate:
            await super()._agent_loop_postprocess(output, validate, **kwargs)
            return None
        session = Session(output, kwargs)
        if not session.outputs or not all(output.response_ids for output in session.outputs):
            raise ValueError("the agent loop gave no token")  # verl cannot put such a row into its queue
        await self._compute_score(session.outputs, kwargs=kwargs)
        return session

    async def _publish(self, result: SamplingResult) -> bool:
        """Publish the kept sessions, and return whether all could be."""
        is_whole = True
        for group, advantages in zip(result.groups, advantages_of(result, self._settings.policy), strict=True):
            tag = {TAG: [[s.reward, advantage] for s, advantage in zip(group.kept, advantages, strict=True)]}
            for scored in self._rows(group.kept, advantages):
                held: Session = scored.completion.output
                keys = [f"{held.kwargs['uid']}_{scored.id.index}_{i}" for i in range(len(held.outputs))]
                try:
                    await super()._agent_loop_postprocess(held.output, False, **held.kwargs)  # it has its score: no reward is asked again
                    await tq.async_kv_batch_put(keys=keys, partition_id=TRAIN, tags=[tag] * len(keys))  # verl's own tags stay
                except Exception:
                    _log.exception("session %s could not be published", keys[0])
                    is_whole = False
        return is_whole

    def _rows(self, kept: tuple[Scored, ...], advantages: list[float]) -> tuple[Scored, ...]:
        """Return the sessions to publish: all that were kept, unless the policy gradient of all of them is 0."""
        if any(advantages) or self._settings.zero_rows == "all":
            return kept
        return kept[:1] if self._settings.zero_rows == "one" else ()
