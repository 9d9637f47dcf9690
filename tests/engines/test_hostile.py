"""Servers that misbehave in every way of hostile_modes.py: a run with one alone ends in one line, with a good one beside it goes on.

All runs are played at once, since they mostly wait; each test looks at what became of its own.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_modes import COMPLETE, HANDSHAKE, MODES, Mode
from hostile_server import HostileServer, hostile, loop_in_a_thread

from reinforce_ada.driver import run
from reinforce_ada.engines import http_replica, openai
from reinforce_ada.engines.openai import HttpEngine
from reinforce_ada.errors import EngineLost, InputError
from reinforce_ada.outside import one_line
from reinforce_ada.sampling import AdaptiveSampler, preset
from reinforce_ada.types import Prompt, SamplingResult

MAX_TOKENS, VOCAB_SIZE, VERSION = 12, 1000, 7
PROMPTS = [Prompt(f"p{i}", (5, 6, 7 + i)) for i in range(3)]
GIVE_UP_S, LOAD_S = 0.6, 15.0  # no second attempt of a server that is alone: that comes after 1 s
MOST_S = 60.0  # of any run, on a machine with much other work; on a quiet one they take .1 to 4 s
AT_ONCE = 16


@dataclass(frozen=True)
class Played:
    """What became of a run."""

    end: str  # "done", or the type of the error
    line: str
    pools: list[list[tuple[list[int], float]]]
    said: list[str]
    seconds: float


def reward(prompt: Prompt, text: str) -> float:
    return float(int(text.split()[-1]) % (2 + int(prompt.prompt_id[1:])) == 0)


def pools(result: SamplingResult) -> list[list[tuple[list[int], float]]]:
    return [[(s.completion.token_ids.tolist(), s.reward) for s in pool.scored] for pool in result.pools]


def patience_s(mode: Mode | None, *, is_alone: bool) -> float:
    """`hung_after_s`: short only where it is waited for, since the good server has to answer in that time too."""
    if mode is None or not mode.hangs:
        return 10.0
    return 1.0 if is_alone and mode.outcome == "silent" else 6.0


class Clock:
    """0 until a replica is down; ten times as fast as ours from then on, but no more than MOST_STEP_S from one reading to the next.

    However long the machine stands still in between, the fleet gives up before its second attempt, which could end in another way.
    """

    MOST_STEP_S = 0.05

    def __init__(self, said: list[str]) -> None:
        self._said, self._read_at, self._now = said, 0.0, 0.0

    def __call__(self) -> float:
        now = time.monotonic()
        if self._read_at:
            self._now += min(10 * (now - self._read_at), self.MOST_STEP_S)
        if self._read_at or any(" is down: " in line for line in self._said):
            self._read_at = now
        return self._now


def sample(urls: list[str], folder: Path, said: list[str], hung_after_s: float) -> SamplingResult:
    """One step. With one server the fleet's clock stands still until that goes, and runs fast then: what is slow is not given up."""
    limits: dict[str, Any] = {"max_tokens": MAX_TOKENS, "max_model_len": 64, "vocab_size": VOCAB_SIZE, "max_num_seqs": 4}
    times = {"hung_after_s": hung_after_s, "give_up_s": MOST_S if len(urls) > 1 else GIVE_UP_S}
    with closing(HttpEngine(urls, folder / "weights", say=said.append, **limits, **times)) as engine:
        if len(urls) == 1:
            engine._clock = Clock(said)
        engine.sync_weights([("number", torch.tensor([float(VERSION)]))], VERSION)
        return run(AdaptiveSampler(PROMPTS, preset("reinforce-ada-balance"), step=1, policy_version=VERSION), engine, reward)


def play(loop: asyncio.AbstractEventLoop, folder: Path, mode: Mode | None, *, is_alone: bool) -> Played:
    folder.mkdir(parents=True)
    bad = [HostileServer(mode.at, mode.does)] if mode else []
    said: list[str] = []
    began = time.monotonic()
    with hostile(loop, *bad, *([] if is_alone and mode else [HostileServer()])) as urls:
        if mode:
            urls[0] = urls[0].replace("http", mode.scheme)
        try:
            result = pools(sample(urls, folder, said, patience_s(mode, is_alone=is_alone)))
            end, line = "done", ""
        except (InputError, EngineLost) as e:
            result, end, line = [], type(e).__name__, str(e)
    return Played(end, line, result, said, time.monotonic() - began)


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, bool], Future[Played]]]:
    """The modes of the tests that were chosen, alone (True) or beside a good server; "" is the good server alone."""
    chosen = [item for item in request.session.items if isinstance(item, pytest.Function) and item.module.__name__ == __name__]
    runs = {(item.callspec.params["name"], item.originalname == "test_alone") for item in chosen if hasattr(item, "callspec")}
    folder = tmp_path_factory.mktemp("hostile")
    trusted = openai._trusted()  # once: it reads all authorities there are
    with pytest.MonkeyPatch.context() as patch, loop_in_a_thread() as loop, ThreadPoolExecutor(AT_ONCE) as threads:
        for variable in ("VLLM_API_KEY", "OPENAI_API_KEY"):
            patch.delenv(variable, raising=False)
        patch.setattr(openai, "_trusted", lambda: trusted)
        patch.setattr(http_replica, "_LOAD_S", LOAD_S)
        good = threads.submit(play, loop, folder / "good", None, is_alone=True)
        good.result()
        yield {("", True): good} | {
            (name, is_alone): threads.submit(play, loop, folder / f"{i}-{is_alone}", mode, is_alone=is_alone)
            for i, (name, mode) in enumerate(MODES.items())
            for is_alone in (True, False)
            if (name, is_alone) in runs
        }


Runs = dict[tuple[str, bool], "Future[Played]"]
ENDS = {"ever": "done", "lost": "EngineLost", "silent": "InputError", "refused": "InputError", "unfit": "InputError"}


def test_the_good_server(played: Runs) -> None:
    good = played["", True].result()
    assert good.end == "done"
    assert len(good.pools) == len(PROMPTS)


@pytest.mark.parametrize("name", MODES)
def test_alone(name: str, played: Runs) -> None:
    found, mode = played[name, True].result(), MODES[name]
    assert (found.end, mode.says in found.line) == (ENDS[mode.outcome], True), found
    assert one_line(found.line, 600) == found.line
    assert "secret" not in found.line
    assert found.seconds < MOST_S
    if found.end == "done":
        assert found.pools == played["", True].result().pools


# What a server does wrong once is the same beside a good one; by default only what happens to requests is played there too.
BESIDE = [pytest.param(n, marks=() if n.startswith((COMPLETE, "a stream")) or m.at == "" else pytest.mark.slow) for n, m in MODES.items()]


@pytest.mark.parametrize("name", BESIDE)
def test_beside_a_good_one(name: str, played: Runs) -> None:
    found, outcome = played[name, False].result(), MODES[name].outcome
    assert found.end in {"refused": ("InputError",), "unfit": ("InputError", "done")}.get(outcome, ("done",)), found
    assert all(one_line(line, 600) == line and "secret" not in line for line in [found.line, *found.said])
    assert found.seconds < MOST_S
    if found.end == "done":
        assert found.pools == played["", True].result().pools


# httpcore leaves the socket of a handshake that is given up to the garbage collector, which warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_handshake_that_hangs(tmp_path: Path) -> None:
    with loop_in_a_thread() as loop:
        found = play(loop, tmp_path / "run", HANDSHAKE, is_alone=True)
    gc.collect()
    assert (found.end, HANDSHAKE.says in found.line) == ("InputError", True), found
    assert found.seconds < MOST_S
