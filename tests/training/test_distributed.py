"""Several processes: one gradient, one run, and an end of all when one of them fails."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from toy_process import RANK_POINTS, free_port
from toy_runs import Runner, error, evaluations, pools, scored, trained
from toy_training import saved_weights

import reinforce_ada
from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.config import ModelConfig
from reinforce_ada.errors import InputError
from reinforce_ada.training import adapters, distributed, models
from reinforce_ada.training.batching import Sample, shares_of
from reinforce_ada.training.learner import Learner, Minibatch
from reinforce_ada.training.log import read_log
from reinforce_ada.training.optimizer import MasterAdamW
from reinforce_ada.types import Completion, CompletionId, Prompt

QUESTIONS = [f"{a} + {b} =" for a in range(4) for b in range(4)]


@pytest.fixture(scope="module")
def undisturbed(toy_run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "one rank"
    assert toy_run(out, dtype="float32") == 0
    return out


# -------------------- shares


def sample(prompt_id: str, index: int, prompt_tokens: int, tokens: int) -> Sample:
    ids = np.zeros(tokens, np.int32)
    completion = Completion(CompletionId(1, prompt_id, index), ids, np.zeros(tokens, np.float32), "", "stop", 0)
    return Sample(Prompt(prompt_id, (5,) * prompt_tokens), completion, 1.0)


def tokens_of(share: list[Sample]) -> int:
    prompts = {s.prompt.prompt_id: len(s.prompt.token_ids) for s in share}
    return sum(prompts.values()) + sum(s.completion.token_ids.size for s in share)


def test_shares_have_about_as_many_tokens_and_whole_groups() -> None:
    sizes = {"a": (3, [1, 1]), "b": (9, [10, 10]), "c": (4, [8]), "d": (2, [3, 3, 3])}
    samples = [sample(name, k, prompt, tokens) for name, (prompt, row) in sizes.items() for k, tokens in enumerate(row)]
    shares = shares_of(samples, 2)
    assert [sorted({s.prompt.prompt_id for s in share}) for share in shares] == [["b"], ["a", "c", "d"]]
    assert [tokens_of(share) for share in shares] == [29, 28]


@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4)), max_size=9), st.integers(1, 5))
def test_shares_lose_nothing_and_are_balanced(groups: list[tuple[int, list[int]]], count: int) -> None:
    samples = [sample(f"{g}", k, prompt, tokens) for g, (prompt, row) in enumerate(groups) for k, tokens in enumerate(row)]
    shares = shares_of(samples, count)
    assert len(shares) == count
    assert {s.completion.id for share in shares for s in share} == {s.completion.id for s in samples}
    assert sum(map(len, shares)) == len(samples)
    prompts = [{s.prompt.prompt_id for s in share} for share in shares]
    assert sum(map(len, prompts)) == len(groups)  # no group in two of them
    largest = max((prompt + sum(row) for prompt, row in groups), default=0)
    assert max(map(tokens_of, shares)) <= sum(map(tokens_of, shares)) / count + largest


# -------------------- the gradient


def gradients(toy_run: Runner, out: Path, ranks: int, **overrides: Any) -> list[dict[str, Tensor]]:
    """Of the first optimizer step, one dictionary for each rank."""
    point = ("saves the gradients", 1)
    assert toy_run.several(ranks, out, kill=point, on_ranks=range(ranks), steps=1, dtype="float32", **overrides) == [0] * ranks
    return [load_file(f"{out}-gradients-{rank}.safetensors") for rank in range(ranks)]


def relative_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in a.values())
    assert scale > 1e-3
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, {}),
        (2, {"loss_agg": "seq-mean-token-mean"}),
        (2, {"loss_agg": "seq-mean-token-sum", "preset": "reinforce-ada-exact", "minibatches": 1}),
        (2, {"loss_agg": "seq-mean-token-sum-norm", "rollout_correction": "sequence-truncate"}),
        (2, {"loss": "cispo", "tokens_per_pass": 1, "entropy_coef": 0.1}),
        (3, {"prompts_per_step": 1, "minibatches": 1}),  # one group for three: two shares are empty
    ],
)
def test_the_gradient_of_several_is_that_of_one(toy_run: Runner, tmp_path: Path, ranks: int, overrides: dict[str, Any]) -> None:
    (alone,) = gradients(toy_run, tmp_path / "one", 1, **overrides)
    several = gradients(toy_run, tmp_path / "several", ranks, **overrides)
    for mine in several:
        assert relative_difference(alone, mine) < 1e-6
        assert relative_difference(several[0], mine) == 0.0  # or the ranks would drift apart


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_gradient_of_a_llama_with_shared_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora_rank: int) -> None:
    """Two ranks in threads: gloo is the same, and transformers is imported once. Of all weights, or of adapters alone."""
    models.build_tiny(tmp_path / "llama", models.tiny_tokenizer(QUESTIONS), [(QUESTIONS[0], "3")], seed=0, num_updates=1)
    model = models.load(str(tmp_path / "llama"), "float32", torch.device("cpu"))
    if lora_rank:
        model = adapters.add(model, ModelConfig(lora_rank=lora_rank), seed=0)
        for layer in model.adapted.values():  # A has a gradient only where B is not zero
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=torch.Generator().manual_seed(1))
    config = configuration.load(None, {"dtype": "float32", "tokens_per_pass": 200})
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            Prompt(f"{g}", tuple(rng.integers(3, 100, 4 + 3 * g).tolist())),
            Completion(CompletionId(1, f"{g}", k), rng.integers(3, 100, 1 + 4 * k), np.full(1 + 4 * k, -1.0), "", "stop", 0),
            float(rng.normal()),
        )
        for g in range(9)
        for k in range(4)
    ]
    whole = Minibatch(samples, sum(s.completion.token_ids.size for s in samples), len(samples))
    found: dict[str, dict[str, Tensor]] = {}

    def keep(self: MasterAdamW, learning_rate: float) -> float:
        found[threading.current_thread().name] = {name: m.grad.clone() for name, m in self._masters.items() if m.grad is not None}
        return 1.0

    def work(rank: int, size: int, store: dist.Store) -> None:
        group = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=60))
        learner = Learner(copy.deepcopy(model), config, distributed.Ranks(rank, size, group))
        if rank == 0:
            learner.update([whole], 1e-3, lambda count: None)
            learner.ranks.send([None] * size)
        else:
            learner.follow()

    monkeypatch.setattr(MasterAdamW, "step", keep)
    for size in (1, 2):
        store = dist.HashStore()
        threads = [threading.Thread(target=work, args=(rank, size, store), name=f"{rank} of {size}") for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert relative_difference(found["0 of 1"], found["0 of 2"]) < 1e-6
    assert relative_difference(found["0 of 2"], found["1 of 2"]) == 0.0
    assert not lora_rank or {".lora_A." in name or ".lora_B." in name for name in found["0 of 2"]} == {True}


# -------------------- the run


def check_like(out: Path, one: Path, tolerance: float = 1e-5) -> None:
    """The same pools, evaluations and log; weights up to rounding."""
    assert pools(out) == pools(one)
    assert evaluations(out) == evaluations(one)
    for mine, other in zip(trained(out), trained(one), strict=True):
        assert mine == pytest.approx(other, rel=tolerance, abs=tolerance)
    for name, tensor in saved_weights(one).items():
        torch.testing.assert_close(saved_weights(out)[name], tensor, rtol=0, atol=tolerance)


def test_a_run_of_two_is_that_of_one(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    assert toy_run.several(2, tmp_path / "two", dtype="float32") == [0, 0]
    check_like(tmp_path / "two", undisturbed)


def test_the_predictions_of_two_are_those_of_one(toy_run: Runner, tmp_path: Path) -> None:
    predicted = {"preset": "reinforce-ada-memory", "baseline": "predicted", "group_size": 2, "round_size": None, "max_rounds": None}
    assert toy_run(tmp_path / "one", dtype="float32", **predicted) == 0
    assert toy_run.several(2, tmp_path / "two", dtype="float32", **predicted) == [0, 0]
    check_like(tmp_path / "two", tmp_path / "one")
    errors, others = (
        [r["prediction_error"] for r in read_log(tmp_path / name / "log.jsonl") if r["kind"] == "step"] for name in ("one", "two")
    )
    assert others == pytest.approx(errors, rel=1e-5)
    assert errors[0] == 0.25  # nothing known: 1/2 for every prompt
    assert len(set(errors)) == len(errors)


def test_half_precision_keeps_its_masters_on_every_rank(toy_run: Runner, tmp_path: Path) -> None:
    assert toy_run(tmp_path / "one", dtype="bfloat16") == 0
    assert toy_run.several(2, tmp_path / "two", dtype="bfloat16") == [0, 0]
    check_like(tmp_path / "two", tmp_path / "one", 2e-2)


@pytest.mark.parametrize(
    ("point", "n", "rank", "said"),
    [
        ("before a journal transaction", 40, 0, None),
        ("between two minibatches", 7, 0, None),
        ("inside a checkpoint", 2, 0, None),
        ("inside a line of the log", 5, 0, None),
        ("before the shares", 3, 1, "rank 1 is gone"),
        ("inside the backward", 4, 1, "rank 1 is gone"),
        ("between two sums", 5, 1, "another rank is gone"),
        ("between two minibatches", 7, 1, "rank 1 is gone"),
        ("hangs in the backward", 4, 1, "rank 1 does not answer"),
        pytest.param("hangs between two sums", 5, 1, "another rank does not answer", marks=pytest.mark.slow),
        ("raises in the backward", 4, 1, "rank 1 failed: ValueError: as asked"),
        ("raises in the backward", 4, 0, "rank 0 failed: ValueError: as asked"),
        ("raises before its logprobs", 3, 1, "rank 1 failed: ValueError: as asked"),
        ("raises in the optimizer", 5, 1, "rank 1 failed: ValueError: as asked"),
    ],
)
def test_a_rank_that_fails_ends_all_and_the_run_goes_on_later(
    toy_run: Runner, undisturbed: Path, tmp_path: Path, point: str, n: int, rank: int, said: str | None
) -> None:
    out = tmp_path / "run"
    statuses = toy_run.several(2, out, kill=(point, n), on_ranks=(rank,), dtype="float32")
    assert statuses[rank] == (1 if point.startswith(("raises", "hangs")) else -9)
    assert statuses[1 - rank] == 1
    message = error(out, 1 - rank)
    assert message.startswith(f"RankError: train: {said or 'rank 0 is gone'}; every rank must run; ")
    assert "\n" not in message
    before = scored(out)
    assert toy_run.several(2, out, resume=True, dtype="float32") == [0, 0]
    check_like(out, undisturbed)
    assert {i for i, *_ in before} <= {i for i, *_ in scored(out)}


LAUNCHER = """
import os, signal
from reinforce_ada.training import distributed

