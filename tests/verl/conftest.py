"""One Ray and one TransferQueue for the tests of this folder, and the configuration of a tiny run."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(VERL_USE_EXTERNAL_MODULES="verl_on_cpu", VERL_PLATFORM="cpu", VERL_ENGINE_DEVICE="cuda", HF_HUB_OFFLINE="1")
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_enable_worker_prestart="0", OMP_NUM_THREADS="1")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))

import numpy as np
import pytest
import tiny
import torch

HERE = Path(__file__).parent
Configure = Callable[..., Any]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="session")
def configure(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """Return verl's configuration with these overrides."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf
    from run import overrides

    def configured(*changes: str) -> Any:
        out = tmp_path_factory.mktemp("out")
        given = [o for o in overrides(data, out, "unused", steps=1, seed=1) if not o.startswith(("hydra.", "+ray_kwargs", "ray_kwargs"))]
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose("ppo_trainer", overrides=[*given, *changes])
        OmegaConf.resolve(config)
        return config

    return configured


@pytest.fixture(scope="session")
def queue(configure: Configure) -> Iterator[Any]:
    """Start Ray and verl's TransferQueue."""
    import ray
    import transfer_queue

    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=256 << 20)
    transfer_queue.init(configure().transfer_queue)
    yield transfer_queue
    transfer_queue.close()
    ray.shutdown()


@pytest.fixture(scope="session")
def rows_of(data: Path, configure: Configure) -> Callable[..., Any]:
    """Return rows of the training data as verl's data loader gives them: a TensorDict with an uid for each."""
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.rl_dataset import collate_fn

    config = configure()
    dataset = create_rl_dataset(config.data.train_files, config.data, tiny.tokenizer(), None, is_train=True, max_samples=-1)

    def rows(indices: range, *, step: int = 1, validate: bool = False) -> Any:
        batch = collate_fn([dataset[i] for i in indices])
        batch["uid"] = np.array([str(uuid.uuid4()) for _ in indices], dtype=object)
        given = tu.get_tensordict(batch)
        tu.assign_non_tensor_data(given, "global_steps", step)
        if validate:
            tu.assign_non_tensor_data(given, "validate", True)
        return given

    return rows
