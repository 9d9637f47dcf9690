"""What every sampling engine must do with a Hugging Face model: the requests, the truth, and the scenes both engine tests play."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reinforce_ada import ops
from reinforce_ada.errors import InputError
from reinforce_ada.types import Completion, CompletionId, Prompt, Request

MAX_TOKENS, MAX_MODEL_LEN = 10, 64


# What folders of chat models say, beside their end tokens. Completions that follow it are not those of the policy that is trained.
MISLEADING = {"do_sample": True, "temperature": 0.6, "top_k": 3, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3}


def mislead(folder: Path) -> None:
    """The folder's generation_config.json says so from now on."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **MISLEADING}))


def make_prompts(vocab_size: int = 384) -> list[Prompt]:
    """Six prompts of different lengths; the last four start with the same 33 tokens: more than a block, so a prefix cache keeps it."""
    rng = np.random.default_rng(0)
    shared = rng.integers(3, vocab_size, 33).tolist()
    tails = [rng.integers(3, vocab_size, n).tolist() for n in (1, 7, 1, 5, 14, 20)]
    return [Prompt(f"p{i}", tuple(t if i < 2 else shared + t)) for i, t in enumerate(tails)]


def make_requests(prompts: Sequence[Prompt], per_prompt: int = 4) -> list[Request]:
    return [
        Request(CompletionId(1, p.prompt_id, k), p, seed=(7_919 * i + 104_729 * k) % 2**63, policy_version=0)
        for i, p in enumerate(prompts)
        for k in range(per_prompt)
    ]


def sample(engine: Any, requests: Sequence[Request]) -> dict[CompletionId, Completion]:
    """Every request's completion, never more than `free_slots` at once."""
    waiting, done = list(requests), {}
    while len(done) < len(requests):
        count = min(engine.free_slots, len(waiting))
        now, waiting = waiting[:count], waiting[count:]
        if now:
            engine.submit(now)
        for completion in engine.poll():
            assert completion.id not in done
            done[completion.id] = completion
    return done


def tokens(done: dict[CompletionId, Completion]) -> dict[str, list[int]]:
    return {f"{i.prompt_id}/{i.index}": c.token_ids.tolist() for i, c in sorted(done.items())}


@torch.no_grad()
def logits_of(module: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """Logits of each token of `ids` after `prompt`, [L, V], from one unpadded row."""
    row = torch.tensor([[*prompt, *ids]])
    return module(input_ids=row).logits[0, len(prompt) - 1 : -1]


# Settings that truncate the distribution, alone and together.
TRUNCATIONS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.7}, "top_k": {"top_k": 5}, "min_p": {"min_p": 0.2}, "all": {"top_p": 0.8, "top_k": 12, "min_p": 0.05},
}  # fmt: skip


