"""Real vLLM servers under `reinforce-ada serve`, a step to sample from them, and SIGKILL in the middle of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_scenes import make_prompts, mislead
from scripted_servers import answers, free_port

from reinforce_ada.driver import run
from reinforce_ada.engines.fleet import State
from reinforce_ada.engines.openai import HttpEngine
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.training import models
from reinforce_ada.types import Prompt, SamplingResult

MAX_MODEL_LEN, STEP_MAX_TOKENS = 128, 48
START_S = 240.0  # a server imports and starts in 20 s on two quiet cores
PARTS = ("server", "engine core", "whole group")  # what of a replica may be killed


def build_model(folder: Path) -> str:
    texts = [f"{a} + {b} =" for a in range(5) for b in range(5)]
    models.build_tiny(folder, models.tiny_tokenizer(texts), [(t, "3") for t in texts], seed=0, num_updates=2)
    mislead(folder)
    return str(folder)


@dataclass(frozen=True)
class Serving:
    """The command that runs, and its servers."""

    process: subprocess.Popen[bytes]
    ports: Sequence[int]
    log: Path

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def wait_until_all_answer(self) -> None:
        deadline = time.monotonic() + START_S
        while not all(answers(url) for url in self.urls):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def kill(self, i: int, part: str) -> None:
        """SIGKILL to server `i`, or to the process in it that computes, or to both with all they have started."""
        server = next(pid for pid in _children(self.process.pid) if str(self.ports[i]) in _words(pid))
        if part == "whole group":
            os.killpg(server, signal.SIGKILL)
        elif part == "server":
            os.kill(server, signal.SIGKILL)
        else:
            os.kill(next(pid for pid in _children(server) if "EngineCore" in " ".join(_words(pid))), signal.SIGKILL)


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(folder.name))
    return found


@contextmanager
def serving(model: str, folder: Path, replicas: int = 2) -> Iterator[Serving]:
    """Servers that answer; at the end they are gone."""
    port = free_port()
    while any(answers(f"http://127.0.0.1:{port + i}") for i in range(1, replicas)):
        port = free_port()
    options = f"--replicas {replicas} --port {port} --dtype float32 --max-model-len {MAX_MODEL_LEN} --max-num-seqs 16 --kv-cache-mb 64"
    command = [sys.executable, "-m", "reinforce_ada", "serve", model, *options.split(), "--logs", str(folder / "logs")]
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        servers = Serving(process, range(port, port + replicas), log)
        servers.wait_until_all_answer()
        yield servers
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def engine_of(servers: Serving, weights_folder: Path, **options: Any) -> Iterator[HttpEngine]:
    settings = {
        "max_tokens": STEP_MAX_TOKENS,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 16,
        "hung_after_s": 20.0,
        "vocab_size": 384,
        **options,
    }
    with closing(HttpEngine(servers.urls, weights_folder, **settings)) as engine:
        yield engine


def wait_until_ready(engine: HttpEngine) -> None:
    """All replicas are up and have the weights."""
    deadline = time.monotonic() + START_S
    while not all(m.state is State.ready for m in engine.members):
        assert time.monotonic() < deadline, [(m.state, m.reason) for m in engine.members]
        assert engine.poll() == []


# -------------------- one step


def reward(prompt: Prompt, text: str) -> float:
    """A hash of the text, at another rate for each prompt: some prompts need many completions, some few."""
    return float(zlib.crc32(f"{prompt.prompt_id} {text}".encode()) % (2 + 3 * int(prompt.prompt_id[1:])) == 0)


def fresh(version: int) -> AdaptiveSampler:
    return AdaptiveSampler(make_prompts(), preset("reinforce-ada-balance"), step=version, policy_version=version)


def pools(result: SamplingResult) -> list[list[tuple[int, list[int], float]]]:
    """Index, tokens and reward of every completion."""
    return [[(s.id.index, s.completion.token_ids.tolist(), s.reward) for s in pool.scored] for pool in result.pools]


@dataclass(frozen=True)
class Kill:
    """One SIGKILL in the middle of a step, and what came of it."""

    replica: int
    part: str
    after_s: float
    committed_before: int
    committed: int
    moved: int
    late: int
    same_pools: bool
    store_agrees: bool
    step_s: float


def step(engine: HttpEngine, version: int, folder: Path, seen: list[int] | None = None) -> tuple[SamplingResult, bool]:
    """A step's result, and whether the store tells the same."""
    counts = seen if seen is not None else [0]
    path = folder / f"rollouts-{time.monotonic_ns()}.sqlite"

    def on_progress(progress: Any) -> None:
        counts[0] = progress.num_committed

    with RolloutStore(path, run={}) as store:
        result = run(fresh(version), engine, reward, store, on_progress=on_progress)
        store.finish_step(version, result)
        again = fresh(version)
        again.restore(store.events(version))
        scored = sum(len(pool.scored) for pool in result.pools)
        same = again.done and pools(again.result()) == pools(result)
        return result, same and scored == round(result.metrics["samples_per_prompt"] * len(result.pools))


def killed_step(
    servers: Serving, engine: HttpEngine, version: int, folder: Path, expected: SamplingResult, replica: int, part: str, after_s: float
) -> Kill | None:
    """A step in which this replica is killed so long after its start; None when the step was over before that."""
    committed, before = [0], [-1]

    def strike() -> None:
        before[0] = committed[0]
        servers.kill(replica, part)

    moved, late = engine.counts.moved, engine.counts.late
    timer = threading.Timer(after_s, strike)
    began = time.monotonic()
    timer.start()
    result, store_agrees = step(engine, version, folder, committed)
    took = time.monotonic() - began
    timer.cancel()
    timer.join()
    if before[0] in (-1, committed[0]):
        return None
    return Kill(
        replica, part, round(after_s, 2), before[0], committed[0], engine.counts.moved - moved, engine.counts.late - late,
        pools(result) == pools(expected), store_agrees, round(took, 2),
    )  # fmt: skip


def record(kills: Sequence[Kill], facts: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps({**facts, "kills": [vars(kill) for kill in kills]}, indent=1) + "\n")
