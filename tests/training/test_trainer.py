"""The whole way with tiny models: what a run leaves behind, what its update is, and what is refused in one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import ToyModel, toy_config, toy_trainer

from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.rewards.inline import InlineRewards
from reinforce_ada.rewards.worker import load_reward
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.sampling import NearestRate, Refill, SkipStreaks, configured
from reinforce_ada.training import launch, models
from reinforce_ada.training.batching import Sample, collate
from reinforce_ada.training.language_model import HuggingFaceModel, token_logprobs
from reinforce_ada.training.log import read_log
from reinforce_ada.training.loss import RunLoss, inexact
from reinforce_ada.training.optimizer import MasterAdamW
from reinforce_ada.training.tasks import load_records
from reinforce_ada.types import Completion, CompletionId, Prompt, Scored

QUESTIONS = [f"{a} + {b} =" for a in range(4) for b in range(4)]


def write_task(path: Path, records: list[dict[str, Any]] | None = None) -> Path:
    records = records or [{"prompt": q, "answer": "3"} for q in QUESTIONS]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@functools.cache
def tokenizer() -> Any:
    return models.tiny_tokenizer(QUESTIONS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny Llama, a task, and settings that make a step a fraction of a second."""
    folder = tmp_path_factory.mktemp("base")
    write_task(folder / "task.jsonl")
    models.build_tiny(folder / "llama", tokenizer(), [(QUESTIONS[0], "3")], seed=0, num_updates=1)
    return folder


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure, and rewards in this process: other tests have them."""

    @contextmanager
    def inline(config: Any, task: Any) -> Iterator[InlineRewards]:
        yield InlineRewards(load_reward(task.reward) if isinstance(task.reward, str) else task.reward)

    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    monkeypatch.setattr(launch, "make_rewards", inline)


def settings(base: Path, out: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "model": str(base / "llama"), "dtype": "float32", "device": "cpu", "engine": "transformers", "task": str(base / "task.jsonl"),
        "reward": "toy_rewards:even_length", "num_examples": 0, "eval_prompts": 2, "eval_k": 2, "prompts_per_step": 3, "steps": 2,
        "max_tokens": 4, "max_model_len": 128, "learning_rate": 1e-3, "out": str(out), **overrides,
    }  # fmt: skip


def train(base: Path, out: Path, **overrides: Any) -> list[dict[str, Any]]:
    """The records of the steps of a finished run."""
    launch.train(configuration.load(None, settings(base, out, **overrides)))
    return steps_of(out)


def steps_of(out: Path) -> list[dict[str, Any]]:
    return [r for r in read_log(out / "log.jsonl") if r["kind"] == "step"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return models.load(str(folder), "float32", torch.device("cpu")).module.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -------------------- the whole way


RECORD = {
    "first_round_reward", "signal_fraction", "samples_per_prompt", "waste_fraction", "num_voids", "tokens_committed", "loss",
    "grad_norm", "learning_rate", "sampling_s", "sampling_tokens_per_s", "training_s",
}  # fmt: skip


def test_train_extend_eval_and_report_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "build_tiny", functools.partial(models.build_tiny, num_updates=10))
    out = tmp_path / "run"
    values = {
        "dtype": "float32",
        "engine": "transformers",
        "eval_prompts": 4,
        "eval_k": 2,
        "prompts_per_step": 3,
        "max_tokens": 4,
        "steps": 2,
    }
    flags = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["train", "--model", "tiny", "--out", str(out), "--steps", "2", *flags]) == 0
    made = {"config.toml", "log.jsonl", "rollouts.sqlite", "figure.png", "model", "checkpoints", "base_model"}
    assert made <= {p.name for p in out.iterdir()}
    records = read_log(out / "log.jsonl")
    assert [(r["kind"], r.get("step")) for r in records] == [("run", None), ("eval", 0), ("step", 1), ("step", 2), ("eval", 2)]
    assert all(r.keys() >= RECORD for r in records if r["kind"] == "step")
    assert (records[0]["engine"], records[0]["cap"], records[0]["config"]["training"]["steps"]) == ("TransformersEngine", 32, 2)
    assert "engine: transformers" in capsys.readouterr().out

    assert cli.main(["train", "--resume", str(out), "--steps", "4"]) == 0
    assert [r["step"] for r in steps_of(out)] == [1, 2, 3, 4]
    assert configuration.load(out / "config.toml").training.steps == 4
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        assert store.finished_steps() == [1, 2, 3, 4]

    capsys.readouterr()
    assert cli.main(["eval", str(out / "model"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)  # nothing else is printed there
    final = next(r for r in read_log(out / "log.jsonl") if r["kind"] == "eval" and r["step"] == 4)
    assert found["tasks"][0]["per_prompt"] == final["per_prompt"]  # the saved model is the trained one


@pytest.mark.usefixtures("light")
def test_the_same_seed_gives_the_same_weights(base: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(base, tmp_path / name, seed=seed)
    assert same(weights(tmp_path / "a" / "model"), weights(tmp_path / "b" / "model"))
    assert not same(weights(tmp_path / "a" / "model"), weights(tmp_path / "c" / "model"))
    assert not same(weights(tmp_path / "a" / "model"), weights(base / "llama"))


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("schedule", ["stream", "rounds"])
@pytest.mark.parametrize(
    "preset", ["grpo", "dapo", "reinforce-ada-pos", "reinforce-ada-balance", "reinforce-ada-exact", "reinforce-ada-est", "knapsack"]
)
def test_presets_and_schedules(base: Path, tmp_path: Path, preset: str, schedule: str) -> None:
    for record in train(base, tmp_path / "run", preset=preset, schedule=schedule, eval_prompts=0):
        assert record["num_prompts"] >= 3
        assert record["grad_norm"] > 0
        assert record["num_completions_kept"] <= record["num_completions_committed"] <= record["num_completions_issued"]


def test_prompts_chosen_by_memory_are_refilled_as_the_preset_does() -> None:
    def propose(preset: str, propose: str | None) -> object:
        return configured(configuration.load(None, {"preset": preset, "propose": propose}).sampling).propose

    assert propose("dapo", "skip-streaks") == SkipStreaks(max_prompts_factor=10.0)
    assert propose("grpo", "nearest-rate") == NearestRate(max_prompts_factor=1.0)
    assert propose("dapo", None) == Refill(10.0)


@pytest.mark.usefixtures("light")
def test_prompts_are_chosen_by_memory(base: Path, tmp_path: Path) -> None:
    for record in train(base, tmp_path / "run", preset="grpo", propose="nearest-rate", eval_prompts=0):
        assert record["num_skipped"] == 3 * record["num_prompts"] > 0


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("degenerate", ["keep", "drop"])
def test_a_step_without_signal_leaves_the_weights(base: Path, tmp_path: Path, dtype: str, degenerate: str) -> None:
    reward, decay = "toy_rewards:constant", 0.1
    records = train(base, tmp_path / "run", reward=reward, dtype=dtype, degenerate=degenerate, weight_decay=decay, max_rounds=1)
    assert [(r["grad_norm"], r["signal_fraction"]) for r in records] == [(0.0, 0.0)] * 2
    assert all(r.keys() >= RECORD for r in records)
    loaded = models.load(str(base / "llama"), dtype, torch.device("cpu")).module.state_dict()
    after = models.load(str(tmp_path / "run" / "model"), dtype, torch.device("cpu")).module.state_dict()
    assert same(loaded, after)


@pytest.mark.usefixtures("light")
def test_a_profile_has_every_request_and_every_phase(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.json"
    steps = train(base, tmp_path / "run", profile=str(profile), eval_prompts=0)
    assert f"profile {profile}" in capsys.readouterr().out
    trace = json.loads(profile.read_text())
    lasted = {e["name"]: e for e in trace if e["ph"] == "X" and e["pid"] == 0}
    phases = ["step 1 sampling", "sync weights", "step 1 training", "step 2 sampling", "step 2 training", "checkpoint"]
    assert lasted.keys() == {*phases, "wake", "sleep"}
    assert [lasted[f"step {s} {what}"]["ts"] for s in (1, 2) for what in ("sampling", "training")] == sorted(
        lasted[f"step {s} {what}"]["ts"] for s in (1, 2) for what in ("sampling", "training")
    )
    requests = [e for e in trace if e["ph"] == "X" and e["pid"] > 0]
    assert sum(e["args"]["end"] != "aborted" for e in requests) >= sum(r["num_completions_committed"] for r in steps)
    second = lasted["step 2 sampling"]
    assert all(second["ts"] <= e["ts"] <= second["ts"] + second["dur"] for e in requests if e["args"]["step"] == 2)
    with RolloutStore(tmp_path / "run" / "rollouts.sqlite", read_only=True) as store:
        scored = {(e.id.step, e.id.prompt_id, e.id.index) for step in (1, 2) for e in store.events(step) if isinstance(e, Scored)}
    assert scored <= {(e["args"]["step"], e["args"]["prompt"], e["args"]["index"]) for e in requests}
    assert read_log(tmp_path / "run" / "log.jsonl")[0]["engine"] == "TransformersEngine"


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_any_folder_is_a_model(base: Path, tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(models.tiny_config(model_type)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    train(base, tmp_path / "run", model=str(tmp_path / "base"))
    assert not same(weights(tmp_path / "run" / "model"), weights(tmp_path / "base"))


@pytest.mark.usefixtures("light")
def test_a_head_that_does_not_fit_is_said_and_the_logits_are_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    head = HuggingFaceModel.head
    monkeypatch.setattr(HuggingFaceModel, "head", lambda self: dataclasses.replace(head(self), logit_scale=3.0))
    train(base, tmp_path / "wrong head", minibatches=2)
    said = capsys.readouterr().out
    assert "linear_policy_loss does not agree with the model's logits: token_logprobs on the model's logits is used instead" in said
    with pytest.raises(InputError, match=r"^train: entropy_coef with a model the linear operators do not fit; entropy_coef 0$"):
        train(base, tmp_path / "entropy", entropy_coef=0.1)
    assert steps_of(tmp_path / "wrong head")[0]["loss"] != 0


# -------------------- rewards and custom losses


def test_a_reward_beside_the_user(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--reward module:function` finds a module of the current folder, in the worker processes too."""
    (tmp_path / "my_own_rewards.py").write_text("def score(prompt, completion):\n    return 0.25\n")
    write_task(tmp_path / "questions.jsonl", [{"prompt": q} for q in QUESTIONS])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    values = settings(base, tmp_path / "run", task="questions.jsonl", reward="my_own_rewards:score", steps=1)
    flags = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["train", *flags]) == 0
    assert [r["first_round_reward"] for r in steps_of(tmp_path / "run")] == [0.25]


