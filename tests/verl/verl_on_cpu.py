"""A CPU platform for verl and the registration of a rollout that generates with transformers.

verl imports this module in every process that imports verl, because VERL_USE_EXTERNAL_MODULES names it: in the driver, in the TaskRunner
and in all of Ray's workers, which inherit the environment of the driver. VERL_PLATFORM=cpu then selects the platform, and
VERL_ENGINE_DEVICE=cuda selects the FSDP engine that verl registers for CUDA; that engine only uses what the platform gives it, so it runs
on a CPU unchanged.

The rollout itself is in verl_on_cpu_rollout.py, which is imported by the processes that need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

ROLLOUT = "transformers"  # the value of actor_rollout_ref.rollout.name
MEMORY_BYTES = 8 << 30  # what the platform claims to have, all of it free; verl only logs it


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing: memory pools, device queues and device seeds do not exist on a CPU."""


def _zero(*_: Any, **__: Any) -> int:
    """Return 0, the memory that a CPU's allocator is said to hold."""
    return 0


def _device_module() -> ModuleType:
    """Return `torch.cpu` with the functions of `torch.cuda` that verl calls on the path of FSDP and on that of checkpoints."""
    module = ModuleType("verl_cpu_device", "torch.cpu with the functions of torch.cuda that verl calls.")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in ("Event", "Stream", "current_stream", "stream", "synchronize")})
    for name in ("empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "reset_peak_memory_stats", "set_device"):
        setattr(module, name, _nothing)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, _zero)
    module.__dict__.update(
        is_available=lambda: False,  # verl then leaves out what only frees the memory of a device
        device_count=lambda: 1,
        current_device=lambda: "cpu",
        get_device_name=lambda *_: "cpu",
        mem_get_info=lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
    )
    return module


_DEVICE = _device_module()


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One CPU, which stands where verl expects one GPU."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE

    def is_available(self) -> bool:
        """Return True: there is always a CPU."""
        return True

    def current_device(self) -> str:
        """Return "cpu", since verl passes this value to `Tensor.to`; an index would mean an accelerator."""
        return "cpu"

    def device_count(self) -> int:
        """Return 1, the number of workers of an FSDP group."""
        return 1

    def set_device(self, device_index: int) -> None:
        """Do nothing: there is one device."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Do nothing: a CPU has no queue."""

    def manual_seed(self, seed: int) -> None:
        """Seed torch's generator."""
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed torch's generator."""
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """Do nothing: the settings are those of a GPU's allocator."""

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        """Return that the device has no compute capability."""
        return (None, None)

    def communication_backend_name(self) -> str:
        """Return gloo, torch's collectives for CPUs."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Return the variable that Ray sets for the made-up GPU."""
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """Mark nothing."""
        yield

    def profiler_start(self) -> None:
        """Do nothing: there is no device profiler."""

    def profiler_stop(self) -> None:
        """Do nothing: there is no device profiler."""

    def ray_resource_name(self) -> str:
        """Return the resource of a worker, which `ray.init(num_gpus=1)` makes up."""
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Return no variable: Ray may hide devices that do not exist."""
        return []

    def is_ipc_supported(self) -> bool:
        """Return False: tensors of a CPU need no handles of a device."""
        return False

    def cudart(self) -> None:
        """Return None: there is no CUDA runtime."""


def _name_one_backend() -> None:
    """Give the process group the backend "cpu:gloo" by default.

    verl 0.9.1 joins "cpu:gloo" and the platform's device and backend (initialize_global_process_group_ray in verl/utils/distributed.py),
    which is "cpu:gloo,cpu:gloo" here, and torch refuses a device that is named twice. The function takes the string as an argument, but
    its caller does not pass it. This has to happen before verl.workers.engine_workers is imported, because that module imports the
    function by name.
    """
    from verl.utils import distributed

    distributed.initialize_global_process_group_ray = partial(distributed.initialize_global_process_group_ray, backend="cpu:gloo")


def _replica_class() -> type:
    """Import the replica when the trainer asks for it, since it imports transformers."""
    from verl_on_cpu_rollout import TransformersReplica

    return TransformersReplica


def _register_rollout() -> None:
    """Make `actor_rollout_ref.rollout.name=transformers` known: the replica by the public registry, the adapter in verl's table."""
    from verl.workers.rollout import base, replica

    replica.RolloutReplicaRegistry.register(ROLLOUT, _replica_class)
    # This table has no function that registers; verl 0.9.1 looks the name up in it.
    base._ROLLOUT_REGISTRY[ROLLOUT, "async"] = "verl_on_cpu_rollout.ServerAdapter"


_name_one_backend()
_register_rollout()
