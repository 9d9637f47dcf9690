"""The reference policy: the model before the first step of the run, from which a KL term keeps the trained one."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from reinforce_ada.training.batching import Batch
from reinforce_ada.training.language_model import LanguageModel, token_logprobs


class ReferencePolicy:
    """The model as it is when this is made, frozen.

    It is made before a checkpoint is loaded, so a resumed run has the same reference as the run that it continues. A model with adapters
    (peft's PeftModel) is its own reference while they are off, which takes no memory; of any other a copy is kept, in the run's dtype.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._policy = model
        self._has_adapters = hasattr(model.module, "disable_adapter")
        self._model = model if self._has_adapters else _frozen_copy(model)

    @torch.no_grad()
    def scored(self, batch: Batch, temperature: float) -> Batch:
        """Return the batch with the reference's logprobs of its completion tokens, computed in the form that the policy uses."""
        self._model.share_prompts, self._model.use_head = self._policy.share_prompts, self._policy.use_head
        module: Any = self._policy.module
        with module.disable_adapter() if self._has_adapters else nullcontext():
            return replace(batch, ref_logprobs=token_logprobs(self._model, batch, temperature))


def _frozen_copy(model: LanguageModel) -> LanguageModel:
    twin = copy.deepcopy(model)
    twin.module.requires_grad_(False)
    return twin