OWN = "def ppo(x, old, adv, mask):\n    return (-adv * (ratio := (x - old).exp())).maximum(-adv * ratio.clamp(0.8, 1.28))\n"


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_a_loss_beside_the_user(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: None, entropy_coef: float) -> None:
    (tmp_path / "my_own_losses.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    records = {}
    for name, loss in {"builtin": "ppo", "file": "./my_own_losses.py:ppo", "module": "my_own_losses:ppo"}.items():
        records[name] = train(base, tmp_path / name, loss=loss, minibatches=2, entropy_coef=entropy_coef, eval_prompts=0)
        saved = "ppo" if name == "builtin" else f"{tmp_path}/my_own_losses.py:ppo"
        assert configuration.load(tmp_path / name / "config.toml").training.loss == saved
    for found in (records["file"], records["module"]):
        for record, expected in zip(found, records["builtin"], strict=True):
            assert expected.keys() - record.keys() == {"clip_fraction_low", "clip_fraction_high"}
            for key in ("loss", "grad_norm", "approx_kl_k3", *(("entropy",) if entropy_coef else ())):
                assert record[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-6)


def test_rewards_that_raise_or_hang_are_voids(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    task = write_task(tmp_path / "task.jsonl", [{"prompt": w, "do": w} for w in ("raise", "hang", "score")])
    (record,) = train(
        base, tmp_path / "run", task=str(task), reward="toy_rewards:as_told", preset="grpo", group_size=2, steps=1, eval_prompts=0,
        reward_timeout_s=0.2,
    )  # fmt: skip
    assert record["num_voids"] == 4
    assert record["num_completions_committed"] == 6
    assert (tmp_path / "run" / "model" / "config.json").is_file()


# -------------------- the update


def gradients_of_first_minibatch(out: Path, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> dict[str, torch.Tensor]:
    found: list[dict[str, torch.Tensor]] = []

    def spy(self: MasterAdamW, learning_rate: float) -> float:
        found.append({name: m.grad.clone() for name, m in self._masters.items()})
        self._adam.zero_grad()
        return 1.0

    monkeypatch.setattr(MasterAdamW, "step", spy)
    config = toy_config(out, steps=1, minibatches=1, **overrides)
    toy_trainer(config, out, resume=False).run()
    return found[0]


@pytest.mark.parametrize("correction", ["none", "token-truncate"])
@pytest.mark.parametrize("loss_agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_accumulated_gradients_are_those_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_agg: str, correction: str
) -> None:
    found = [
        gradients_of_first_minibatch(
            tmp_path / f"{size}", monkeypatch, tokens_per_pass=size, dtype="float32", loss_agg=loss_agg, rollout_correction=correction
        )
        for size in (1, 30, 100_000)
    ]
    scale = max(float(g.abs().max()) for g in found[-1].values())
    assert scale > 1e-3
    for other in found[:-1]:
        for name, g in found[-1].items():
            assert float((other[name] - g).abs().max()) < 1e-5 * scale, name


def test_with_objective_mean_groups_without_signal_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its denominator is of the prompts that entered: kept or dropped, the gradient is the same. The published weights' is not."""
    same_gradient = {}
    for preset in ("reinforce-ada-exact", "reinforce-ada-balance"):
        keep, drop = (
            gradients_of_first_minibatch(
                tmp_path / f"{preset}-{degenerate}", monkeypatch, preset=preset, degenerate=degenerate, dtype="float32", max_rounds=1,
                loss_agg="seq-mean-token-sum", tokens_per_pass=100_000,
            )
            for degenerate in ("keep", "drop")
        )  # fmt: skip
        scale = max(float(g.abs().max()) for g in keep.values())
        same_gradient[preset] = all(float((drop[name] - g).abs().max()) < 1e-6 * scale for name, g in keep.items())
    assert same_gradient == {"reinforce-ada-exact": True, "reinforce-ada-balance": False}


def test_a_denominator_below_one_divides(tmp_path: Path) -> None:
    """As of 8 minibatches of one prompt with two completions kept: 2 * 1 / 8."""
    loss = RunLoss.from_config(toy_config(tmp_path, loss_agg="seq-mean-token-sum"))
    completion = Completion(CompletionId(0, "a", 0), np.array([4, 5], np.int32), np.zeros(2, np.float32), "", "stop", 0)
    batch = collate([[Sample(Prompt("a", (3,)), completion, 1.0)]], 0)
    whole, eighth = (loss(ToyModel(torch.float32), batch, None, 2, n)[0].detach().item() for n in (2.0, 0.25))
    assert eighth == pytest.approx(8 * whole)


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"loss_agg": "token-mean"}, "loss_agg 'token-mean'"),
        ({"loss_agg": "seq-mean-token-sum"}, None),
        ({"loss": "torch:mul"}, "loss torch:mul may have another gradient than -advantage"),
    ],
)
def test_what_keeps_a_run_from_being_exact(tmp_path: Path, values: dict[str, Any], cause: str | None) -> None:
    config = toy_config(tmp_path / "run", minibatches=1, preset="reinforce-ada-exact", max_grad_norm=1e6, **values)
    said = inexact(config, configured(config.sampling))
    assert said == "" if cause is None else said.startswith(f'objective "mean" is only approximate here: {cause}')


