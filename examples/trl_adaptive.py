"""Adaptive sampling in TRL's GRPOTrainer: sums of two digits, on a model of 100 000 weights that is built on the spot.

    python examples/trl_adaptive.py            # a minute on two cores
    python examples/trl_adaptive.py --plain    # TRL's own sampling, for comparison

The lines between the two rules are all that your own script needs.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from reinforce_ada.training.models import build_tiny, tiny_tokenizer

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]


def exact(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def data(pairs: list[tuple[str, str]]) -> Any:
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in pairs], "answer": [answer for _, answer in pairs]})


def model_folder(folder: Path, seed: int) -> str:
    """A model that has seen each sum a few times: it answers in form, and sometimes right."""
    tokenizer = tiny_tokenizer([prompt for prompt, _ in SUMS])
    build_tiny(folder, tokenizer, SUMS, seed=seed, num_updates=100)
    return str(folder)


def held_out_reward(trainer: Any) -> float:
    trainer.evaluate()
    return trainer.state.log_history[-1]["eval_reward"]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, and return the held-out reward before and after, the share of prompts with a signal, and the tokens generated."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="TRL's own sampling")
    parser.add_argument("--preset", default="reinforce-ada-balance")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    pairs = random.Random(given.seed).sample(SUMS, len(SUMS))
    with tempfile.TemporaryDirectory() as folder:
        model, train, held_out = model_folder(Path(folder, "model"), given.seed), data(pairs[20:]), data(pairs[:20])
        args = GRPOConfig(
            output_dir=folder, num_generations=4, per_device_train_batch_size=32, max_completion_length=4, max_steps=given.steps,
            num_generations_eval=16, per_device_eval_batch_size=80,
            learning_rate=3e-4, seed=given.seed, logging_steps=1, save_strategy="no", report_to="none", bf16=False, disable_tqdm=True,
        )  # fmt: skip
        if given.plain:
            trainer = GRPOTrainer(model=model, reward_funcs=exact, args=args, train_dataset=train, eval_dataset=held_out)
        else:
            # -------------------------------------------------------------------------------------------------
            from reinforce_ada.integrations.trl import adaptive

            trainer = adaptive(GRPOTrainer)(
                model=model,
                reward_funcs=exact,
                args=args,
                train_dataset=train,
                eval_dataset=held_out,
                adaptive=given.preset,  # a preset's name, ("name", {keyword: value}), or a Policy
            )
            # -------------------------------------------------------------------------------------------------
        before = held_out_reward(trainer)
        trainer.train()
        after = held_out_reward(trainer)
    steps = [entry for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    signal = sum(1 - entry["frac_reward_zero_std"] for entry in steps) / len(steps)
    found = {"before": before, "after": after, "signal": signal, "tokens": steps[-1]["num_tokens"]}
    print(" ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
