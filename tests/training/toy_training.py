"""A model of three small parameters, an engine that samples from them by request seed alone, and their trainer: no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reinforce_ada import config as configuration
from reinforce_ada.config import Config
from reinforce_ada.engines.base import Engine
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import configured
from reinforce_ada.training.batching import Batch
from reinforce_ada.training.callbacks import Callback
from reinforce_ada.training.display import Display
from reinforce_ada.training.distributed import Ranks
from reinforce_ada.training.language_model import OutputHead
from reinforce_ada.training.tasks import PromptStream, Source, content_key
from reinforce_ada.training.trainer import Parts, Trainer, compared, fingerprint
from reinforce_ada.types import Completion, CompletionId, Prompt, Request

VOCABULARY, WIDTH, STOP, MAX_TOKENS = 32, 8, 0, 4


def beside(out: Path, what: str) -> Path:
    """A file about a run that is none of its own."""
    return out.with_name(f"{out.name}-{what}.txt")


class ToyModel:
    """A LanguageModel whose next token depends on the last one: logits = head(tanh(embedding[last]))."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict({"embedding": nn.Embedding(VOCABULARY, WIDTH), "head": nn.Linear(WIDTH, VOCABULARY)}).to(dtype)
        self.pad_id, self.share_prompts, self.use_head = STOP, True, True

    def hidden(self, batch: Batch) -> Tensor:
        return torch.tanh(self.module["embedding"](batch.input_ids[batch.row_of, batch.column_of]))

    def head(self) -> OutputHead:
        layer: Any = self.module["head"]
        return OutputHead(layer.weight, layer.bias)

    def logits(self, batch: Batch) -> Tensor:
        return self.module["head"](self.hidden(batch))

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p.detach()) for name, p in self.module.named_parameters())

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(dict(self.named_tensors()), folder / "model.safetensors")


def saved_weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


class ToyEngine(Engine):
    """Samples from its copy of the weights, two completions per poll, and writes every id it is given to a file."""

    def __init__(self, submitted: Path) -> None:
        self._submitted = submitted
        self._running: dict[CompletionId, Request] = {}
        self._weights: dict[str, Tensor] = {}
        self._version = -1

    @property
    def free_slots(self) -> int:
        return 8 - len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        with self._submitted.open("a") as f:
            f.writelines(f"{r.id.step} {r.id.prompt_id} {r.id.index}\n" for r in requests)
        self._running.update((r.id, r) for r in requests)

    def poll(self) -> list[Completion]:
        return [self._complete(self._running.pop(i)) for i in list(self._running)[-2:]]  # the newest first

    def _complete(self, request: Request) -> Completion:
        rng = np.random.default_rng(request.seed)
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < MAX_TOKENS and STOP not in ids:
            last = ids[-1] if ids else request.prompt.token_ids[-1]
            hidden = torch.tanh(self._weights["embedding.weight"][last])
            row = (self._weights["head.weight"] @ hidden + self._weights["head.bias"]).log_softmax(-1)
            ids.append(int(np.searchsorted(row.exp().cumsum(0).numpy(), rng.random() * 0.999)))
            logprobs.append(float(row[ids[-1]]))
        text = " ".join(map(str, ids))
        return Completion(request.id, ids, logprobs, text, "stop" if STOP in ids else "length", self._version)

    def abort(self, ids: Sequence[CompletionId]) -> None:
        for i in ids:
            self._running.pop(i, None)

    def sync_weights(self, named_tensors: Iterable[tuple[str, Any]], policy_version: int) -> None:
        self._weights = {name: tensor.float().clone() for name, tensor in named_tensors}
        self._version = policy_version

    def close(self) -> None: ...


def is_multiple_of_four(prompt: Prompt, text: str) -> float:
    """About a quarter of the completions are right, whatever the prompt."""
    return float(sum(map(int, text.split())) % 4 == 0)


def toy_config(out: Path, **overrides: Any) -> Config:
    base = {
        "steps": 5, "prompts_per_step": 4, "group_size": 4, "round_size": 4, "max_rounds": 3, "minibatches": 2, "learning_rate": 0.02,
        "warmup_steps": 1, "eval_k": 2, "eval_prompts": 3, "checkpoint_every": 2, "max_tokens": MAX_TOKENS, "tokens_per_pass": 24,
        "eval_every": 2, "dtype": "float32",
    }  # fmt: skip
    return configuration.load(None, {**base, "out": str(out), **overrides})


class _Told(Display):
    """Lines go to a file too."""

    def __init__(self, path: Path) -> None:
        super().__init__(stderr=True)
        self._path = path
        path.write_text("")

    def line(self, text: str) -> None:
        super().line(text)
        with self._path.open("a") as f:
            f.write(text + "\n")


def toy_trainer(config: Config, out: Path, *, resume: bool, ranks: Ranks | None = None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A trainer as `launch.train` makes one, of toy parts."""
    out.mkdir(exist_ok=True)
    records = [{"question": f"{i}", "token": 1 + i % (VOCABULARY - 1)} for i in range(10)]  # two and a half steps are an epoch
    source = Source(records.__getitem__, len(records), config.run.seed)

    def make(name: str, record: Any) -> Prompt:
        return Prompt(name, (3, record["token"]), text=record["question"], data=record, key=content_key(record))

    parts = Parts(
        model=ToyModel(getattr(torch, config.model.dtype)),
        engine=ToyEngine(beside(out, "submitted")),
        rewards=InlineRewards(is_multiple_of_four),
        train=lambda position: PromptStream(source, frozenset(), make, position),
        held_out=[make(f"held-out-{i}", {"question": "", "token": 20 + i}) for i in range(3)],
        policy=configured(config.sampling),
        store=RolloutStore(out / "rollouts.sqlite", run=fingerprint(config), compared=compared),
    )
    trainer = Trainer(parts, config, out, _Told(beside(out, "said")), ranks, callbacks=callbacks)
    if resume:
        trainer.resume()
    return trainer
