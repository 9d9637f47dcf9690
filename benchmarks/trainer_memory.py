"""The peak of a trainer's resident memory beside the estimate that `train` prints: python benchmarks/trainer_memory.py --lora-rank 16

Two optimizer steps of two full passes each over random tokens, with no engine. Flags are those of `reinforce-ada train`. Prints one JSON
object: `estimate_gb`, `peak_gb` (over what the imports take) and their ratio.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator

from reinforce_ada import config as configuration
from reinforce_ada.config import Config
from reinforce_ada.training import adapters, memory_estimate, models
from reinforce_ada.training.batching import Sample
from reinforce_ada.training.distributed import Ranks
from reinforce_ada.training.learner import Learner, Minibatch
from reinforce_ada.types import Completion, CompletionId, Prompt

ROW, WRITTEN = 256, 64  # tokens of a completion with its prompt, and of the completion


def memory(field: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def minibatch(config: Config, vocabulary: int, random: Generator) -> Minibatch:
    """Return samples of distinct prompts that fill two passes."""
    samples = []
    for i in range(2 * config.training.tokens_per_pass // ROW):
        ids = random.integers(0, vocabulary, ROW, dtype=np.int32)
        prompt = Prompt(str(i), tuple(ids[:-WRITTEN].tolist()))
        logprobs = np.zeros(WRITTEN, np.float32)
        completion = Completion(CompletionId(0, str(i), 0), ids[-WRITTEN:], logprobs, "", "stop", 0)
        samples.append(Sample(prompt, completion, float(random.standard_normal())))
    return Minibatch(samples, len(samples) * WRITTEN, float(len(samples)))


def measured(config: Config) -> dict[str, float]:
    import peft  # noqa: F401  # what the imports take is no part of the estimate

    random, before = np.random.default_rng(0), memory("VmRSS")
    model = models.load(models.path_of(config.model.model), config.model.dtype, torch.device("cpu"))
    if config.model.lora_rank:
        model = adapters.add(model, config.model, seed=0)
    estimate = memory_estimate.estimate(memory_estimate.Shapes.of(model.module), config, "cpu").total
    learner = Learner(model, config, Ranks())
    for _ in range(2):
        learner.update([minibatch(config, model.head().weight.shape[0], random)], 1e-5, lambda count: None)
    peak = memory("VmHWM") - before
    return {"estimate_gb": round(estimate / 1e9, 2), "peak_gb": round(peak / 1e9, 2), "estimate_over_peak": round(estimate / peak, 3)}


if __name__ == "__main__":
    given = sys.argv[1:]
    overrides = {flag.removeprefix("--").replace("-", "_"): value for flag, value in zip(given[::2], given[1::2], strict=True)}
    print(json.dumps({"flags": " ".join(given), **measured(configuration.load(None, overrides))}))
