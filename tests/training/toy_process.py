"""Runs toy trainers in forked processes that kill themselves at a chosen point: `python toy_process.py`, one JSON command per line.

A command is {"out": folder, "resume": bool, "ranks": number of processes, "kill": [point, n] or null, "on_ranks": whom that concerns,
"overrides": {...}}; the answer is the exit status of each rank (-9: killed), and errors go to `out`-error-<rank>.txt.
Forked from a process that has imported everything: a run then takes a fraction of a second, not three.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from toy_training import ToyModel, beside, toy_config, toy_trainer

from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.training import distributed, run_folder
from reinforce_ada.training.learner import Learner
from reinforce_ada.training.log import RunLog
from reinforce_ada.training.optimizer import MasterAdamW
from reinforce_ada.training.trainer import Trainer


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(n: int, owner: Any, name: str, *, before: Callable[..., Any] | None = None, after: Callable[..., Any] | None = None) -> None:
    """At the n-th call of owner.name (from 1): `before` in its place, or `after` once it has returned."""
    original = getattr(owner, name)
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if before is not None and count == n:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None and count == n:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


@torch.no_grad()
def round_one_and_die(optimizer: MasterAdamW) -> None:
    name, parameter = next(iter(optimizer._parameters.items()))
    parameter.copy_(optimizer._masters[name])
    die()


def write_half_and_die(log: RunLog, record: dict[str, Any]) -> None:
    with log._path.open("a") as f:
        f.write(json.dumps(record, default=str)[:25])
    die()


def at_removal(n: int) -> None:
    """Inside the n-th removal of a whole checkpoint, one of its files being gone."""
    original = shutil.rmtree
    count = 0

    def wrapped(folder: Path, **kwargs: Any) -> None:
        nonlocal count
        count += (folder / "state.json").exists()  # clearing what a killed write may have left is no such removal
        if count == n:
            (folder / "state.json").unlink()
            die()
        original(folder, **kwargs)

    shutil.rmtree = wrapped


def fail(*_: Any) -> None:
    raise ValueError("as asked")


def stop(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def save_gradients(optimizer: MasterAdamW, *_: Any) -> None:
    """What the optimizer is about to use, of this rank."""
    found = {name: master.grad for name, master in optimizer._masters.items() if master.grad is not None}
    save_file(found, os.environ["GRADIENTS"] + f"-{os.environ.get('RANK', '0')}.safetensors")


# Points that count calls; every one of them is reached in a run of five steps that checkpoints after 2, 4 and 5.
POINTS: dict[str, Callable[[int], None]] = {
    "before a journal transaction": lambda n: at_call(n, RolloutStore, "append", before=die),
    "between the journal and the sampler": lambda n: at_call(n, RolloutStore, "append", after=die),
    "between sampling and update": lambda n: at_call(n, RolloutStore, "finish_step", after=die),
    "between two parameters": lambda n: at_call(n, MasterAdamW, "_round", before=round_one_and_die),
    "between two minibatches": lambda n: at_call(n, MasterAdamW, "step", after=die),
    "before the log": lambda n: at_call(n, RunLog, "write", before=die),
    "inside a line of the log": lambda n: at_call(n, RunLog, "write", before=write_half_and_die),
    "between log and checkpoint": lambda n: at_call(n, Trainer, "save_checkpoint", before=die),
    "inside a checkpoint": lambda n: at_call(n, ToyModel, "save", after=die),
    "before the checkpoint's rename": lambda n: at_call(n, Path, "rename", before=die),
    "after the checkpoint's rename": lambda n: at_call(n, Path, "rename", after=die),
    "inside the removal of the old one": at_removal,
    "between checkpoint and next step": lambda n: at_call(n, Trainer, "save_checkpoint", after=die),
    "inside an evaluation": lambda n: at_call(n, Trainer, "evaluate", before=die),
}


# And those of a run of several ranks.
RANK_POINTS: dict[str, Callable[[int], None]] = {
    "before the shares": lambda n: at_call(n, Learner, "_train", before=die),
    "inside the backward": lambda n: at_call(n, MasterAdamW, "accumulate", before=die),
    "raises in the backward": lambda n: at_call(n, MasterAdamW, "accumulate", before=fail),
    "raises before its logprobs": lambda n: at_call(n, Learner, "_prepare", before=fail),
    "raises in the optimizer": lambda n: at_call(n, MasterAdamW, "step", before=fail),
    "hangs in the backward": lambda n: at_call(n, MasterAdamW, "accumulate", before=stop),
    "hangs between two sums": lambda n: at_call(n, distributed.Ranks, "add_up", before=stop),
    "between two sums": lambda n: at_call(n, distributed.Ranks, "add_up", after=die),
    "between two minibatches": lambda n: at_call(n, MasterAdamW, "step", after=die),
    "saves the gradients": lambda n: at_call(n, MasterAdamW, "step", before=save_gradients),
}


def play(command: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    if command["kill"]:
        point, n = command["kill"]
        if point.startswith("hangs"):  # the other ranks notice when they have waited this long
            distributed._LONGEST_SHARE = timedelta(seconds=8)
        if rank in command["on_ranks"]:
            (POINTS | RANK_POINTS)[point](n)
    out = Path(command["out"])
    config = toy_config(out, **command["overrides"])
    with distributed.join() as ranks:
        if rank == 0:
            with run_folder.existing(out) if command["resume"] else run_folder.new(out) as folder:
                trainer = toy_trainer(config, out, resume=command["resume"], ranks=ranks)
                folder.begin(config)
                trainer.run()
        else:
            ranks.together(lambda: Learner(ToyModel(getattr(torch, config.model.dtype)), config, ranks)).follow()


def start(command: dict[str, Any], rank: int, port: int) -> int:
    """The process of a rank, as torchrun would start it."""
    child = os.fork()
    if child:
        return child
    if command["ranks"] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": command["ranks"], "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in names.items()})
    os.environ["GRADIENTS"] = command["out"] + "-gradients"
    try:
        play(command, rank)
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        beside(Path(command["out"]), f"error-{rank}").write_text(text)
        print(text, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    for name in ("rich.progress", "torch._dynamo"):  # imported on first use: once here instead of in every child
        importlib.import_module(name)
    for line in sys.stdin:
        command = json.loads(line)
        port = free_port()
        children = [start(command, rank, port) for rank in range(command["ranks"])]
        statuses = []
        for rank, child in enumerate(children):  # rank 0 notices whatever happens to the others
            if rank:
                os.kill(child, signal.SIGCONT)  # one that was stopped finds itself alone
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        print(*statuses, flush=True)


if __name__ == "__main__":
    main()
