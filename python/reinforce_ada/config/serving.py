"""The settings of `reinforce-ada serve`, each with its range, its default and its line of `--help`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from reinforce_ada.config.values import ContextLength, Dtype, PositiveFraction, Processes, Range, Requests, option

PORTS = Range(1, 65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The settings of the servers.

    `expose` allows a host that other machines can reach. `extra` arguments are passed to vLLM's server unchanged.
    """

    model: str
    replicas: Processes = option(1, "servers, on consecutive ports")
    host: str = option("127.0.0.1", "address to listen on")
    expose: bool = False
    port: Annotated[int, PORTS] = option(8000, "port of the first server")
    dtype: Dtype = option("auto", "dtype of the weights; auto: bfloat16 if the device computes in it, else float32")
    max_model_len: ContextLength = option(512, "longest prompt + completion in tokens")
    max_num_seqs: Requests = option(128, "concurrent requests per server")
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "cuda: consecutive GPUs for each server; auto: cuda if torch finds a GPU, else cpu"
    )
    tensor_parallel: Processes = option(1, "cuda: GPUs per server")
    memory_fraction: PositiveFraction = option(0.9, "cuda: share of the GPU's memory")
    kv_cache_mb: Annotated[int, Range(1, 10**7)] = option(512, "cpu: key-value cache per server in MiB")
    logs: Path = Path("serve-logs")
    extra: Sequence[str] = ()

    def url(self, i: int) -> str:
        """Return the address of replica `i`."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port + i}"
