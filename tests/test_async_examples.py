"""The examples that sample from asyncio, each as a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from chat_server import answer, chat_server
from reinforce_ada import AdaptiveSampler, Prompt, advantages_of, arun, preset
from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling.sampler import request_seed
from reinforce_ada.types import Event, Request, SamplingResult, Scored

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0
POLICY = preset("reinforce-ada-balance")
SUMS = [(f"{a}+{a + 3}", 2 * a + 3) for a in range(1, 7)]
LAW = {"fail": 5, "refuse": 7}


def command(name: str, *arguments: Any) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]


def started(line: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(line: list[str]) -> tuple[str, str]:
    """What a process that ends well has printed."""
    process = started(line)
    try:
        out, err = process.communicate(timeout=2 * PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out, err


# -------------------- examples/async_openai.py


@pytest.fixture
def openai_example(tmp_path: Path) -> Any:
    """(server, further arguments) -> the command line of the example."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in SUMS))
    fixed = ("--model", "m", "--concurrency", 4, "--prompts", prompts, "--out", tmp_path / "run.sqlite")
    return lambda server, *others: command("async_openai.py", "--base-url", server.url, *fixed, *others)


def truth() -> SamplingResult:
    """The step as it has to come out: without a server, without failures that pass, and without a kill."""

    async def sample(request: Request) -> tuple[str, float]:
        seed = request.seed % 2**31
        if seed % LAW["refuse"] == 0:
            raise ValueError("refused")
        text = answer({"messages": [{"content": request.prompt.text}], "seed": seed, "model": "m"})["choices"][0]["message"]["content"]
        return text, float(f" {request.prompt.data['answer']}." in text)

    prompts = [Prompt(str(i), text=prompt, data={"answer": right}) for i, (prompt, right) in enumerate(SUMS)]
    return asyncio.run(arun(AdaptiveSampler(prompts, POLICY), sample))


def journaled(path: Path) -> list[Event]:
    """What a running process has committed, read beside it."""
    try:
        with RolloutStore(path, read_only=True) as store:
            return store.events(0)
    except InputError:  # there is no store yet
        return []


def kill_when(process: subprocess.Popen[str], is_holding: threading.Event, store: Path, num_events: int) -> None:
    """Kill a process once its server answers no more and it has journaled some of the answers."""
    try:
        assert is_holding.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while len(journaled(store)) < num_events:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(find_spec("openai") is None, reason="openai is not installed")
def test_a_killed_run_over_an_endpoint_goes_on_where_it_was(openai_example: Any, tmp_path: Path) -> None:
    store, expected = tmp_path / "run.sqlite", truth()
    with chat_server(**LAW, hold_after=25) as server:
        kill_when(started(openai_example(server, "--token-ids")), server.is_holding, store, 12)
    events = journaled(store)
    known = {(SUMS[int(event.id.prompt_id)][0], request_seed(0, *event.id) % 2**31) for event in events}
    assert 12 <= len(known) < expected.metrics["num_completions_committed"]
    assert known <= set(server.asked)
    with chat_server(**LAW) as server:
        out, _ = ended(openai_example(server, "--token-ids"))
    assert known.isdisjoint(server.asked)
    assert all(body["return_token_ids"] and body["logprobs"] and body["temperature"] == 1 for body in server.bodies)
    assert len(server.asked) > len(set(server.asked))  # the client repeated what failed
    check_printed(out, expected)
    check_stored(store, events, expected)


def check_printed(out: str, expected: SamplingResult) -> None:
    """A line for each prompt, then the totals, after the lines of progress."""
    *progress, total = out.splitlines()
    lines, progress = progress[-len(SUMS) :], progress[: -len(SUMS)]
    assert re.fullmatch(rf"{len(SUMS)} of {len(SUMS)} prompts done, \d+ samples", progress[-1])
    kept = {g.pool.prompt.prompt_id: (g.kept, a) for g, a in zip(expected.groups, advantages_of(expected, POLICY), strict=True)}
    for line, pool in zip(lines, expected.pools, strict=True):
        scored, advantages = kept[pool.prompt.prompt_id]
        rewards, shown = re.fullmatch(r".*; kept (\[.*\]), advantages (\[.*\])", line).groups()
        counts = f"{len(pool.outcomes)} samples, {pool.num_correct} correct, {pool.num_wrong} wrong, {pool.num_void} void"
        assert line.startswith(f"prompt {pool.prompt.prompt_id}: {counts};")
        assert json.loads(rewards) == [s.reward for s in scored]
        assert json.loads(shown) == pytest.approx(advantages, abs=1e-3)
    num_samples = sum(len(pool.outcomes) for pool in expected.pools)
    assert sum(pool.num_void for pool in expected.pools) > 0
    assert total.startswith(f"total: {num_samples} samples, {sum(pool.num_correct for pool in expected.pools)} correct, ")


