"""Evaluate a model as the command line names it: model, tasks, engine and rewards, in the order that fails fastest."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from reinforce_ada.config import Config
from reinforce_ada.errors import InputError
from reinforce_ada.sampling import configured
from reinforce_ada.training import distributed, lineage, models
from reinforce_ada.training.display import Display
from reinforce_ada.training.evaluate import Evaluation, evaluate
from reinforce_ada.training.launch import (
    longest_prompt,
    make_engine,
    make_rewards,
    pick_device,
    pick_engine,
    precision_of,
    quiet_libraries,
    with_dtype,
)
from reinforce_ada.training.tasks import load_records, render


def evaluate_model(config: Config, model_name: str) -> Evaluation:
    """Return Avg@k and pass@k of any model on the held-out prompts of the configured task."""
    if distributed.world_size() > 1:
        raise InputError("eval", f"WORLD_SIZE={distributed.world_size()}", "one process: only train works with several", "no torchrun")
    quiet_libraries(model_name)
    display = Display(stderr=True)
    policy, engine_name, device = configured(config.sampling), pick_engine(config.engine.engine), pick_device(config.model.device)
    precision = precision_of(config.model.dtype, device)
    config = with_dtype(config, device)
    if model_name == "tiny":
        raise InputError("eval", "the model 'tiny'", "a model folder", "train --model tiny writes one")
    records = load_records(config.task, config.run.seed, config.run.data_seed)
    if not records.held_out:
        raise InputError("eval", "no held-out prompts", "at least one", "raise --eval-prompts")
    path = models.path_of(model_name)
    records, left_out = lineage.without_trained(records, path)
    with ExitStack() as stack:
        rewards = stack.enter_context(make_rewards(config, records))
        model = models.load(path, config.model.dtype, device)
        task = render(records, config.task, model.tokenizer, longest=longest_prompt(config))
        for note in filter(None, (*task.notes, left_out)):
            display.line(note)
        scratch = Path(stack.enter_context(_scratch(config.engine.weights_dir)))
        display.line(f"model {model_name} ({precision})")
        engine = stack.enter_context(make_engine(engine_name, config, path, model, device, scratch, display))
        engine.sync_weights(model.named_tensors(), 0)
        with display.sampling("held-out") as on_progress:
            return evaluate(
                engine, rewards, task.held_out, k=config.task.eval_k, seed=config.run.seed, policy_version=0,
                positive_threshold=policy.positive_threshold, request_timeout_s=config.engine.request_timeout_s or None,
                on_progress=on_progress,
            )  # fmt: skip


@contextmanager
def _scratch(weights_dir: str) -> Iterator[str]:
    """Yield a folder for the weights of an evaluation, inside the one that servers can read."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="eval-", dir=weights_dir or None)
    except OSError as e:
        raise InputError("engine", f"cannot write weights to {weights_dir}: {e.strerror}", "a writable folder", "--weights-dir") from e
    with folder as scratch:
        os.chmod(scratch, 0o755)
        yield scratch
