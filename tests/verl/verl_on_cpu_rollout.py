"""A rollout for verl that generates with transformers on a CPU, reproducibly, and the two hooks that make a whole run reproducible.

A completion is a function of the weights, the prompt's token ids and a seed. The seed is derived from the request, not from its order of
arrival: SeededAgentLoop names a request by its step, its row of the data set and its session, and the server hashes this name together
with `actor_rollout_ref.rollout.seed` and the prompt's token ids (see `seed_of`). Each completion is generated alone, so that neither the
size of a batch nor its padding can change a logit. OrderedReplayBuffer then puts the rows of a batch in the order of the data, because the
order in which completions arrive would change sums of gradients in their last bits.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterable
from typing import Any

import ray
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


def seed_of(run_seed: int, prompt_ids: list[int], request: str) -> int:
    """Return the seed of a completion, 63 bits of SHA-256 over the seed of the run, the name of the request and the prompt's token ids."""
    text = f"{run_seed}|{request}|{','.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def complete(
    model: torch.nn.Module, prompt_ids: list[int], seed: int, *, max_tokens: int, temperature: float, eos_token_id: int
) -> tuple[list[int], list[float]]:
    """Sample one completion of at most `max_tokens` tokens, the end token included, and return its ids and their log-probabilities.

    The distribution is softmax(logits / temperature) over the whole vocabulary; a temperature of 0 takes the largest logit, with
    log-probabilities at temperature 1.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, new, logprobs = torch.tensor([prompt_ids]), [], []
    while len(new) < max_tokens and eos_token_id not in new:
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1, generator=generator) if temperature else logp.argmax(-1, keepdim=True)
        new.append(int(token))
        logprobs.append(float(logp[token]))
        ids = torch.cat([ids, token[None]], dim=1)
    return new, logprobs


class Server:
    """A Ray actor with a model of its own: tokens in, tokens out. It stands where verl expects an inference server."""

    def __init__(self, path: str, max_tokens: int, run_seed: int) -> None:
        """Load the model and the tokenizer from `path`; a completion has at most `max_tokens` tokens."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.eos_token_id = int(AutoTokenizer.from_pretrained(path).eos_token_id)
        self.max_tokens, self.run_seed = max_tokens, run_seed
        self.global_steps = -1  # the version of the weights, set with them

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        """Return the completion of a request, whose name is the sampling parameter "request"."""
        if sampling_params.get("top_k", -1) != -1 or sampling_params.get("top_p", 1.0) != 1.0:
            raise ValueError(f"sampling parameters: {sampling_params}; this server samples from the whole vocabulary: top_k=-1, top_p=1")
        if "request" not in sampling_params:
            raise ValueError("sampling parameters: no `request`; use rollout.agent.default_agent_loop=seeded_single_turn")
        ids, logprobs = complete(
            self.model,
            list(prompt_ids),
            seed_of(self.run_seed, prompt_ids, sampling_params["request"]),
            max_tokens=int(sampling_params.get("max_tokens", self.max_tokens)),
            temperature=float(sampling_params["temperature"]),
            eos_token_id=self.eos_token_id,
        )
        return TokenOutput(
            token_ids=ids, log_probs=logprobs, stop_reason="completed", num_preempted=0, extra_fields={"global_steps": self.global_steps}
        )

    async def load_weights(self, weights: dict[str, Any], global_steps: int | None) -> None:
        """Replace all weights, given as arrays by name, and note their version."""
        self.model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
        self.global_steps = self.global_steps if global_steps is None else global_steps

    async def wait_until_ready(self) -> None:
        """Return once the model is loaded."""

    async def _nothing(self, *_: Any, **__: Any) -> None:
        """Do nothing: this server has no cache, no memory to give back and no profiler, and a completion ends at once."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    abort_all_requests = resume_generation = start_profile = stop_profile = _nothing


def server_name(replica_rank: int) -> str:
    """Return the name under which the training worker finds the server of a replica."""
    return f"transformers_server_{replica_rank}"


class TransformersReplica(RolloutReplica):
    """A replica of one server."""

    async def launch_servers(self) -> None:
        """Start the server as an actor that takes no CPU of Ray's, and wait until it has loaded its model."""
        options = {"name": server_name(self.replica_rank), "num_cpus": 0, "max_concurrency": self.max_concurrency}
        server = ray.remote(Server).options(**options).remote(self.model_config.path, self.config.response_length, self.config.seed)
        await server.wait_until_ready.remote()
        self.servers, self._server_handle, self._server_address = [server], server, server_name(self.replica_rank)


class ServerAdapter(BaseRollout):
    """The training worker's side of the server: it sends the weights."""

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: the server keeps its memory."""

    async def release(self) -> None:
        """Do nothing: the server keeps its memory."""

    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None, wire_format: str = "named_tensors", **_: Any
    ) -> None:
        """Send all weights to the server of this worker's rank."""
        if wire_format != "named_tensors":
            raise ValueError(f"wire format: {wire_format}; this adapter sends named tensors")
        server = ray.get_actor(server_name(int(os.environ["RANK"])))
        arrays = {name: weight.detach().float().cpu().numpy() for name, weight in weights}
        await asyncio.wrap_future(server.load_weights.remote(arrays, global_steps).future())


class SeededAgentLoop(SingleTurnAgentLoop):
    """verl's single turn that names its request by step, row of the data set and session, which makes its completion reproducible."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Generate with the request's name among the sampling parameters, as vLLM takes a `seed` there."""
        request = f"step {kwargs['global_steps']} row {kwargs['index']} session {kwargs['session_id']}"
        return await super().run({**sampling_params, "request": request}, **kwargs)


class OrderedReplayBuffer(ReplayBuffer):
    """verl's replay buffer, which hands out rows in the order of the data instead of that of their arrival, and polls every 50 ms."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the arguments of the trainer."""
        super().__init__(*args, **{"poll_interval": 0.05, **kwargs})

    def _materialize_batch(self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, dict]) -> Any:
        """Sort the rows by prompt, session and output; TransferQueue lists prompts in the order in which the trainer submitted them."""
        place = {uid: number for number, uid in enumerate(self.prompt_global_steps[partition_id])}

        def order(key: str) -> tuple[int, int, int]:
            uid, session, output = key.rsplit("_", 2)
            return place.get(uid, len(place)), int(session), int(output)

        ordered = {key: partition_snapshot[key] for key in sorted(partition_snapshot, key=order)}
        return super()._materialize_batch(partition_id, selected_prompt_uids, ordered)
