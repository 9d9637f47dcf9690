"""LoRA: what is merged, stored, loaded and refused. tests/engines/test_adapters_arrive.py asks whether adapters arrive in engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reinforce_ada import cli
from reinforce_ada import config as configuration
from reinforce_ada.config import ModelConfig
from reinforce_ada.errors import InputError
from reinforce_ada.training import adapters, launch, launch_eval, models
from reinforce_ada.training.log import read_log
from reinforce_ada.training.trainer import compared, fingerprint

RANK, WIDTH, INNER, KEY = 4, 64, 128, 32  # of the tiny Llama: hidden, feed-forward, one key-value head
# in + out of q, k, v, o, gate, up and down, twice
EPS = torch.finfo(torch.float32).eps
NUM_WEIGHTS = 2 * RANK * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + KEY) + 2 * (WIDTH + INNER) + (INNER + WIDTH))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama that answers now and then."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    texts = [f"{a} + {b} =" for a in range(4) for b in range(4)]
    models.build_tiny(folder, models.tiny_tokenizer(texts), [(t, "3") for t in texts], seed=0, num_updates=30)
    return str(folder)


def new(base: str, dtype: str = "float32", seed: int = 0, **settings: Any) -> adapters.AdaptedModel:
    loaded = models.load(base, dtype, torch.device("cpu"))
    return adapters.add(loaded, ModelConfig(**{"lora_rank": RANK, **settings}), seed)


def trained(model: adapters.AdaptedModel) -> dict[str, Tensor]:
    return {name: p for name, p in model.module.named_parameters() if p.requires_grad}


@torch.no_grad()
def draw(model: adapters.AdaptedModel, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in trained(model).values():
        p.copy_(scale * torch.randn(p.shape, generator=generator))


# -------------------- the model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_w_plus_s_b_a_rounded_once_from_the_loaded_w(base: str, dtype: str) -> None:
    """After 20 updates too, beside float64: within the error bound of a float32 sum, and half a unit of the dtype."""
    loaded = models.load(base, dtype, torch.device("cpu")).module.state_dict()
    model = new(base, dtype, lora_alpha=12)
    for seed in range(20):
        draw(model, seed, 0.3 if seed % 2 else 0.01)
        sent = dict(model.named_tensors())
    assert list(sent) == list(loaded)
    assert {name: t.dtype for name, t in sent.items()} == {name: t.dtype for name, t in loaded.items()}
    changed = set()
    for name, tensor in sent.items():
        a, b = (trained(model).get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.default.weight") for x in "AB")
        if a is None or b is None:
            assert torch.equal(tensor, loaded[name])
            continue
        assert (a.dtype, b.dtype, a.shape[0]) == (torch.float32, torch.float32, RANK)
        truth = loaded[name].double() + 12 / RANK * b.double() @ a.double()
        magnitude = loaded[name].double().abs() + 12 / RANK * b.double().abs() @ a.double().abs()
        of_the_sum, of_the_rounding = (RANK + 3) * EPS * magnitude, torch.finfo(tensor.dtype).eps / 2 * truth.abs()
        assert ((tensor.double() - truth).abs() <= of_the_sum + of_the_rounding).all()
        changed.add(name.split(".")[-2])
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    frozen = {n.replace(".base_layer.", "."): t for n, t in model.causal_lm.state_dict().items() if ".lora_" not in n}
    assert all(torch.equal(frozen[name], loaded[name]) for name in loaded)  # nothing was merged in place


def test_nothing_changes_before_the_first_update(base: str) -> None:
    plain, model = models.load(base, "float32", torch.device("cpu")), new(base)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.module(input_ids=ids).logits, plain.module(input_ids=ids).logits)
    assert all(torch.equal(sent, own) for (_, sent), own in zip(model.named_tensors(), plain.module.state_dict().values(), strict=True))


def test_adapters_are_drawn_from_their_seed_alone(base: str) -> None:
    """A resumed run finds torch's generator in another state than a new one, which builds its base model first."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = trained(new(base, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = trained(new(base, seed=3)), trained(new(base, seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert sum(p.numel() for p in first.values()) == NUM_WEIGHTS


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("q_proj, v_proj", {"q_proj", "v_proj"}),
        ("self_attn.o_proj", {"o_proj"}),
    ],
)
def test_targets(base: str, targets: str, expected: set[str]) -> None:
    model = new(base, lora_targets=targets)
    assert {name.rpartition(".")[2] for name in model.adapted} == expected
    assert len(model.adapted) == 2 * len(expected)  # layers


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_porj", "train: unknown linear layer 'q_porj'; known: down_proj, gate_proj, .*; did you mean 'q_proj'?"),
        ("q_proj,embed_tokens", "unknown linear layer 'embed_tokens'"),  # no linear layer
        ("q_proj,lm_head", "lora_targets names lm_head, the output head; other linear layers; all-linear leaves it out"),
        (",", "unknown linear layer ''"),
    ],
)
def test_targets_that_are_refused(base: str, targets: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        new(base, lora_targets=targets)


@pytest.mark.parametrize("key", ["lora_alpha", "lora_targets"])
def test_a_setting_without_a_rank_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="lora_alpha or lora_targets with lora_rank 0; a rank above 0"):
        configuration.load(None, {key: {"lora_alpha": "8", "lora_targets": "q_proj"}[key]})


