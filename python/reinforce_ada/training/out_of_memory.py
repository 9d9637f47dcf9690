"""What a user reads when memory runs out: one line with the sizes, and the settings that would help most."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reinforce_ada.config import Config
from reinforce_ada.errors import InputError
from reinforce_ada.training.memory_estimate import Estimate, Shapes, estimate

_NUM_REMEDIES = 3
_RANK = 16  # of the adapters that are proposed


def is_out_of_memory(e: BaseException) -> bool:
    """Return whether an allocation has failed: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(e, RuntimeError) and "allocate memory" in str(e)  # "DefaultCPUAllocator: can't allocate memory: you tried to ..."


@contextmanager
def told(what: str, module: Any, config: Config, device: torch.device) -> Iterator[None]:
    """Raise InputError in the place of a failed allocation, with what the run takes and what would help. Other errors pass.

    Args:
        what: the work within, such as "a training pass".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        run = estimate(Shapes.of(module), config, device.type)
        hint = f"what is scored is kept: {'; '.join(remedies(module, config, device, run))}"
        raise InputError("memory", f"{what} does not fit{_asked_for(e)}; {run.line()}", "less memory", hint) from e


def _asked_for(e: BaseException) -> str:
    """Return what the allocator was asked for, in words; "" if it does not say."""
    found = re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", str(e), re.IGNORECASE)
    if found is None:
        return ""
    size = f"{float(found[1]) / 1e9:.2f} GB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f" (another {size} could not be had)"


def remedies(module: Any, config: Config, device: torch.device, now: Estimate) -> list[str]:
    """Return the settings that save most, at most three: first those that a resumed run may change.

    The moments are not free on resume: a checkpoint stores them in their dtype, and rounding them changes what is learned.
    """
    t, shapes = config.training, Shapes.of(module)

    def saved(**changes: Any) -> int:
        other = dataclasses.replace(config, training=dataclasses.replace(t, **changes))
        return now.total - estimate(shapes, other, device.type).total

    half = max(1, t.tokens_per_pass // 2)
    free = {f"--tokens-per-pass {half}": saved(tokens_per_pass=half)} if half < t.tokens_per_pass else {}
    if not t.gradient_checkpointing and hasattr(module, "config"):
        free["--gradient-checkpointing true"] = saved(gradient_checkpointing=True)
    if device.type == "cuda" and config.engine.engine in ("auto", "vllm") and not config.engine.sleep:
        total = torch.cuda.get_device_properties(device).total_memory
        free[f"--memory-fraction {config.engine.memory_fraction / 2:g}"] = int(config.engine.memory_fraction / 2 * total)
    new = {"--moments bfloat16": saved(moments="bfloat16")} if t.moments == "float32" else {}
    if not config.model.lora_rank and shapes.num_layers:
        adapted = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=_RANK))
        some = shapes._replace(num_trained=shapes.adapter_weights(_RANK))
        new[f"--lora-rank {_RANK}"] = now.total - estimate(some, adapted, device.type).total
    chosen = sorted([*free.items(), *new.items()], key=lambda item: -item[1])[:_NUM_REMEDIES]
    resumed, started = ([f"{flag} ({size / 1e9:.2f} GB less)" for flag, size in chosen if flag in kind] for kind in (free, new))
    return [f"{how} {' or '.join(flags)}" for how, flags in (("resume with", resumed), ("begin a new run with", started)) if flags]
