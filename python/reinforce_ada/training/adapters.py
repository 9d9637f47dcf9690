"""LoRA: low-rank adapters that are trained in place of the weights, which stay as they were loaded.

    y = W x + s B (A x),   s = lora_alpha / lora_rank,   A [rank, in] and B [out, rank] in float32

Source: Hu et al. 2021, arXiv 2106.09685. The layers are peft's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reinforce_ada.config import ModelConfig
from reinforce_ada.errors import InputError, unknown_name
from reinforce_ada.training.language_model import HuggingFaceModel

ALL_LINEAR = "all-linear"  # all linear layers but the output head, as in peft
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names of its files


class AdaptedModel(HuggingFaceModel):
    """A causal LM whose weights are frozen, with adapters in float32. `module` is the peft model around it.

    Adapters are the only parameters with a gradient, so the optimizer and the checkpoints hold nothing else.
    """

    def __init__(self, module: Any, tokenizer: Any) -> None:
        super().__init__(module, tokenizer, module.get_base_model())
        from peft.tuners.lora import LoraLayer

        self._adapted = {name: layer for name, layer in self.causal_lm.named_modules() if isinstance(layer, LoraLayer)}
        self._adapters = {name for name, p in self.causal_lm.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights with the adapters merged into them, under the names of the model without adapters.

        Each is W + s B A in float32, rounded once into the dtype of W, from the W that was loaded: errors cannot add up over a run.
        """
        for name, tensor in self.causal_lm.state_dict().items():
            layer, _, own = name.rpartition(".base_layer.")
            if layer in self._adapted:
                yield f"{layer}.{own}", merged(self._adapted[layer]) if own == "weight" else tensor.detach()
            elif name not in self._adapters:
                yield name, tensor.detach()

    def save(self, folder: Path) -> None:
        """Write the adapters in peft's form, without the weights that they adapt, and the tokenizer."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        # Not `save_pretrained`, which adds a README of blanks to fill in and may ask the hub about the base model.
        tensors = get_peft_model_state_dict(self.module, save_embedding_layers=False)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        config = copy.copy(self.module.active_peft_config)
        config.inference_mode, config.target_modules = True, sorted(config.target_modules)
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@torch.no_grad()
def merged(layer: Any) -> Tensor:
    """Return the weight of a layer with its adapter, in the dtype of the weight."""
    weight: Tensor = layer.get_base_layer().weight
    (adapter,) = layer.active_adapters
    change: Tensor = layer.get_delta_weight(adapter)
    return (weight.float() + change).to(weight.dtype)


def add(model: HuggingFaceModel, settings: ModelConfig, seed: int) -> AdaptedModel:
    """Return the model with new adapters: A drawn from `seed`, B zero, so that nothing changes before the first update.

    Raises: InputError for targets that the model lacks or that cannot have an adapter.
    """
    from peft import LoraConfig, get_peft_model

    rank = settings.lora_rank
    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if settings.lora_alpha is None else settings.lora_alpha,
        target_modules=_targets(model.causal_lm, settings.lora_targets),
        lora_dropout=0.0,  # ratios and rollouts must come from one function
        bias="none",
        task_type="CAUSAL_LM",
    )
    device = next(model.module.parameters()).device
    # A generator of its own: the run's is left as it is, and a resumed run, which finds that in another state, draws the same.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module = get_peft_model(model.causal_lm, adapters, autocast_adapter_dtype=True)  # float32, whatever the weights are
    base = model.causal_lm.name_or_path
    module.active_peft_config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    return AdaptedModel(module.eval(), model.tokenizer)


def _targets(causal_lm: Any, named: str) -> list[str]:
    """Return the names of the layers that get adapters, as peft takes them: each stands for all layers whose path ends with it."""
    names = sorted({name.strip() for name in named.split(",")})
    head = causal_lm.get_output_embeddings()
    linear = {path: layer for path, layer in causal_lm.named_modules() if isinstance(layer, nn.Linear) or _is_conv1d(layer)}
    known = sorted({path.rpartition(".")[2] for path, layer in linear.items() if layer is not head})
    if names == [ALL_LINEAR]:
        names = known
    for name in names:
        found = [layer for path, layer in linear.items() if f".{path}".endswith(f".{name}")]
        if not found or not name:
            raise unknown_name("train", "linear layer", name, known)
        if any(layer is head for layer in found):
            # The linear operators read the head's own weight, and where it is tied it is the embedding too.
            raise InputError("train", f"lora_targets names {name}, the output head", "other linear layers", f"{ALL_LINEAR} leaves it out")
    return names


def _is_conv1d(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # the linear layers of GPT-2, whose weights are transposed

    return isinstance(layer, Conv1D)