def check_stored(path: Path, before: list[Event], expected: SamplingResult) -> None:
    """The journal went on after what it held at the kill, and the completions carry the server's tokens."""
    with RolloutStore(path, read_only=True) as store:
        assert store.finished_steps() == [0]
        events = store.events(0)
        counts = [(c.num_correct, c.num_wrong, c.num_void) for c in store.pool_counts()]
    assert [event.id for event in events[: len(before)]] == [event.id for event in before]
    assert counts == [(p.num_correct, p.num_wrong, p.num_void) for p in expected.pools]
    completions = [event.completion for event in events if isinstance(event, Scored)]
    assert all(c.token_ids.tolist() == [len(word) for word in c.text.split()] for c in completions)
    assert all((c.rollout_logprobs == -0.5).all() for c in completions)


# -------------------- examples/multi_turn.py


def test_multi_turn_episodes_train_what_the_policy_wrote() -> None:
    out, err = ended(command("multi_turn.py"))
    assert err == ""
    episodes = re.findall(r"^([+-]\d\.\d{3})  (.*)\n        (.*)$", out, re.MULTILINE)
    assert len(episodes) == 3 * POLICY.group_size
    for _, text, marks in episodes:
        own = "".join(char for char, mark in zip(text, marks, strict=True) if mark == "^")
        tools = "".join(char for char, mark in zip(text, marks, strict=True) if mark == " ")
        assert tools == "".join(f"{sum(map(int, call.split('+')))} " for call in re.findall(r"(\d+\+\d+)=", own))
        assert text.endswith(".")
    assert {advantage[0] for advantage, *_ in episodes} == {"+", "-"}
    num_tokens, num_own = sum(len(text) for _, text, _ in episodes), sum(marks.count("^") for *_, marks in episodes)
    assert num_own < num_tokens
    assert f" over {num_own} of {num_tokens} tokens\n" in out
    assert float(re.search(r"^sizes of the gradient: (.+) over the policy's tokens, 0 over the tool's$", out, re.MULTILINE)[1]) > 0


POLICY_WITHOUT_CALLS = """
async def turn(text, seed):
    return list(b"42." if seed % 2 else b"41."), [-0.5] * 3
"""


def test_multi_turn_episodes_take_a_policy(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY_WITHOUT_CALLS)
    out, _ = ended(command("multi_turn.py", "--policy", f"{tmp_path / 'mine.py'}:turn", "--concurrency", 1))
    assert set(re.findall(r"^[+-]\d\.\d{3}  (.*)\n        (.*)$", out, re.MULTILINE)) == {("41.", "^^^"), ("42.", "^^^")}
    assert ", 0 over the tool's\n" in out


# -------------------- examples/verifiers_env.py


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="verifiers is installed")
def test_an_absent_verifiers_gets_one_line() -> None:
    process = started(command("verifiers_env.py"))
    assert process.communicate(timeout=PATIENCE_S) == ("", "verifiers_env: verifiers is not installed; pip install verifiers\n")
    assert process.returncode == 1


@pytest.mark.skipif(find_spec("verifiers") is None, reason="verifiers is not installed; it needs a virtual environment of its own")
def test_groups_over_an_environment_of_verifiers() -> None:
    with chat_server(fail=3, refuse=5) as server:
        out, _ = ended(command("verifiers_env.py", "--base-url", server.url, "--model", "m"))
    counts = re.findall(r"^(\d+\+\d+): (\d+) correct, (\d+) wrong, (\d+) void$", out, re.MULTILINE)
    assert [question for question, *_ in counts] == ["17+25", "8+5", "2+3"]
    first = [(m[0]["content"], body["seed"]) for body in server.bodies if len(m := body["messages"]) == 1]
    refused = {asked for asked in first if asked[1] % 5 == 0}
    assert sum(int(void) for *_, void in counts) == len(refused) > 0
    assert sum(int(n) for _, *of in counts for n in of) == len(set(first))
    assert {len(body["messages"]) for body in server.bodies} == {1, 3}  # two turns
    kept = [json.loads(rewards) for rewards in re.findall(r"^  kept (\[.*\]), advantages \[.+\]$", out, re.MULTILINE)]
    assert all(sorted(rewards) == [0, 0, 1, 1] for rewards in kept)
    assert len(kept) == 3
