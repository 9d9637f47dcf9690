"""Damages to what a run folder holds, by kind: what is done to a folder, and the words a person gets."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], object]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def folder(path: Path) -> None:
    """A folder where a file should be."""
    delete(path)
    path.mkdir()
    (path / "file").write_text("x")


def file(path: Path) -> None:
    """A file where a folder should be."""
    delete(path)
    path.write_text("x")


EVERY_FILE: Mapping[str, Damage] = {"cut": cut, "empty": empty, "garbage": garbage, "deleted": delete, "a folder": folder}


# -------------------- lines of the log


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(b"\n".join(change(path.read_bytes().split(b"\n"))))

    return damage


BAD_LINES: Mapping[str, bytes] = {
    "no JSON": b'{"kind": "st',
    "zero bytes": b"\0" * 50,
    "no UTF-8": b'{"kind": "\xff"}',
    "nested deeply": b"[" * 100_000 + b"]" * 100_000,
    "no object": b"[1, 2]",
    "a number": b"17",
    "no kind": b'{"step": 3}',
    "a kind that is no text": b'{"kind": ["step"]}',
    "no step": b'{"kind": "step", "loss": 1}',
    "a step that is no number": b'{"kind": "step", "step": "3"}',
    "a step of 400 digits": b'{"kind": "step", "step": 1' + b"0" * 400 + b"}",
    "a number of 5000 digits": b'{"kind": "step", "step": 3, "loss": ' + b"9" * 5000 + b"}",
    "an evaluation without k": b'{"kind": "eval", "step": 0}',
    "an evaluation of texts": b'{"kind": "eval", "step": 0, "k": 2, "avg_at_k": "x", "stderr": 0, "pass_at_k": {}}',
    "an evaluation at k x": b'{"kind": "eval", "step": 0, "k": 2, "avg_at_k": 0, "stderr": 0, "pass_at_k": {"x": 1}}',
    "a run of another kind": b'{"kind": "run", "config": [], "cap": "x"}',
    "half of a surrogate pair": b'{"kind": "step", "step": 3, "x": "\\ud800"}',
}
# Whole as far as a log goes, with values that no run writes.
ODD_LINES: Mapping[str, bytes] = {
    "a loss that is a text": b'{"kind": "step", "step": 1, "loss": "x", "signal_fraction": {}, "sampling_s": [], "num_prompts": 1'
    + b"0" * 400
    + b"}",
    "numbers without an end": b'{"kind": "step", "step": 1, "num_prompts": 1e999, "sampling_s": NaN, "training_s": "\\u0000"}',
    "a kind that nobody knows": b'{"kind": "note", "step": "x"}',
    "an evaluation of nothing": b'{"kind": "eval", "step": 0, "k": 2}',
}
LINES: Mapping[str, Damage] = {
    "one damaged line": lines(lambda them: [*them[:2], b"x", *them[2:]]),
    "every kind of damaged line": lines(lambda them: [*BAD_LINES.values(), *them[:2], *BAD_LINES.values(), *them[2:]]),
    "a last line cut short": lines(lambda them: [*them[:-2], them[-2][:20]]),
    "every line damaged": lines(lambda them: [b"x" for _ in them]),
}


# -------------------- the journal


def sql(statement: str, *values: Any) -> Damage:
    def damage(path: Path) -> None:
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(statement, values)
        connection.close()

    return damage


# -------------------- checkpoints


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Of a checkpoint whose state has no checksum to show it, as an earlier version wrote them."""

    def damage(checkpoint: Path) -> None:
        plain_state(checkpoint)
        path = checkpoint / "trainer.safetensors"
        them = load_file(path)
        change(them)
        save_file(them, path)

    return damage


def plain_state(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({name: state[name] for name in ("step", "position")}))


def some(them: dict[str, torch.Tensor], kind: str = "master/") -> str:
    return min(name for name in them if name.startswith(kind))


def set_to(kind: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def change(them: dict[str, torch.Tensor]) -> None:
        them[some(them, kind)] = value(them[some(them, kind)]).contiguous()

    return tensors(change)


TENSORS: Mapping[str, tuple[Damage, str]] = {
    "a tensor missing": (tensors(lambda them: them.pop(some(them))), "is missing"),
    "a moment missing": (tensors(lambda them: them.pop(some(them, "exp_avg/"))), "is missing"),
    "one too many": (tensors(lambda them: them.update(x=torch.ones(1))), "x is of no parameter"),
    "another shape": (set_to("master/", lambda t: t[..., :-1]), "float32, not"),
    "another dtype": (set_to("master/", lambda t: t.double()), "float64, not"),
    "moments of another shape": (set_to("exp_avg/", lambda t: t.reshape(-1)[:1]), "float32, not"),
    "moments of another dtype": (set_to("exp_avg_sq/", lambda t: t.half()), "float16, not"),
    "a count that is no scalar": (set_to("step/", lambda t: t.reshape(1)), "float32, not"),
    "NaN": (set_to("master/", lambda t: t * float("nan")), "not finite"),
    "no random state": (tensors(lambda them: them.pop("rng/torch")), "no state of torch's generator"),
    "a random state of another size": (set_to("rng/torch", lambda t: t[:10]), "no state of torch's generator"),
}


# -------------------- the cases


@dataclass(frozen=True)
class Case:
    """Something that is done to a run folder whose process was killed, and the words `train --resume` says of it."""

    what: str
    damage: Damage
    says: str
    goes_on: bool  # and ends with the weights of the undisturbed run


def at(name: str, damage: Damage) -> Damage:
    return lambda out: damage(out / name)


def both(*damages: Damage) -> Damage:
    return lambda out: [damage(out) for damage in damages]


def copied(source: Path, name: str) -> Damage:
    def damage(out: Path) -> None:
        for suffix in ("", "-wal", "-shm"):
            (out / f"{name}{suffix}").unlink(missing_ok=True)
            if (source / f"{name}{suffix}").exists():
                shutil.copy(source / f"{name}{suffix}", out / f"{name}{suffix}")

    return damage


def tree(source: Path, name: str) -> Damage:
    def damage(out: Path) -> None:
        shutil.rmtree(out / name)
        shutil.copytree(source / name, out / name)

    return damage