def truncated_probabilities(logits: Any, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Any:
    """What is left of softmax(logits / temperature), [V] float64, token by token from the likeliest down; no two may be equally likely."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    p = np.exp(z - z.max())
    p = p / p.sum()
    ranked = [int(i) for i in np.argsort(-p)]
    kept = [i for i in ranked if p[i] >= min_p * p[ranked[0]]][: top_k or None]
    mass = sum(p[i] for i in kept)
    left, nucleus = 0.0, []
    for i in kept:
        if nucleus and left / mass >= top_p:  # those before it are enough
            break
        nucleus.append(i)
        left += p[i]
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus] / left
    return out


def largest_truncated_difference(
    module: Any, requests: Sequence[Request], done: dict[CompletionId, Completion], temperature: float, truncation: dict[str, Any]
) -> float:
    """Of the logprobs from those of the truncated distribution; infinite if a token outside its support was sampled."""
    worst = 0.0
    for r in requests:
        c = done[r.id]
        rows = logits_of(module, r.prompt.token_ids, c.token_ids)
        for row, token, logprob in zip(rows, c.token_ids, c.rollout_logprobs, strict=True):
            p = truncated_probabilities(row, temperature, **truncation)[token]
            worst = max(worst, abs(float(np.log(p)) - float(logprob)) if p > 0 else float("inf"))
    return worst


def largest_logprob_difference(module: Any, requests: Sequence[Request], done: dict[CompletionId, Completion], temperature: float) -> float:
    worst = 0.0
    for r in requests:
        c = done[r.id]
        truth = ops.token_logprobs(
            logits_of(module, r.prompt.token_ids, c.token_ids), torch.from_numpy(c.token_ids).long(), temperature=temperature
        )
        worst = max(worst, float((truth - torch.from_numpy(c.rollout_logprobs)).abs().max()))
    return worst


def not_greedy(module: Any, requests: Sequence[Request], done: dict[CompletionId, Completion]) -> int:
    """How many sampled tokens are not the argmax of the model's logits at their place."""
    return sum(
        int((logits_of(module, r.prompt.token_ids, done[r.id].token_ids).argmax(-1) != torch.from_numpy(done[r.id].token_ids)).sum())
        for r in requests
    )


@torch.no_grad()
def spread(module: Any) -> None:
    """Logits some nats apart, with an end token (1) that comes up."""
    weight = module.get_output_embeddings().weight
    weight.mul_(0.2 / weight.std())
    weight[1] *= 2.0


@torch.no_grad()
def perturb(module: Any, seed: int, scale: float = 0.3) -> None:
    """Random weights far from the old ones, in place."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.add_(scale * p.std().clamp_min(0.05) * torch.randn(p.shape, generator=generator))


def weights(module: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach()) for name, tensor in module.state_dict().items())


def abort_and_reissue(engine: Any, requests: Sequence[Request]) -> tuple[dict[CompletionId, Completion], dict[CompletionId, Completion]]:
    """(the completions of the even requests, the odd ones having been aborted after three polls or the first answer; those of the odd
    ones, issued again). A fast server may answer all of them within one poll: they are then aborted before any."""
    kept, again = _abort_after(3, engine, requests)
    return (kept, again) if again else _abort_after(0, engine, requests)


def _abort_after(
    polls: int, engine: Any, requests: Sequence[Request]
) -> tuple[dict[CompletionId, Completion], dict[CompletionId, Completion]]:
    engine.submit(requests)
    done: list[Completion] = []
    for _ in range(polls):
        done += [] if done else engine.poll()  # a fast server may finish all of them within three polls
    early = {c.id for c in done}
    aborted = [r for i, r in enumerate(requests) if i % 2 and r.id not in early]
    engine.abort([r.id for r in aborted])
    left = {r.id for r in requests} - {r.id for r in aborted} - early
    for _ in range(5 * MAX_TOKENS):
        done += [c for c in engine.poll() if c.finish_reason != "abort"]
        if left <= {c.id for c in done}:
            break
    return {c.id: c for c in done}, sample(engine, aborted)


def common_texts(done: dict[CompletionId, Completion], how_many: int = 10) -> list[str]:
    """The characters that most completions say after their first."""
    counts = Counter(character for c in done.values() for character in sorted(set(c.text[1:]) - {"\ufffd"}))
    return [character for character, _ in counts.most_common(how_many)]


def cut_at(stop: Sequence[str], done: dict[CompletionId, Completion], stopped: dict[CompletionId, Completion]) -> int:
    """How many completions a stop string ended; each is a beginning of what was sampled without it."""
    count = 0
    for i, full in done.items():
        c = stopped[i]
        assert c.text == min((full.text.split(s)[0] for s in stop), key=len)
        if any(s in full.text for s in stop):
            assert c.finish_reason == "stop"
            count += 1
        else:
            assert (c.token_ids.tolist(), c.finish_reason) == (full.token_ids.tolist(), full.finish_reason)
        assert full.token_ids[: len(c.token_ids)].tolist() == c.token_ids.tolist()
        assert len(c.rollout_logprobs) == len(c.token_ids)
    return count


def refusal(call: Any) -> str:
    """The one line of the InputError this raises."""
    try:
        call()
    except InputError as e:
        return str(e)
    return ""


def bad_requests() -> dict[str, Request]:
    """An empty prompt, and one a token too long."""
    sizes = {"empty": 0, "long": MAX_MODEL_LEN - MAX_TOKENS + 1}
    return {name: Request(CompletionId(1, name, 0), Prompt(name, (5,) * size), 0, 0) for name, size in sizes.items()}
