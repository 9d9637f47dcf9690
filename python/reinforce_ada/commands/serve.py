"""`reinforce-ada serve`: starts vLLM servers on this machine, and restarts those that die."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from reinforce_ada.commands.flags import add_command
from reinforce_ada.outside import show

_EXAMPLES = """\
examples:
  reinforce-ada serve smollm2 --replicas 2                 two servers on ports 8000 and 8001, each with half of the cores
  reinforce-ada serve Qwen/Qwen3-8B --device cuda --replicas 4 --max-model-len 8192
  reinforce-ada serve Qwen/Qwen3-32B --device cuda --tensor-parallel 2 --vllm-args "--quantization fp8"
  ssh -N -L 8000:127.0.0.1:8000 HOST                       on the machine of `train`, to reach a server on another machine
  reinforce-ada serve MODEL --host 10.0.0.5 --expose       open to a network on which everyone is trusted

The calls that load weights can run code in the server, and vLLM's key does not protect them: anyone who reaches the port may use them. So
only this machine is served unless --expose is given. VLLM_API_KEY, set here and where `train` runs, protects the completions.

Then, here or on another machine that sees the same folder of weights:
  reinforce-ada train --engine openai --servers http://127.0.0.1:8000,http://127.0.0.1:8001
A server that dies is started again, and loads the current weights before it samples. Ctrl-C ends all servers.
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Start vLLM servers on this machine for --engine openai, and restart those that die."
    parser = add_command(commands, "serve", about, _EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="smollm2, gemma3-270m, a model folder or a hub id; `train` must start from the same")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="servers, on consecutive ports (default: 1)")
    parser.add_argument("--host", default="127.0.0.1", metavar="NAME", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--expose", action="store_true", help="allow a --host that other machines reach; they can run code here")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port of the first server (default: 8000)")
    shown = "dtype of the weights; auto: bfloat16 if the device computes in it, else float32 (default: auto)"
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=shown)
    parser.add_argument("--max-model-len", type=int, default=512, metavar="N", help="longest prompt + completion in tokens (default: 512)")
    parser.add_argument("--max-num-seqs", type=int, default=128, metavar="N", help="concurrent requests per server (default: 128)")
    shown = "cuda: consecutive GPUs for each server; auto: cuda if there is a device that torch can use, else cpu (default: auto)"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=shown)
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="cuda: GPUs per server (default: 1)")
    parser.add_argument("--memory-fraction", type=float, default=0.9, metavar="X", help="cuda: share of the GPU's memory (default: 0.9)")
    parser.add_argument("--kv-cache-mb", type=int, default=512, metavar="N", help="cpu: key-value cache per server (default: 512)")
    parser.add_argument("--logs", type=Path, default=Path("serve-logs"), metavar="DIR", help="the servers' output (default: serve-logs)")
    parser.add_argument("--vllm-args", default="", metavar="TEXT", help="further arguments for vLLM's server")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from reinforce_ada.engines import serve

    settings = {k: v for k, v in vars(given).items() if k in {f.name for f in dataclasses.fields(serve.Serving)}}
    settings["extra"] = serve.split_arguments(given.vllm_args)
    serve.check(serve.Serving(**settings))
    from reinforce_ada.training import launch

    settings["model"] = launch.model_path(given.model)
    serve.serve(serve.Serving(**settings), show)
    return 0