def test_a_run_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path / "run", steps=0, minibatches=1, preset="reinforce-ada-exact", loss_agg="token-mean")
    toy_trainer(config, tmp_path / "run", resume=False).run()
    assert "objective \"mean\" is only approximate here: loss_agg 'token-mean'" in capsys.readouterr().err


def test_ratios_are_to_logprobs_from_before_the_steps_first_update(tmp_path: Path) -> None:
    config = toy_config(tmp_path / "run", steps=1, minibatches=3, dtype="float32")
    trainer = toy_trainer(config, tmp_path / "run", resume=False)
    start = [p.detach().clone() for p in trainer.parts.model.module.parameters()]
    loss, seen = trainer.learner.loss, []

    def spy(model: Any, batch: Any, old: Any, num_tokens: int, num_seqs: int, predictor: Any) -> Any:
        assert predictor is None
        seen.append((batch, old, num_tokens, num_seqs))
        return loss(model, batch, old, num_tokens, num_seqs)

    trainer.learner.loss = spy  # type: ignore[assignment]
    spy.temperature, spy.entropy_coef = loss.temperature, 0.0  # type: ignore[attr-defined]
    trainer.run()
    with torch.no_grad():
        for p, value in zip(trainer.parts.model.module.parameters(), start, strict=True):
            p.copy_(value)
        first = [old is None for _, old, *_ in seen]
        assert sum(b.num_seqs for b, old, *_ in seen if old is None) == seen[0][3]  # the first minibatch, and no other
        num_first = first.index(False)
        assert first == [True] * num_first + [False] * (len(seen) - num_first)
        for batch, old, *_ in seen[num_first:]:
            torch.testing.assert_close(old, token_logprobs(trainer.parts.model, batch, 1.0), rtol=0, atol=1e-6)
    assert sum(b.num_seqs for b, *_ in seen) == 16  # four prompts, four kept
    left = 0
    for batch, _, num_tokens, num_seqs in seen:  # every pass is given the counts of its whole minibatch
        left = left or num_seqs
        left -= batch.num_seqs
        assert 0 <= left < num_seqs
        assert num_tokens >= num_seqs
    assert left == 0


