"""Runs toy trainers in forked processes that kill themselves at a chosen point: `python toy_process.py`, one JSON command per line.

A command is {"out": folder, "resume": bool, "kill": [point, n] or null, "overrides": {...}}; the answer is the exit status (-9: killed).
Forked from a process that has imported everything: a run then takes a fraction of a second, not three.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from toy_training import ToyModel, toy_config, toy_trainer

from reinforce_ada.rollouts import RolloutStore
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


def play(command: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if command["kill"]:
        point, n = command["kill"]
        POINTS[point](n)
    out = Path(command["out"])
    toy_trainer(toy_config(out, **command["overrides"]), out, resume=command["resume"]).run()


def main() -> None:
    for name in ("msgspec", "rich.progress", "torch._dynamo"):  # imported on first use: once here instead of in every child
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                play(json.loads(line))
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