def test_the_scale_is_two_at_every_rank_by_default(base: str) -> None:
    for rank in (1, 8):
        model = new(base, lora_rank=rank)
        assert {layer.scaling["default"] for layer in model.adapted.values()} == {2.0}


# -------------------- a run and its folder


def flags(base: str, task: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": base, "dtype": "float32", "engine": "transformers", "task": str(task), "lora_rank": RANK, "steps": 2,
        "prompts_per_step": 4, "eval_prompts": 4, "eval_k": 2, "max_tokens": 4, "max_model_len": 128, "learning_rate": 3e-2,
        "warmup_steps": 0,        "checkpoint_every": 1, "minibatches": 2, "out": str(out), **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("task") / "task.jsonl"
    lines = [json.dumps({"prompt": f"{a} + {b} =", "answer": "3"}) for a in range(4) for b in range(4)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def run(base: str, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "run"
    launch.train(configuration.load(None, flags(base, task, out)))
    return out


def test_a_run_learns_and_keeps_adapters_alone(run: Path, base: str) -> None:
    """Bytes: A and B once in the model, and three times (master, two moments) in what resumes the trainer, all float32."""
    steps = [r for r in read_log(run / "log.jsonl") if r["kind"] == "step"]
    assert all(r["grad_norm"] > 0 for r in steps)
    kept = load_file(run / "model" / adapters.WEIGHTS)
    assert sum(t.nbytes for t in kept.values()) == 4 * NUM_WEIGHTS
    assert all(bool(t.any()) for name, t in kept.items() if "lora_B" in name)  # every module has learned
    resumes = load_file(run / "checkpoints" / "step-000002" / "trainer.safetensors")
    of_parameters = [t for name, t in resumes.items() if name.startswith(("master/", "exp_avg/", "exp_avg_sq/"))]
    assert sum(t.nbytes for t in of_parameters) == 3 * 4 * NUM_WEIGHTS
    assert sum(t.nbytes for t in resumes.values()) < 3 * 4 * NUM_WEIGHTS + 10_000  # counts of steps, and the generator's state
    assert {f.name for f in (run / "model").iterdir() if f.suffix == ".safetensors"} == {adapters.WEIGHTS}
    named = json.loads((run / "model" / adapters.CONFIG).read_text())
    assert (named["base_model_name_or_path"], named["r"], named["lora_alpha"]) == (base, RANK, 2 * RANK)


def test_a_run_that_is_resumed_ends_in_the_same_bits(run: Path, base: str, task: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launch.train(configuration.load(None, flags(base, task, out, steps=1)))
    launch.train(configuration.load_saved(out / "config.toml", {"steps": 2}), out)
    whole, resumed = (load_file(folder / "model" / adapters.WEIGHTS) for folder in (run, out))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_from_before_there_were_adapters_resumes_and_one_of_another_rank_does_not() -> None:
    now = fingerprint(configuration.load())
    before = {**now, "model": {key: value for key, value in now["model"].items() if not key.startswith("lora_")}}
    assert len(before["model"]) == len(now["model"]) - 3
    assert compared(before) == compared(now)
    assert compared(before) != compared(fingerprint(configuration.load(None, {"lora_rank": 4})))


def test_the_model_of_a_run_in_peft_and_whole(run: Path, base: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = plain(input_ids=ids).logits
    truth = PeftModel.from_pretrained(plain, str(run / "model")).eval()(input_ids=ids).logits
    assert (truth - without).abs().max() > 1e-3
    ours = adapters.load(run / "model", "float32", torch.device("cpu"))
    assert torch.equal(ours.module(input_ids=ids).logits, truth)
    folder = tmp_path / "whole"
    assert cli.main(["export", str(run), "--merge", str(folder)]) == 0
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (whole(input_ids=ids).logits - truth).abs().max() < 1e-5
    saved, sent = load_file(folder / "model.safetensors"), dict(ours.named_tensors())
    assert all(torch.equal(saved[name], sent[name]) for name in saved)  # what engines got is what is exported


def test_an_export_destroys_nothing(run: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("")
    for arguments, said in (
        ([str(run), "--merge", str(tmp_path)], f"export: {tmp_path} is not empty; a folder that is empty or not there yet"),
        ([str(tmp_path / "gone"), "--merge"], f"export: {tmp_path / 'gone'} is no folder; a run that has ended, or a folder of adapters"),
        ([base, "--merge"], f"export: {base} has no adapter_config.json; a run with LoRA adapters, or a folder of some"),
    ):
        assert cli.main(["export", *arguments]) == 2
        assert said in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_an_evaluation_of_adapters_is_that_of_the_whole_model(run: Path, tmp_path: Path) -> None:
    config = configuration.load_saved(run / "config.toml")
    cli.main(["export", str(run), "--merge", str(tmp_path / "whole")])
    of_adapters, of_whole = (
        launch_eval.evaluate_model({"sums": config}, str(folder))[0].evaluation for folder in (run / "model", tmp_path / "whole")
    )
    assert of_adapters == of_whole
    last = [r for r in read_log(run / "log.jsonl") if r["kind"] == "eval"][-1]
    assert list(of_adapters.per_prompt) == last["per_prompt"]


# -------------------- what is refused


def test_training_does_not_begin_with_adapters(run: Path, task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--model", str(run / "model"), "--task", str(task), "--eval-prompts", "4"]) == 2
    said = capsys.readouterr().err
    assert f"{run / 'model'} holds LoRA adapters without the model that they adapt; a whole model; reinforce-ada export" in said


def test_adapters_away_from_their_run_find_the_model_they_name(run: Path, base: str, tmp_path: Path) -> None:
    away = shutil.copytree(run / "model", tmp_path / "away")
    assert adapters.base_of(away) == adapters.base_of(run / "model") == base
    named = json.loads((away / adapters.CONFIG).read_text())
    for value, said in ((str(tmp_path / "gone"), "which is not there"), (None, "which is not there")):
        (away / adapters.CONFIG).write_text(json.dumps({**named, "base_model_name_or_path": value}))
        with pytest.raises(InputError, match=said):
            adapters.base_of(away)
    (away / adapters.CONFIG).write_text("[")
    with pytest.raises(InputError, match="names no base model"):
        adapters.base_of(away)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"use_dora": True}, "has use_dora = True"), ({"bias": "all"}, "has bias = 'all'"), ({"peft_type": "IA3"}, "of the kind|do not load")],
)
def test_adapters_of_another_kind_are_refused(run: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    away = shutil.copytree(run / "model", tmp_path / "away")
    (away / adapters.CONFIG).write_text(json.dumps({**json.loads((away / adapters.CONFIG).read_text()), **change}))
    with pytest.raises(InputError, match=said):
        adapters.load(away, "float32", torch.device("cpu"))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_adapters_of_the_head_or_of_an_embedding_are_refused(base: str, tmp_path: Path, name: str) -> None:
    """What others have trained may have them."""
    from peft import LoraConfig, get_peft_model

    loaded = models.load(base, "float32", torch.device("cpu"))
    module = get_peft_model(loaded.module, LoraConfig(r=2, target_modules=["q_proj", name], task_type="CAUSAL_LM"))
    adapters.AdaptedModel(module, loaded.tokenizer).save(tmp_path)
    with pytest.raises(InputError, match=f"adapts .*{name}; adapters of linear layers other than the output head"):
        adapters.load(tmp_path, "float32", torch.device("cpu"))


def test_adapters_that_do_not_fit_are_refused(run: Path, tmp_path: Path) -> None:
    """peft only warns, and the model is then as without them."""
    from safetensors.torch import save_file

    away = shutil.copytree(run / "model", tmp_path / "away")
    kept = load_file(away / adapters.WEIGHTS)
    first, *others = kept
    for tensors, said in (
        ({name: kept[name] for name in others}, "does not fit: base_model.model.model.layers.0"),
        ({**kept, first.replace("layers.0", "layers.7"): kept[first].clone()}, "does not fit: base_model.model.model.layers.7"),
        ({**kept, first: kept[first][:1].clone()}, "do not load: "),
    ):
        save_file(tensors, away / adapters.WEIGHTS)
        with pytest.raises(InputError, match=said):
            adapters.load(away, "float32", torch.device("cpu"))
