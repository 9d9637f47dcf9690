"""`reinforce-ada serve`: starts vLLM servers on this machine, and restarts those that die."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import Typed, add_command, add_field
from reinforce_ada.config import ModelName
from reinforce_ada.config.serving import Serving
from reinforce_ada.outside import show

_EXAMPLES = """\
examples:
  two servers on ports 8000 and 8001, each with half of the cores
    reinforce-ada serve smollm2 --replicas 2
  four on GPUs; one over two GPUs, with further arguments for vLLM
    reinforce-ada serve Qwen/Qwen3-8B --device cuda --replicas 4 \\
      --max-model-len 8192
    reinforce-ada serve Qwen/Qwen3-32B --device cuda --tensor-parallel 2 \\
      --vllm-args "--quantization fp8"
  then, here or on another machine that sees the same folder of weights
    reinforce-ada train --engine openai \\
      --servers http://127.0.0.1:8000,http://127.0.0.1:8001
  on the machine of `train`, to reach a server on another machine
    ssh -N -L 8000:127.0.0.1:8000 HOST
  open to a network on which everyone is trusted
    reinforce-ada serve MODEL --host 10.0.0.5 --expose

The calls that load weights can run code in the server, and vLLM's key does not
protect them: anyone who reaches the port may use them. So only this machine is
served unless --expose is given. VLLM_API_KEY, set here and where `train` runs,
protects the completions.

A server that dies is started again, and loads the current weights before it
samples. Ctrl-C ends all servers.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Start vLLM servers on this machine for --engine openai, and restart those that die."
    parser = add_command(
        commands, "serve", "start vLLM servers that train can use", about, _EXAMPLES, usage="reinforce-ada serve MODEL [FLAGS]"
    )
    parser.add_argument(
        "model",
        type=Typed(ModelName | str),
        metavar="MODEL",
        help="smollm2, gemma3-270m, a model folder or a hub id; `train` must start from the same",
    )
    for name in ("replicas", "host"):
        add_field(parser, Serving, name)
    parser.add_argument("--expose", action="store_true", help="allow a --host that other machines reach; they can run code here")
    for name in ("port", "dtype", "max_model_len", "max_num_seqs", "device", "tensor_parallel", "memory_fraction", "kv_cache_mb"):
        add_field(parser, Serving, name)
    parser.add_argument("--logs", type=Path, metavar="DIR", help="the servers' output (default: serve-logs)")
    parser.add_argument("--vllm-args", default="", metavar="TEXT", help="further arguments for vLLM's server, in quotes")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from reinforce_ada.engines import serve

    known = {f.name for f in dataclasses.fields(Serving)}
    settings = {name: value for name, value in vars(given).items() if name in known and value is not None}
    settings["extra"] = serve.split_arguments(given.vllm_args)
    serve.check(Serving(**settings))
    from reinforce_ada.training import launch

    settings["model"] = launch.model_path(given.model)
    serve.serve(Serving(**settings), show)
    return 0
