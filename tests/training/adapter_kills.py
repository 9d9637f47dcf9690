"""A run that trains LoRA adapters is killed with SIGKILL at random moments, and resumed: `python adapter_kills.py [NUMBER]`.

All of it is the product's, with the tiny Llama: model, engine, rewards, journal, checkpoints. The run must end in the adapters, to the bit,
and the pools of the one that nobody disturbed. Writes benchmarks/adapter_kills.json.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from toy_runs import pools

from reinforce_ada import config as configuration
from reinforce_ada.training import adapters, launch, models
from reinforce_ada.training.log import read_log

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "adapter_kills.json"
SEED, STEPS, KILLS_OF_A_RUN = 0, 8, 5


def settings(folder: Path, out: Path) -> dict[str, Any]:
    return {
        "model": str(folder / "llama"), "dtype": "float32", "engine": "transformers", "task": str(folder / "task.jsonl"), "lora_rank": 4,
        "steps": STEPS, "prompts_per_step": 4, "eval_prompts": 4, "eval_k": 2, "max_tokens": 4, "max_model_len": 128,
        "learning_rate": 3e-2, "checkpoint_every": 2, "minibatches": 2, "out": str(out),
    }  # fmt: skip


def prepare(folder: Path) -> None:
    questions = [f"{a} + {b} =" for a in range(5) for b in range(5)]
    models.build_tiny(folder / "llama", models.tiny_tokenizer(questions), [(q, "3") for q in questions], seed=0, num_updates=30)
    (folder / "task.jsonl").write_text("\n".join(json.dumps({"prompt": q, "answer": "3"}) for q in questions))


def start(folder: Path, out: Path) -> int:
    """A process that begins the run, or resumes it. Forked, because this one has imported everything."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with suppress(BaseException):
        output = os.open(output_of(out), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        has_begun = (out / "config.toml").is_file()
        config = configuration.load_saved(out / "config.toml") if has_begun else configuration.load(None, settings(folder, out))
        launch.train(config, out if has_begun else None)
        os._exit(0)
    os._exit(1)


def output_of(out: Path) -> Path:
    return Path(f"{out}-output.txt")


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(folder: Path, out: Path) -> float:
    """Run to the end; the seconds that it took."""
    began = time.monotonic()
    assert ended(start(folder, out)) == 0, output_of(out).read_text()[-3000:]
    return time.monotonic() - began


def killed(folder: Path, out: Path, said: str, after_s: float) -> bool:
    """Run until it has said this, and for so long; then kill. False when it was over before."""
    skip = len(output_of(out).read_text()) if output_of(out).exists() else 0
    child = start(folder, out)
    while not (output_of(out).exists() and said in output_of(out).read_text()[skip:]):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, output_of(out).read_text()[-3000:]
            return False
        time.sleep(0.01)
    time.sleep(after_s)
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def steps_of(out: Path) -> int:
    log = out / "log.jsonl"
    return max((r["step"] for r in read_log(log) if r["kind"] == "step"), default=0) if log.is_file() else 0


def same(a: Path, b: Path) -> bool:
    left, right = (load_file(out / "model" / adapters.WEIGHTS) for out in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left) and pools(a) == pools(b)


def main(count: int) -> int:
    draw = random.Random(SEED)
    kills: list[dict[str, Any]] = []
    runs = like = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        undisturbed = folder / "undisturbed"
        usual_s = whole(folder, undisturbed)
        while len(kills) < count:
            out = folder / f"run-{runs}"
            runs += 1
            for k in range(KILLS_OF_A_RUN):
                # In turns after the check of the model, with which every start begins, and after a step.
                said, after_s = ("a row per prompt", " · training ")[k % 2], draw.uniform(0, usual_s / 10)
                if not killed(folder, out, said, after_s):
                    break
                kills.append({"after": said.strip(" ·"), "after_s": round(after_s, 2), "step": steps_of(out)})
            whole(folder, out)
            like += same(out, undisturbed)
            print(f"{len(kills)} kills, {like} of {runs} runs ended as the undisturbed one", flush=True)
    facts = {"runs": runs, "runs_with_the_same_pools_and_adapters": like, "kills": kills}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if like == runs else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10))
