"""What a resumed run must find again: the weights of its base, by a digest that is cheap and finds every other model."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.training import inputs, launch, models
from reinforce_ada.training.inputs import base_digest

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    models.build_tiny(folder, models.tiny_tokenizer(["1 + 1 ="]), [("1 + 1 =", "2")], seed=0, num_updates=1)
    return folder


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def trained_on(folder: Path) -> None:
    """One matrix of it has moved a little: what a merged adapter or a few steps of training leave."""
    tensors = load_file(folder / WEIGHTS)
    name = sorted(name for name in tensors if "q_proj" in name)[0]
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# -------------------- the digest


def test_it_is_of_the_weights_alone(base: Path) -> None:
    digest = base_digest(str(base))
    assert len(digest) == 32
    (base / "README.md").write_text("what else the folder holds")
    moved = base.rename(base.with_name("elsewhere"))
    assert base_digest(str(moved)) == digest
    trained_on(moved)
    assert base_digest(str(moved)) != digest


@given(at=st.integers(0, 40_000))
def test_every_byte_of_a_small_file_counts(at: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.json").write_text("{}")
    content = bytearray(40_001)
    (folder / WEIGHTS).write_bytes(content)
    before = base_digest(str(folder))
    content[at] = 1
    (folder / WEIGHTS).write_bytes(content)
    assert base_digest(str(folder)) != before
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    assert base_digest(str(folder)) != before


@given(st.integers(0, 2**40))
def test_blocks_are_spread_over_the_whole_file(size: int) -> None:
    starts = inputs._starts(size)
    block, most = inputs._BLOCK_BYTES, inputs._NUM_BLOCKS
    assert len(starts) <= most
    assert starts == sorted(starts)
    if size <= block * (most - 1):  # whole: next to each other, up to the end
        assert starts == list(range(0, size, block))
    else:
        assert (starts[0], starts[-1]) == (0, size - block)
        assert max(b - a for a, b in pairwise(starts)) <= (size - block) / (most - 1) + 1


def test_what_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert base_digest("tiny") == ""
    assert base_digest(str(tmp_path)) == ""


def test_a_model_of_the_hub_has_that_of_its_cached_files(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached: dict[tuple[str, str], str] = {("org/name", "config.json"): str(base / "config.json")}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: cached.get((repo, name)))
    assert base_digest("org/name") == base_digest(str(base))
    assert base_digest("org/other") == ""  # not here yet


# -------------------- runs


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(what differs) -> the run is trained, or goes on."""
    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    out = tmp_path / "run"
    settings: dict[str, Any] = {
        "model": str(base), "dtype": "float32", "device": "cpu", "engine": "transformers", "task": "chain_sum", "num_examples": 0,
        "eval_prompts": 1, "eval_k": 1, "prompts_per_step": 2, "group_size": 2, "steps": 1, "max_tokens": 2, "max_model_len": 256,
        "system_prompt": "", "lora_rank": 2, "out": str(out),
    }  # fmt: skip

    def train(**changed: Any) -> Path:
        saved = out / "config.toml"
        goes_on = saved.is_file()
        config = configuration.load_saved(saved, changed) if goes_on else configuration.load(None, {**settings, **changed})
        launch.train(config, out if goes_on else None)
        return out

    return train


def test_adapters_do_not_go_on_with_another_base_at_the_same_path(run: Any, base: Path, llama: Path) -> None:
    out = run()
    trained_on(base)
    with pytest.raises(InputError) as refused:
        run(steps=2)
    assert str(refused.value) == (
        f"train: the weights of {base} are not those with which the run began; the same base model; "
        "put them back, or begin a new run with another --out"
    )
    shutil.rmtree(base)
    moved = Path(shutil.copytree(llama, base.with_name("moved-and-renamed")))
    run(steps=2, model=str(moved))  # the same weights, wherever they stand
    with RolloutStore(out / "rollouts.sqlite", read_only=True) as store:
        assert store.finished_steps() == [1, 2]
        assert store.run["base"] == base_digest(str(llama))


@pytest.mark.slow
def test_a_run_that_knows_no_digest_goes_on_by_the_name_of_the_folder(run: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "base_digest", lambda model: "")  # as before there was one
    run()
    monkeypatch.undo()
    monkeypatch.setattr(launch, "finish", lambda out, display: None)
    other = Path(shutil.copytree(base, base.with_name("other")))
    with pytest.raises(InputError, match=r"^RolloutStore: .* was made with model.model=.*llama \(now .*other\)"):
        run(steps=2, model=str(other))
    (base.parent / "there").mkdir()
    run(steps=2, model=str(base.rename(base.parent / "there/llama")))
