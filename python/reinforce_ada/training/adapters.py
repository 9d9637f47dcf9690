"""LoRA: low-rank adapters that are trained in place of the weights, which stay as they were loaded.

    y = W x + s B (A x),   s = lora_alpha / lora_rank,   A [rank, in] and B [out, rank] in float32

Source: Hu et al. 2021, arXiv 2106.09685. The layers are peft's, and those of nn.Linear are computed by `low_rank`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reinforce_ada.config import ModelConfig, load_saved
from reinforce_ada.errors import InputError, needs, unknown_name
from reinforce_ada.files import replace_folder
from reinforce_ada.outside import GarbageError, one_line, parse_json
from reinforce_ada.training import built_in, lineage, models, run_folder
from reinforce_ada.training.language_model import HuggingFaceModel

ALL_LINEAR = "all-linear"  # all linear layers but the output head, as in peft
CONFIG, WEIGHTS = built_in.ADAPTER_CONFIG, "adapter_model.safetensors"  # peft's names of its files


class AdaptedModel(HuggingFaceModel):
    """A causal LM whose weights are frozen, with adapters in float32. `module` is the peft model around it.

    Adapters are the only parameters with a gradient, so the optimizer and the checkpoints hold nothing else.
    """

    def __init__(self, module: Any, tokenizer: Any) -> None:
        super().__init__(module, tokenizer, module.get_base_model())
        from peft.tuners.lora import LoraLayer

        # The layers with an adapter, and the names of the adapters' weights, in `causal_lm`.
        self.adapted = {name: layer for name, layer in self.causal_lm.named_modules() if isinstance(layer, LoraLayer)}
        self.names = {name for name, p in self.causal_lm.named_parameters() if p.requires_grad}

    def __str__(self) -> str:
        """Return in a line what is trained."""
        config = self.module.active_peft_config
        count = sum(p.numel() for p in self.causal_lm.parameters() if p.requires_grad)
        return f"LoRA of rank {config.r}, alpha {config.lora_alpha}, in {len(self.adapted)} layers: {count:,} weights are trained"

    @torch.no_grad()
    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights with the adapters merged into them, under the names of the model without adapters.

        Each is W + s B A in float32, rounded once into the dtype of W, from the W that was loaded: errors cannot add up over a run.
        """
        for name, tensor in self.causal_lm.state_dict().items():
            layer, _, own = name.rpartition(".base_layer.")
            if layer in self.adapted:
                yield f"{layer}.{own}", merged(self.adapted[layer]) if own == "weight" else tensor.detach()
            elif name not in self.names:
                yield name, tensor.detach()

    def save(self, folder: Path) -> None:
        """Write the adapters in peft's form, without the weights that they adapt, and the tokenizer."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        # Not `save_pretrained`, which adds a README of blanks to fill in and may ask the hub about the base model.
        tensors = get_peft_model_state_dict(self.module, save_embedding_layers=False)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
        config = copy.copy(self.module.active_peft_config)
        config.inference_mode, config.target_modules = True, sorted(config.target_modules)
        config.save_pretrained(folder)
        self.save_beside_weights(folder)


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
    device = next(model.module.parameters()).device
    # A generator of its own: the run's is left as it is, and a resumed run, which finds that in another state, draws the same.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        module = adapted(model.causal_lm, settings)
    base = model.causal_lm.name_or_path
    module.active_peft_config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    return AdaptedModel(module.eval(), model.tokenizer)


def adapted(causal_lm: Any, settings: ModelConfig) -> Any:
    """Return the peft model with new adapters around a transformers model. Raises: InputError as `add` does."""
    from peft import LoraConfig, get_peft_model

    from reinforce_ada.training import low_rank

    rank = settings.lora_rank
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if settings.lora_alpha is None else settings.lora_alpha,
        target_modules=_targets(causal_lm, settings.lora_targets),
        lora_dropout=0.0,  # ratios and rollouts must come from one function
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(causal_lm, low_rank.use(config), autocast_adapter_dtype=True)  # float32, whatever the weights are


# -------------------- folders of adapters


def base_of(folder: Path) -> str:
    """Return the path or hub id of the model that the adapters in `folder` were trained on. Raises: InputError if it is not there.

    Beside a run it is the run's, wherever that has been moved; otherwise the one that adapter_config.json names.
    """
    run = lineage.run_beside(str(folder))
    base = _named_base(folder) if run is None else load_saved(run / run_folder.CONFIG).model.model
    if run is not None and base == "tiny":
        base = str(run / "base_model")
    try:
        return models.path_of(base)
    except InputError as e:
        given = f"{folder} adapts {one_line(base)}, which is not there"
        raise InputError("model", given, "that model", f"base_model_name_or_path in {CONFIG} names it") from e


def _named_base(folder: Path) -> str:
    try:
        base = parse_json((folder / CONFIG).read_bytes())["base_model_name_or_path"]
        return str(base)
    except (OSError, GarbageError, KeyError, TypeError) as e:
        raise InputError("model", f"{folder / CONFIG} names no base model", "adapters in peft's form, such as RUN/model") from e


def load(folder: Path, dtype: str, device: torch.device) -> AdaptedModel:
    """Load the adapters in `folder` onto the model they were trained on.

    Raises: InputError when peft or that model is not there, and for adapters of another kind than `add` makes, or for another model.
    """
    needs("model", "peft")
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    from reinforce_ada.training import low_rank

    model = models.load(base_of(folder), dtype, device)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if strange := _strange(config):
            raise InputError("model", f"{folder} has {strange}", "plain LoRA adapters of linear layers")
        config.inference_mode = False  # so that the adapters can be told from the weights by their gradients
        module = get_peft_model(model.causal_lm, low_rank.use(config), autocast_adapter_dtype=True)
        found = set_peft_model_state_dict(module, load_file(folder / WEIGHTS, device=str(device)))
    except InputError:
        raise
    except Exception as e:  # a foreign library may raise anything on foreign files
        raise InputError("model", f"the adapters in {folder} do not load: {one_line(str(e), 200)}", f"those of {base_of(folder)}") from e
    adapted = AdaptedModel(module.eval(), model.tokenizer)
    head = adapted.causal_lm.get_output_embeddings()
    for name, layer in adapted.adapted.items():
        if layer is head or not _is_linear(layer.get_base_layer()):
            raise InputError("model", f"{folder} adapts {name}", "adapters of linear layers other than the output head")
    # peft ignores what it does not find: those adapters would be as new, and change nothing.
    if lost := sorted({f"base_model.model.{name}" for name in adapted.names} & set(found.missing_keys)) + list(found.unexpected_keys):
        raise InputError("model", f"{folder / WEIGHTS} does not fit: {one_line(lost[0])}", f"adapters of {model.causal_lm.name_or_path}")
    return adapted


def _strange(config: Any) -> str:
    """Return what these adapters have that W + s B A does not describe; "" if nothing."""
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return f"adapters of the kind {one_line(str(config.peft_type))}"
    others = {"use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "target_parameters": None}
    strange = [key for key, plain in others.items() if getattr(config, key, plain) != plain]
    return f"{strange[0]} = {one_line(repr(getattr(config, strange[0])))}" if strange else ""


@torch.no_grad()
def export(source: Path, target: Path | None, dtype: str) -> Path:
    """Write a whole model, the adapters in `source` merged into their base, and return its folder. transformers and vLLM load it.

    Args:
        source: a run's folder, or a folder of adapters.
        target: a folder that is absent or empty; by default `merged` in the run's folder, or beside the adapters if there is no run.
        dtype: of the weights; "auto" takes that of the run, or of the base model if there is no run.
    Raises: InputError when there are no adapters or no base model, and when it cannot be written.
    """
    from safetensors import SafetensorError

    folder = source / "model" if (source / run_folder.CONFIG).is_file() else source
    if not folder.is_dir():
        hint = "RUN/checkpoints/step-N/model has the adapters of a checkpoint"
        raise InputError("export", f"{one_line(str(folder))} is no folder", "a run that has ended, or a folder of adapters", hint)
    if not models.is_adapters(folder):
        hint = "a run of --lora-rank 0 has a whole model in RUN/model already"
        raise InputError("export", f"{one_line(str(folder))} has no {CONFIG}", "a run with LoRA adapters, or a folder of some", hint)
    run = lineage.run_beside(str(folder))
    target = (run or folder.parent).absolute() / "merged" if target is None else target
    if target.is_dir() and any(target.iterdir()):
        raise InputError("export", f"{target} is not empty", "a folder that is empty or not there yet", "--merge FOLDER names another")
    if dtype == "auto":
        dtype = "auto" if run is None else load_saved(run / run_folder.CONFIG).model.dtype
    whole = unloaded(load(folder, dtype, torch.device("cpu")))
    replace_folder(target, whole.save, where="export", failures=(SafetensorError,))
    return target


@torch.no_grad()
def unloaded(model: AdaptedModel) -> HuggingFaceModel:
    """Return the model with its adapters merged into its weights, which are changed in place: `model` must not be used any more."""
    for layer in model.adapted.values():
        layer.get_base_layer().weight.copy_(merged(layer))
    return HuggingFaceModel(model.module.unload(), model.tokenizer)


# -------------------- layers


def _targets(causal_lm: Any, named: str) -> list[str]:
    """Return the names of the layers that get adapters, as peft takes them: each stands for all layers whose path ends with it."""
    names = sorted({name.strip() for name in named.split(",")})
    head = causal_lm.get_output_embeddings()
    linear = {path: layer for path, layer in causal_lm.named_modules() if _is_linear(layer)}
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


def _is_linear(layer: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # the linear layers of GPT-2, whose weights are transposed

    return isinstance(layer, (nn.Linear, Conv1D))
