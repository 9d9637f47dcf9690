"""Loading a model: what a tokenizer must have, and what a name that is no model is told."""

import json
import shutil

import pytest
import torch
from damages import EVERY_FILE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reinforce_ada.errors import InputError
from reinforce_ada.training import models


@pytest.fixture
def folder(tmp_path):
    AutoModelForCausalLM.from_config(models.tiny_config()).save_pretrained(tmp_path)
    return tmp_path


def load_with(folder, **tokens):
    tokenizer = models.tiny_tokenizer()
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return models.load(str(folder), "float32", torch.device("cpu"))


def test_a_tokenizer_without_pad_pads_with_its_end_token(folder):
    model = load_with(folder, pad_token=None)
    assert model.tokenizer.pad_token_id is None
    assert model.pad_id == model.tokenizer.eos_token_id == 1


def test_a_tokenizer_without_pad_and_end_token_is_said_in_one_line(folder):
    with pytest.raises(InputError, match="has no pad and no end token; one of them") as caught:
        load_with(folder, pad_token=None, eos_token=None)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_no_model(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        models.path_of(str(tmp_path))
    with pytest.raises(InputError, match="is no folder"):
        models.path_of("smolm2")
    assert models.path_of("org/name") == "org/name"


CODE = "raise SystemExit('the code of the folder has run')"


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_never_run(folder, where, monkeypatch):
    """Nor is anybody asked."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    load_with(folder)
    path = folder / where
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.Tokenizer", None]}
    changed = {**json.loads(path.read_text()), "auto_map": classes, "model_type": "foreign", "tokenizer_class": "ForeignTokenizer"}
    path.write_text(json.dumps(changed))
    (folder / "code.py").write_text(CODE)
    with pytest.raises(InputError) as caught:
        models.load(str(folder), "float32", torch.device("cpu"))
    said = str(caught.value)
    assert "needs modelling code of its own" in said
    assert said.endswith("; a causal LM that transformers has; code that comes with a model is never run")


def test_a_model_that_transformers_has_loads_without_the_code_beside_it(folder):
    load_with(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "code.Model"}}))
    (folder / "code.py").write_text(CODE)
    assert models.load(str(folder), "float32", torch.device("cpu")).module.config.model_type == "llama"


def without_a_tensor(path):
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_is_one_line(folder, name):
    load_with(folder)
    kinds = dict(EVERY_FILE)
    if name == "model.safetensors":
        kinds["a tensor missing"] = without_a_tensor
    for kind, damage in kinds.items():
        copy = folder.with_name(f"{folder.name}-{kind}")
        shutil.copytree(folder, copy)
        damage(copy / name)
        with pytest.raises(InputError, match=r"^model: ") as caught:
            models.load(str(copy), "float32", torch.device("cpu"))
        assert "\n" not in str(caught.value), kind