if os.fork() == 0:
    with distributed.join():
        print("in", flush=True)
        signal.pause()
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with the one that started it")
def test_a_launcher_that_is_killed_takes_its_processes_along() -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x"}
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, env=environment) as launcher:
        assert launcher.stdout
        assert launcher.stdout.readline() == "in\n"
        launcher.kill()
        assert launcher.stdout.read() == ""  # ends when the last process that has the pipe does


def test_every_way_to_fail_is_tried() -> None:
    (mark,) = (m for m in test_a_rank_that_fails_ends_all_and_the_run_goes_on_later.pytestmark if m.name == "parametrize")
    tried = {getattr(row, "values", row)[0] for row in mark.args[1]}
    assert RANK_POINTS.keys() - tried == {"saves the gradients"}


def test_a_run_of_one_goes_on_with_two(toy_run: Runner, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert toy_run(out, kill=("between log and checkpoint", 2), dtype="float32") == -9
    assert toy_run.several(2, out, resume=True, dtype="float32") == [0, 0]
    check_like(out, undisturbed)


# -------------------- torchrun and the command line


def of_rank(rank: int, folder: Path) -> int:
    """The process of that rank which trains into `folder`."""
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            is_ours = process.name.isdecimal() and str(folder).encode() in (process / "cmdline").read_bytes()
            if is_ours and f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
    raise LookupError(f"no rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process of a rank in /proc")
def test_torchrun_with_a_rank_killed_and_resumed(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"prompt": q, "answer": "3"}) + "\n" for q in QUESTIONS))
    models.build_tiny(tmp_path / "llama", models.tiny_tokenizer(QUESTIONS), [(QUESTIONS[0], "3")], seed=0, num_updates=1)
    settings = {
        "model": tmp_path / "llama", "dtype": "float32", "device": "cpu", "engine": "transformers", "task": tmp_path / "task.jsonl",
        "reward": "toy_rewards:even_length", "num_examples": 0, "eval_prompts": 2, "eval_k": 2, "prompts_per_step": 3, "max_tokens": 4,
        "max_model_len": 128, "learning_rate": 1e-3, "checkpoint_every": 1,
    }  # fmt: skip

    def flags(**more: Any) -> list[str]:
        return [text for name, value in {**settings, **more}.items() for text in (f"--{name.replace('_', '-')}", str(value))]

    def torchrun(*arguments: str) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "reinforce_ada", "train", *arguments]
        path = [str(Path(reinforce_ada.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    def steps_of(folder: Path) -> list[dict[str, Any]]:
        return [r for r in read_log(folder / "log.jsonl") if r["kind"] == "step"]

    two, one = tmp_path / "two", tmp_path / "one"
    first = torchrun(*flags(out=two, steps=1000))
    while not steps_of(two) and first.poll() is None:
        time.sleep(0.05)
    os.kill(of_rank(1, two), signal.SIGKILL)
    said, errors = first.communicate(timeout=60)
    assert first.returncode == 1
    lines = [line for line in errors.splitlines() if line.startswith("reinforce-ada")]
    assert len(lines) == 1, errors
    assert re.search("rank 1 is gone|another rank is gone|by SIGTERM: another rank has ended", lines[0])
    assert said.count("engine: transformers") == 1

    num_steps = len(steps_of(two)) + 2
    again = torchrun("--resume", str(two), "--steps", str(num_steps))
    said, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert said.count("held-out after step") == 1
    assert cli.main(["train", *flags(out=one, steps=num_steps)]) == 0
    assert pools(two) == pools(one)
    assert evaluations(two) == evaluations(one)
    for mine, other in zip(trained(two), trained(one), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


# -------------------- refusals


def test_without_a_launcher_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.join() as ranks:
        assert (ranks.rank, ranks.size, ranks.exchange("x"), ranks.together(lambda: 3)) == (0, 1, ["x"], 3)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            r"^train: WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; all that torchrun sets; torchrun ",
        ),
        ({"RANK": "1"}, r"^train: RANK=1 without WORLD_SIZE; all that torchrun sets, or none of it; unset RANK=1$"),
        ({"RANK": "1", "LOCAL_RANK": "1"}, r"^train: RANK=1 LOCAL_RANK=1 without WORLD_SIZE;"),
        ({"LOCAL_RANK": "0", "MASTER_PORT": "1"}, r"^train: LOCAL_RANK=0 without WORLD_SIZE;"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, r"^train: RANK=1 with WORLD_SIZE=1; a number up to 0, as torchrun sets it$"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, r"^train: RANK=2 with WORLD_SIZE=2; a number up to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, r"^train: RANK=-1 with WORLD_SIZE=2;"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, r"^train: RANK=x with WORLD_SIZE=2;"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": ""}, r"^train: LOCAL_RANK= with WORLD_SIZE=2;"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "99999"},
            r"^train: MASTER_PORT=99999 with WORLD_SIZE=2;",
        ),
        ({"WORLD_SIZE": ""}, r"^train: WORLD_SIZE=; the number of processes"),
        ({"WORLD_SIZE": "0"}, r"^train: WORLD_SIZE=0; the number of processes"),
        ({"WORLD_SIZE": "two"}, r"^train: WORLD_SIZE=two; the number of processes, as torchrun sets it$"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, r"^train: WORLD_SIZE=2 without MASTER_PORT;"),
    ],
)
def test_an_environment_that_is_not_whole(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), distributed.join():
        pass


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "two"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_half_an_environment_silences_nobody(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--model", "tiny"]) == 2
    assert capsys.readouterr().err.startswith(f"reinforce-ada: train: {'RANK=1' if len(environment) == 1 else 'WORLD_SIZE='}")


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    whole = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in whole.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_MEET", timedelta(seconds=1))
    message = rf"^train: WORLD_SIZE=2: the ranks do not meet at 127.0.0.1:{port}: .*; all of them$"
    with pytest.raises(InputError, match=message) as error, distributed.join():
        pass
    assert "\n" not in str(error.value)


def test_every_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert distributed.local_device("cuda") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (distributed.local_device("cuda"), distributed.local_device("cpu")) == (torch.device("cuda", 1), torch.device("cpu"))
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = r"^train: process 2 on a machine with 2 GPUs; a GPU for each process; torchrun --nproc-per-node N$"
    with pytest.raises(InputError, match=message):
        distributed.local_device("cuda")


def test_eval_is_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["eval", "smollm2"]) == 2
    assert capsys.readouterr().err == "reinforce-ada: eval: WORLD_SIZE=2; one process: only train works with several; no torchrun\n"
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["eval", "smollm2"]) == 2
    assert capsys.readouterr().err == ""  # rank 0 says it
