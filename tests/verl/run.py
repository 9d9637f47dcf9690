"""Runs verl's whole trainer on the tiny model for some steps, in a process of its own, and reports what came out.

`python run.py OUT --steps N --seed S key=value ...` puts the log, the metrics, the rows and the final weights into OUT. Arguments of the
form key=value are Hydra overrides; they come last and win over those of this file. `run()` is the same for a test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
TIME_LIMIT_S = 900


@dataclass
class Report:
    """What a run leaves.

    `metrics` has a dictionary for each call of verl's logger (one for each step, and one before them if there is a validation), `rows` has
    the training rows of each step with their input, output, gts and score, in the order of the data, and `wall_s` is the trainer's time.
    """

    metrics: list[dict[str, Any]]
    rows: list[list[dict[str, Any]]]
    weights: dict[str, torch.Tensor]
    wall_s: float


def environment(out: Path) -> dict[str, str]:
    """Return the environment of the trainer, which Ray's workers inherit."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])),
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_FILE_LOGGER_PATH": str(out / "metrics.jsonl"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Eight idle Python processes at the start are of no use.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        # A raylet gives its agents 30 s and its workers 60 s to register and ends without the former, which a busy machine exceeds.
        "RAY_agent_register_timeout_ms": "180000",
        "RAY_worker_register_timeout_seconds": "180",
        "RAY_gcs_server_port_wait_time_s": "180",
        "HYDRA_FULL_ERROR": "1",
    }


def overrides(data: Path, out: Path, ray_folder: str, *, steps: int, seed: int) -> list[str]:
    """Return the Hydra overrides of stock GRPO on the tiny model; README.md says what each is for."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        # the data and the algorithm
        f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/val.parquet",
        "data.train_batch_size=8",
        "data.max_prompt_length=16",
        "data.max_response_length=6",
        f"data.seed={seed}",
        "data.dataloader_num_workers=0",
        "algorithm.adv_estimator=grpo",
        f"reward.custom_reward_function.path={HERE}/sum_reward.py",
        "reward.num_workers=1",
        # the model and its training
        f"actor_rollout_ref.model.path={data}/model",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        f"{actor}.strategy=fsdp2",
        f"+{actor}.fsdp_config.mixed_precision={{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}}",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"{actor}.ppo_mini_batch_size=8",
        f"{actor}.ppo_micro_batch_size_per_gpu=32",
        f"{actor}.optim.lr=3e-4",
        f"{actor}.checkpoint.save_contents=[hf_model]",
        # the rollout
        f"{rollout}.name=transformers",
        f"{rollout}.n=4",
        f"{rollout}.seed={seed}",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=32",
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.agent.agent_loop_config_path={HERE}/agent_loop.yaml",
        f"{rollout}.agent.default_agent_loop=seeded_single_turn",
        # the trainer
        "trainer.device=cpu",
        "trainer.n_gpus_per_node=1",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        f"trainer.save_freq={steps}",
        f"trainer.default_local_dir={out}/checkpoints",
        f"trainer.rollout_data_dir={out}/rows",
        "trainer.resume_mode=disable",
        "trainer.logger=[console,file]",
        "trainer.v1.sampler.custom_sampler.path=pkg://verl_on_cpu_rollout",
        "trainer.v1.sampler.custom_sampler.name=OrderedReplayBuffer",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        # Ray
        "+ray_kwargs.ray_init.address=local",
        "ray_kwargs.ray_init.num_cpus=8",
        "+ray_kwargs.ray_init.num_gpus=1",
        "+ray_kwargs.ray_init.include_dashboard=False",
        f"+ray_kwargs.ray_init.object_store_memory={256 << 20}",
        f"+ray_kwargs.ray_init._temp_dir={ray_folder}",
        f"hydra.run.dir={out}/hydra",
    ]


def run(
    out: Path, *, data: Path | None = None, steps: int = 10, seed: int = 1, extra: tuple[str, ...] = (), time_limit_s: float = TIME_LIMIT_S
) -> Report:
    """Train for `steps` steps and return the report; a run that fails raises RuntimeError with the end of its log.

    `data` is a folder of tiny.py, which several runs may share; without it the run builds one in `out`.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = out / "data"
        subprocess.run([sys.executable, str(HERE / "tiny.py"), str(data)], check=True, capture_output=True)
    ray_folder = tempfile.mkdtemp(prefix="rv")  # short, because the path of a Unix socket below it has at most 107 characters
    arguments = [*overrides(data.resolve(), out, ray_folder, steps=steps, seed=seed), *extra]
    start = time.monotonic()
    try:
        with (out / "log.txt").open("w") as log:
            code = _supervise([sys.executable, "-m", "verl.trainer.main_ppo", *arguments], out, log, time_limit_s)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    if code:
        tail = "\n".join((out / "log.txt").read_text().splitlines()[-40:])
        raise RuntimeError(f"verl's trainer: exit code {code}; see {out}/log.txt\n{tail}")
    wall_s = time.monotonic() - start
    metrics = [line["data"] for line in _json_lines(out / "metrics.jsonl")]
    rows = [_json_lines(out / f"rows/{step}.jsonl") for step in range(1, steps + 1)]
    return Report(metrics, rows, load_file(out / f"checkpoints/global_step_{steps}/actor/huggingface/model.safetensors"), wall_s)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that has one on each line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _supervise(command: list[str], out: Path, log: Any, time_limit_s: float) -> int:
    """Run a command in a session of its own, so that a run over its time ends with all the processes that Ray started for it."""
    process = subprocess.Popen(command, cwd=out, env=environment(out), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(time_limit_s)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Return 16 hexadecimal digits of SHA-256 over the weights in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].float().numpy().tobytes())
    return total.hexdigest()[:16]


def main() -> None:
    """Run what the command line asks for and print a line for each step and one for the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args()
    report = run(given.out, steps=given.steps, seed=given.seed, extra=tuple(given.overrides), time_limit_s=given.time_limit_s)
    for metrics in report.metrics:
        shown = {
            name: round(metrics[key], 6)
            for name, key in {
                "step": "training/global_step",
                "reward": "critic/score/mean",
                "loss": "actor/pg_loss",
                "grad_norm": "actor/grad_norm",
                "seconds": "timing_s/step",
                "validation": "val-core/one_digit_sums/acc/mean@1",
            }.items()
            if key in metrics
        }
        print(json.dumps(shown))
    before = load_file(given.out / "data/model/model.safetensors")
    moved = max(float((report.weights[name].float() - before[name]).abs().max()) for name in before)
    print(json.dumps({"weights": digest(report.weights), "largest_change": moved, "wall_s": round(report.wall_s, 1)}))


if __name__ == "__main__":
    main()
