"""The memory that a training run will take, computed from its configuration and the shapes of its model, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from reinforce_ada.config import Config
from reinforce_ada.training.task_defaults import max_tokens_of

_BYTES = {"float32": 4, "bfloat16": 2}
_LOSS_BYTES = {"cpu": 62_000_000, "cuda": 256_000_000}  # max_extra_bytes of linear_policy_loss by default
_VLLM_CPU_CACHE = 512 << 20
# glibc keeps freed blocks of up to 32 MB in its heap until the end of the pass (heap.py), between activations and gradients of all sizes:
# .34 to .44 of what all layers would keep, .48 to .60 where layers are checkpointed. Measured with SmolLM2 in float32, with and without
# adapters, in passes of 1024 and 2048 tokens, beside MALLOC_MMAP_THRESHOLD_=262144, under which nothing freed is kept
# (benchmarks/trainer_memory.py).
_HEAP_SHARE, _HEAP_SHARE_CHECKPOINTED = 0.42, 0.55
KEPT_BY_HEAP = "freed but kept by the heap"
_GB = 1e9


class Shapes(NamedTuple):
    """What the memory of a decoder depends on; a size that a configuration does not have is 0."""

    num_weights: int
    num_trained: int  # weights with a gradient
    head_weights: int  # of the output projection, V * D
    num_layers: int = 0
    width: int = 0  # D, of a state
    query_width: int = 0  # heads * head size
    key_width: int = 0  # key-value heads * head size
    mlp_width: int = 0

    @classmethod
    def of(cls, module: Any) -> Shapes:
        """Return the shapes of a transformers model, also one on the meta device; of any other module, the numbers of its weights."""
        parameters = list(module.parameters())
        counts = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        if not hasattr(module, "config"):
            return cls(*counts, head_weights=0)
        c = module.config.get_text_config()
        width, heads = _size(c, "hidden_size"), _size(c, "num_attention_heads")
        head = _size(c, "head_dim") or width // max(heads, 1)
        keys = head * (_size(c, "num_key_value_heads") or heads)
        mlp = _size(c, "intermediate_size", "ffn_dim") or 4 * width
        return cls(*counts, _size(c, "vocab_size") * width, _size(c, "num_hidden_layers"), width, head * heads, keys, mlp)

    def adapter_weights(self, rank: int) -> int:
        """Return the number of weights in adapters of all linear layers: rank * (in + out) each."""
        attention = 2 * (self.width + self.query_width) + 2 * (self.width + self.key_width)
        return rank * self.num_layers * (attention + 3 * (self.width + self.mlp_width))

    def layer_bytes(self, dtype: str) -> int:
        """Return what a layer of Llama's kind keeps of a token for its backward.

        These are the residual stream before each of two norms, what each norm divides and multiplies, query, keys, values and result of
        attention, and four states of a gated MLP. In bfloat16 a norm keeps its input in float32 instead.
        """
        states = 6 * self.width + 2 * self.query_width + 2 * self.key_width + 4 * self.mlp_width
        return states * _BYTES[dtype] + (2 * (4 - _BYTES[dtype]) * self.width)


def _size(config: Any, *names: str) -> int:
    """Return the first size that a configuration has under these names, the largest where layers differ; 0 if it has none."""
    for name in names:
        value = getattr(config, name, None)
        sizes = value if isinstance(value, (list, tuple)) else [value]
        if found := [size for size in sizes if type(size) is int]:
            return max(found)
    return 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by part: those of the trainer, which are all there in a backward pass, and those of an engine in its process or on its GPU."""

    trainer: Mapping[str, int]
    engine: Mapping[str, int]

    @property
    def total(self) -> int:
        """Return the bytes of the trainer."""
        return sum(self.trainer.values())

    def line(self) -> str:
        """Return the estimate as one line."""
        parts = " · ".join(f"{name} {size / _GB:.2f}" for name, size in self.trainer.items() if size)
        engine = "".join(f"; {name} {size / _GB:.2f} GB" for name, size in self.engine.items() if size)
        return f"memory: the trainer takes about {self.total / _GB:.2f} GB ({parts}){engine}"


def estimate(shapes: Shapes, config: Config, device: str, *, engine: str = "", gpu_bytes: int = 0) -> Estimate:
    """Return the estimate for a run whose passes are full and more than one per minibatch, as they are in large runs.

    Args:
        device: "cpu" or "cuda".
        engine: name of the engine, whose memory is left out if there is none.
        gpu_bytes: memory of the GPU.
    """
    t, dtype = config.training, config.model.dtype
    b, trained = _BYTES[dtype], shapes.num_trained
    heap_share = _HEAP_SHARE_CHECKPOINTED if t.gradient_checkpointing else _HEAP_SHARE
    has_adapters = config.model.lora_rank > 0  # which are float32, and the reference of a KL is the model without them
    is_float32 = dtype == "float32" or has_adapters
    trainer = {
        "weights": b * (shapes.num_weights - trained) + 4 * trained if has_adapters else b * shapes.num_weights,
        "float32 masters": 0 if is_float32 else 4 * trained,
        "gradients": 4 * trained if is_float32 else (4 + b) * trained,  # of all passes in float32, and of one in its own dtype
        "moments": 2 * _BYTES[t.moments] * trained,
        "reference": b * shapes.num_weights if t.kl_coef and not has_adapters else 0,
        "activations": _activations(shapes, config, t.gradient_checkpointing),
        # The gradient of the head is made beside the one it is added to.
        "loss": _LOSS_BYTES[device] + (0 if has_adapters else b * shapes.head_weights),
        KEPT_BY_HEAP: int(heap_share * _activations(shapes, config, False)) if device == "cpu" else 0,
    }
    return Estimate(trainer, _engine(shapes, config, device, engine, gpu_bytes))


def _activations(shapes: Shapes, config: Config, is_checkpointed: bool) -> int:
    """Return the bytes of a pass of `tokens_per_pass` tokens, with the attention mask of its longest rows."""
    t, b = config.training, _BYTES[config.model.dtype]
    layer = shapes.layer_bytes(config.model.dtype)
    kept = shapes.num_layers * (b * shapes.width if is_checkpointed else layer)
    working = (layer if is_checkpointed else 0) + b * 3 * shapes.mlp_width  # one layer's, and the gradients inside it
    row = min(t.tokens_per_pass, config.engine.max_model_len + 3 * max_tokens_of(config))
    return t.tokens_per_pass * (kept + working + (b * row if shapes.num_layers else 0))


def _engine(shapes: Shapes, config: Config, device: str, engine: str, gpu_bytes: int) -> dict[str, int]:
    b, e = _BYTES[config.model.dtype], config.engine
    if engine == "transformers":
        cache = e.max_num_seqs * e.max_model_len * shapes.num_layers * 2 * shapes.key_width * b
        return {"the engine's cache takes, while it samples, up to": cache}
    if engine == "vllm" and device == "cuda":
        freed = ", which it frees while the model trains," if e.sleep else ""
        return {f"vLLM{freed} takes": int(e.memory_fraction * gpu_bytes)}
    return {"vLLM takes": b * shapes.num_weights + _VLLM_CPU_CACHE} if engine == "vllm" else {}