# -------------------- refusals


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"preset": "reinforce-ada-balanc"}, r"^config \[sampling\]: preset = .*; did you mean 'reinforce-ada-balance'"),
        ({"engine": "vlm"}, r"engine = 'vlm'"),
        ({"task": "chain_sums"}, r"^task: unknown reasoning-gym dataset 'chain_sums'; .*; did you mean 'chain_sum'\?$"),
        ({"task": "absent.jsonl"}, r"^task: cannot read absent.jsonl"),
        ({"model": "absent/../folder"}, r"^model: 'absent/../folder' is no folder"),
        ({"reward": "toy_rewards:absent"}, r"toy_rewards:absent"),
        ({"clip_low": 5.0}, r"^config \[training\]: clip_low = 5.0; a number from 0 to 1$"),
        ({"clip_low": 5.0, "loss": "gspo", "rollout_correction": "sequence-mask"}, r"^config \[training\]: clip_low = 5.0"),
        ({"loss": "pppo"}, r"^policy_loss: unknown loss 'pppo'; .*; did you mean 'ppo'\?$"),
        ({"loss": "no_such_module:f"}, r"^train: loss 'no_such_module:f': No module named 'no_such_module'; an importable module"),
        ({"loss": "math:hypot"}, r"^train: loss math:hypot: (Value|Type)Error: .*; one loss a token from \(logprobs, old_logprobs, advan"),
        ({"memory_from": "absent"}, r"^RolloutStore: absent/rollouts.sqlite does not exist; a store to read is needed$"),
    ],
)
def test_one_line_and_no_run_left_behind(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], message: str
) -> None:
    out = tmp_path / "run"
    if "reward" in wrong:
        monkeypatch.undo()
    with pytest.raises(InputError, match=message) as error:
        train(base, out, **wrong)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    train(base, out, steps=1, eval_prompts=0)  # the same folder, once the setting is right


