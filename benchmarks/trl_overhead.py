"""Times a step of TRL's trainer with adaptive sampling and preset grpo beside a step of TRL alone: `python benchmarks/trl_overhead.py`.

With this preset both generate and train the same completions, so the ratio is what the sampler, the playback and the logs cost. The two
trainers live in one process and take turns, each step from the same random state on the same prompts and without an update in between;
every pair of steps is checked to have had the same completions and advantages. A step is generation, rewards, loss and backward pass.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from transformers import PrinterCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from reinforce_ada.integrations.trl import adaptive
from reinforce_ada.training.models import build_tiny, tiny_tokenizer

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
ROWS = 32


def is_even(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """About half of all completions are right, whatever the model."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


class Step:
    """A trainer whose steps can be repeated."""

    def __init__(self, cls: Any, model: str, num_tokens: int, folder: Path, **options: Any) -> None:
        args = GRPOConfig(
            output_dir=str(folder), num_generations=8, per_device_train_batch_size=ROWS, max_completion_length=num_tokens, max_steps=1,
            generation_kwargs={"min_new_tokens": num_tokens}, learning_rate=0.0, scale_rewards="none", use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            dataloader_pin_memory=False, seed=0,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": [prompt for prompt, _ in SUMS]})
        self.trainer = cls(model=model, reward_funcs=is_even, train_dataset=data, args=args, **options)
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.train()
        self.rows = next(iter(self.trainer.get_train_dataloader()))

    def seconds(self) -> float:
        """Return how long one step takes."""
        trainer = self.trainer
        torch.manual_seed(0)
        trainer._buffered_inputs = None  # TRL then generates anew
        began = time.perf_counter()
        trainer.training_step(trainer.model_wrapped, self.rows, None)
        seconds = time.perf_counter() - began
        trainer.model.zero_grad()
        return seconds

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the latest step trained on: token ids and advantages."""
        (batch,) = self.trainer._buffered_inputs
        return batch["completion_ids"], batch["advantages"]


def tiny(folder: Path) -> str:
    """Return a model of 100 000 weights that is made here."""
    build_tiny(folder, tiny_tokenizer([prompt for prompt, _ in SUMS]), SUMS, seed=0, num_updates=20)
    return str(folder)


def main() -> int:
    """Print the ratio of the two; return 1 if it is above the limit, otherwise 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a model (default: one of 100 000 weights, made on the spot)")
    parser.add_argument("--tokens", type=int, default=128, help="of each completion (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--limit", type=float, default=1.03, help="of the median ratio (default: %(default)s)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if not args.model:
        torch.set_num_threads(1)  # waking a second thread takes longer than the small model's products
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or tiny(folder / "model")
        plain = Step(GRPOTrainer, model, args.tokens, folder / "plain")
        guest = Step(adaptive(GRPOTrainer), model, args.tokens, folder / "guest", adaptive=("grpo", {"scale": "none"}))
        guest.rows = plain.rows
        turns = []
        for turn in range(args.turns + 2):
            first, second = (plain, guest) if turn % 2 else (guest, plain)
            taken = {first: first.seconds(), second: second.seconds()}
            if not all(map(torch.equal, plain.batch(), guest.batch())):
                raise SystemExit("the two steps differ in their completions or advantages")
            if turn >= 2:  # the first ones warm up
                turns.append((taken[plain], taken[guest]))
    low, ratio, high = statistics.quantiles([b / a for a, b in turns], n=4)
    alone, with_us = (1e3 * statistics.median(side) for side in zip(*turns, strict=True))
    print(f"TRL {alone:.1f} ms a step, with adaptive sampling {with_us:.1f} ms: ratio {ratio:.3f} [{low:.3f}, {high:.3f}]")
    return int(ratio > args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
