"""The policy as the trainer sees it: hidden states for the linear operators, or logits if those operators do not fit the model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reinforce_ada import ops
from reinforce_ada.errors import InputError
from reinforce_ada.training.batching import Batch, attention_mask


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """The last projection: logits = soft_cap * tanh(logit_scale * (hidden @ weight.T + bias) / soft_cap)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float = 1.0
    soft_cap: float | None = None


class LanguageModel(Protocol):
    """The interface that the trainer needs from a model."""

    module: nn.Module
    pad_id: int
    share_prompts: bool  # whether several completions may share a row (and its prompt)
    use_head: bool  # whether `hidden` and `head` reproduce the model's own logits

    def hidden(self, batch: Batch) -> Tensor:
        """Return the states that predict the batch's completion tokens, [T, D]."""

    def head(self) -> OutputHead:
        """Return the projection from states to logits."""

    def logits(self, batch: Batch) -> Tensor:
        """Return the model's own logits of the batch's completion tokens, [T, V]."""

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights under the names that engines use."""

    def save(self, folder: Path) -> None:
        """Write a folder that transformers and vLLM load."""

    def checkpoint_layers(self) -> None:
        """Keep only the input of each layer for the backward, which computes the layer again. Raises: InputError if it cannot."""


class HuggingFaceModel:
    """Any transformers causal LM with its tokenizer.

    Args:
        module: the model.
        causal_lm: the transformers model in `module`, if that is a wrapper around it.
    """

    def __init__(self, module: Any, tokenizer: Any, causal_lm: Any = None) -> None:
        self.module = module
        self.causal_lm = module if causal_lm is None else causal_lm
        self.tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.share_prompts = True
        self.use_head = True
        self._config = self.causal_lm.config.get_text_config()
        self._checkpointed: list[nn.Module] = []

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        mask = self._shared_mask(batch) if self.share_prompts else (batch.segment_of >= 0).long()
        return {"input_ids": batch.input_ids, "attention_mask": mask, "position_ids": batch.position_ids, "use_cache": False}

    def _shared_mask(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Return one mask, or one per kind of layer if some slide: transformers applies no window of its own to a given mask."""
        dtype = next(self.module.parameters()).dtype
        window = getattr(self._config, "sliding_window", None)
        if window is None:
            return attention_mask(batch, dtype)
        if getattr(self._config, "layer_types", None) is None:
            return attention_mask(batch, dtype, window)
        return {"full_attention": attention_mask(batch, dtype), "sliding_attention": attention_mask(batch, dtype, window)}

    def hidden(self, batch: Batch) -> Tensor:
        with self._recomputing():
            states: Tensor = self.causal_lm.base_model(**self._inputs(batch)).last_hidden_state
        return states[batch.row_of, batch.column_of]

    def head(self) -> OutputHead:
        """Return the projection, with the scale and cap of Cohere, Granite and Gemma configurations."""
        layer = self.causal_lm.get_output_embeddings()
        scale = getattr(self._config, "logit_scale", None) or 1.0 / (getattr(self._config, "logits_scaling", None) or 1.0)
        return OutputHead(layer.weight, getattr(layer, "bias", None), scale, getattr(self._config, "final_logit_softcapping", None))

    def logits(self, batch: Batch) -> Tensor:
        with self._recomputing():
            logits: Tensor = self.causal_lm(**self._inputs(batch)).logits
        return logits[batch.row_of, batch.column_of]

    def checkpoint_layers(self) -> None:
        if not self.causal_lm.supports_gradient_checkpointing:
            given = f"gradient_checkpointing with {type(self.causal_lm).__name__}, whose layers transformers cannot compute again"
            raise InputError("train", given, "--gradient-checkpointing false")
        # No random state is kept for the second forward, since no dropout runs.
        self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self._checkpointed = [m for m in self.causal_lm.modules() if getattr(m, "gradient_checkpointing", False)]
        for module in self._checkpointed:
            for name, value in vars(module).items():
                if "drop" in name and isinstance(value, float):  # OPT's layers drop by themselves while they are `training`
                    setattr(module, name, 0.0)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Let transformers checkpoint in a forward with gradients, and in no other: it does so in layers that are `training`.

        Their submodules are not, so nothing drops out. An engine that shares the module needs its cache, which checkpointing refuses.
        """
        layers = self._checkpointed if torch.is_grad_enabled() else []
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state dict, detached."""
        for name, tensor in self.module.state_dict().items():
            yield name, tensor.detach()

    def save(self, folder: Path) -> None:
        """Write the weights as safetensors, the configuration and the tokenizer."""
        self.module.save_pretrained(folder)
        self.save_beside_weights(folder)

    def save_beside_weights(self, folder: Path) -> None:
        """Write the tokenizer, and the notice that a licence asks for if the base model came with one."""
        self.tokenizer.save_pretrained(folder)
        notice = Path(self.causal_lm.name_or_path) / "NOTICE"
        if notice.is_file():
            (folder / notice.name).write_bytes(notice.read_bytes())


def token_logprobs(model: LanguageModel, batch: Batch, temperature: float) -> Tensor:
    """Return log pi(token) of the batch's completion tokens at `temperature`, [T] fp32, from the fused operator that fits the model."""
    if not model.use_head:
        return _only(ops.token_logprobs(model.logits(batch), batch.token_ids, temperature=temperature))
    head = model.head()
    return _only(
        ops.linear_token_logprobs(
            model.hidden(batch), head.weight, batch.token_ids, bias=head.bias, logit_scale=head.logit_scale,
            soft_cap=head.soft_cap, temperature=temperature,
        )
    )  # fmt: skip


def _only(logprobs: Any) -> Tensor:
    """Return the logprobs: the operators return a bare tensor when nothing else is asked for."""
    assert isinstance(logprobs, Tensor)
    return logprobs


@dataclass(frozen=True, slots=True)
class FormCheck:
    """Largest difference in nats between two ways to the same logprobs, and whether it and the mean are within rounding."""

    max_diff: float
    ok: bool


# Mean difference allowed (ten times that for one token). Two correct paths in bf16 differ by the rounding of 8-bit mantissas.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.05}


@torch.no_grad()
def check_forms(model: LanguageModel, plain: Batch, shared: Batch, temperature: float) -> tuple[FormCheck, FormCheck]:
    """Compare the fast forms with the model's own logits and set `use_head` and `share_prompts` accordingly.

    Args: the same completions in rows of one (`plain`) and in shared rows (`shared`), in the same order.
    Returns: the check of the linear operators, and of rows that share prompts.
    """
    model.share_prompts, model.use_head = False, False
    truth = token_logprobs(model, plain, temperature)
    model.use_head = True
    head = _compare(token_logprobs(model, plain, temperature), truth, model)
    model.use_head = head.ok
    model.share_prompts = True
    try:
        rows = _compare(token_logprobs(model, shared, temperature), truth, model)
    except (TypeError, ValueError, RuntimeError):  # the model accepts no custom mask
        rows = FormCheck(math.inf, False)
    model.share_prompts = rows.ok
    return head, rows


def _compare(got: Tensor, truth: Tensor, model: LanguageModel) -> FormCheck:
    diff = (got - truth).abs()
    max_diff, mean_diff = float(diff.max()), float(diff.mean())
    tolerance = _TOLERANCE[next(model.module.parameters()).dtype]
    return FormCheck(max_diff, mean_diff <= tolerance and max_diff <= 10 * tolerance)