@pytest.mark.usefixtures("light")
def test_an_existing_run_is_not_overwritten(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(base, out, steps=0)
    with pytest.raises(InputError, match=rf"^train: {out} holds a run already; an empty folder; --resume {out} goes on"):
        train(base, out)
    with pytest.raises(InputError, match=r"^train: .* holds no run; a folder that `reinforce-ada train` wrote$"):
        launch.train(configuration.load(None, settings(base, out)), tmp_path / "absent")
    with pytest.raises(InputError, match=r"^RolloutStore: .* was made with .*sampling.group_size=None \(now 2\)"):
        launch.train(configuration.load(None, settings(base, out, group_size=2)), out)
    assert configuration.load(out / "config.toml").sampling.group_size is None


@pytest.mark.usefixtures("light")
def test_a_folder_with_anything_in_it_is_refused_and_stays(base: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("model/mine", "figure.png", "config.toml"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=r"^train: .* holds config.toml, figure.png, model; an empty folder, or one that is not there yet"):
        train(base, tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["config.toml", "figure.png", "model", "model/mine"]
    assert {p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == {"mine"}


def test_a_damaged_base_model_is_made_again(base: Path, tmp_path: Path) -> None:
    config = configuration.load(None, {**settings(base, tmp_path), "model": "tiny", "num_examples": 0})
    said: list[str] = []
    display: Any = SimpleNamespace(line=said.append)
    records = load_records(config.task, 0, 0)
    launch._tiny_folder(config, records, tmp_path, display, is_new=True)
    first = {name: tensor.clone() for name, tensor in weights(tmp_path / "base_model").items()}  # not the file, which changes
    path = tmp_path / "base_model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    launch._tiny_folder(config, records, tmp_path, display, is_new=False)
    assert same(weights(tmp_path / "base_model"), first)
    assert len(said) == 1
    assert said[0].startswith("base_model is made again: model: ")


def test_a_folder_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^train: cannot write to .*; a writable folder; --out names one$"):
        train(base, tmp_path / "file" / "run")


@pytest.mark.usefixtures("light")
def test_an_over_long_prompt_is_left_out_until_the_limit_is_raised(base: Path, tmp_path: Path) -> None:
    short = [{"prompt": q, "answer": "3"} for q in QUESTIONS[:5]]
    task, out = write_task(tmp_path / "task.jsonl", [*short, {"prompt": "1 + " * 60, "answer": "60"}]), tmp_path / "run"
    values = settings(base, out, task=str(task), eval_prompts=0, prompts_per_step=1, steps=6, max_model_len=64, checkpoint_every=1)
    launch.train(configuration.load(None, values))
    done = steps_of(out)
    launch.train(configuration.load(None, {**values, "steps": 8}), out)
    assert steps_of(out)[:6] == done
    assert "60" not in answers(out)
    launch.train(configuration.load(None, {**values, "steps": 16, "max_model_len": 512}), out)
    assert [r["step"] for r in steps_of(out)] == list(range(1, 17))
    assert "60" in answers(out)


def answers(out: Path) -> set[str]:
    """Of the questions that were trained on."""
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        return {record["answer"] for record in store.records()}
