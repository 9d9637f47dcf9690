"""Gemma 3 after llama.cpp: a small GGUF file, logits in float64 and tokens computed from a file, without transformers.

The form of the file and of the computation is that of convert_hf_to_gguf.py and of llm_build_gemma3 in llama.cpp: norms are stored with 1
added, the embedding is scaled by the root of its width, queries by that of the width of a head, five of six layers see a window
of positions and turn with base 10 000, and the head is the embedding. (In the model of 27 billion weights, queries have another scale.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

WINDOW = 8
PATTERN, LOCAL_BASE = 6, 10_000.0  # of every Gemma 3; no key of the file has them
_NORMAL, _CONTROL, _USER, _BYTE = 1, 3, 4, 6
_SIZES = {"embedding_length": 64, "block_count": 6, "feed_forward_length": 96, "key_length": 256, "num_heads": 2, "num_kv_heads": 1}


def tokens_of_tiny() -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and types of a vocabulary: special tokens, runs of spaces, bytes, merges, then characters."""
    rows = [(t, -1000.0, _CONTROL) for t in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")]
    rows += [("  ", -1000.0, _USER), ("   ", -1000.0, _USER)]
    rows += [(f"<0x{i:02X}>", 0.0, _BYTE) for i in range(256)]
    merges = ["in", "an", "▁a", "the", "th", "he", "▁the", "ing", "▁an"]
    # A merge needs both of its parts, whatever their scores are: "the" = "th" + "e" or "t" + "he".
    rows += [(t, -float(i), _NORMAL) for i, t in enumerate([*merges, "▁", *"abcdefghijklmnopqrstuvwxyz0123456789+=.\n"])]
    texts, scores, types = zip(*rows, strict=True)
    return list(texts), list(scores), list(types)


def write_tiny(path: Path, seed: int = 0) -> None:
    """Write a Gemma 3 of six layers whose tensors have the types of the real file: Q8_0, Q5_0 and F32."""
    s, rng = _SIZES, np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "gemma3")
    texts, scores, types = tokens_of_tiny()
    for add, value in [
        (writer.add_name, "tiny"), (writer.add_context_length, 128), (writer.add_embedding_length, s["embedding_length"]),
        (writer.add_block_count, s["block_count"]), (writer.add_feed_forward_length, s["feed_forward_length"]),
        (writer.add_head_count, s["num_heads"]), (writer.add_head_count_kv, s["num_kv_heads"]), (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_key_length, s["key_length"]), (writer.add_value_length, s["key_length"]), (writer.add_rope_freq_base, 1e6),
        (writer.add_sliding_window, WINDOW), (writer.add_tokenizer_model, "llama"), (writer.add_tokenizer_pre, "default"),
        (writer.add_token_list, texts), (writer.add_token_scores, scores), (writer.add_token_types, types), (writer.add_bos_token_id, 2),
        (writer.add_eos_token_id, 1), (writer.add_unk_token_id, 3), (writer.add_pad_token_id, 0), (writer.add_add_bos_token, True),
        (writer.add_add_space_prefix, False),
    ]:  # fmt: skip
        add(value)
    for name, array in _tiny_tensors(len(texts), rng):
        kind = {1: gguf.GGMLQuantizationType.F32}.get(array.ndim, gguf.GGMLQuantizationType.Q5_0)
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "token_embd.weight" else kind
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tiny_tensors(vocab_size: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    d, f, h = _SIZES["embedding_length"], _SIZES["feed_forward_length"], _SIZES["key_length"]
    q, kv = _SIZES["num_heads"] * h, _SIZES["num_kv_heads"] * h
    norm = {"attn_norm": d, "attn_q_norm": h, "attn_k_norm": h, "post_attention_norm": d, "ffn_norm": d, "post_ffw_norm": d}
    matrix = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q), "ffn_gate": (f, d), "ffn_up": (f, d),
              "ffn_down": (d, f)}  # fmt: skip
    yield "token_embd.weight", rng.normal(0, 0.2, (vocab_size, d)).astype(np.float32)
    yield "output_norm.weight", _norm(rng, d)
    for layer in range(_SIZES["block_count"]):
        yield from ((f"blk.{layer}.{name}.weight", _norm(rng, size)) for name, size in norm.items())
        yield from (
            (f"blk.{layer}.{name}.weight", rng.normal(0, shape[1] ** -0.5, shape).astype(np.float32)) for name, shape in matrix.items()
        )


def _norm(rng: np.random.Generator, size: int) -> np.ndarray:
    """1 + w for w in bfloat16, as in files that are made of a model in bfloat16."""
    return 1 + torch.from_numpy(rng.normal(0, 0.3, size)).bfloat16().float().numpy()


class GgufFile:
    """The metadata and the dequantized tensors of a file."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self.keys = frozenset(reader.fields)
        self.tensors = {t.name: t for t in reader.tensors}

        self._contents: dict[str, Any] = {}

    def get(self, key: str) -> Any:
        if key not in self._contents:  # to read a list of 262 144 words takes a second
            self._contents[key] = self._fields[key].contents()
        return self._contents[key]

    def size(self, key: str) -> Any:
        return self.get(f"gemma3.{key}")

    def tensor(self, name: str) -> Tensor:
        """The tensor, float32, [out, in]."""
        t = self.tensors[f"{name}.weight"]
        return torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), dtype=np.float32))


@torch.no_grad()
def logits(file: GgufFile, ids: Sequence[int], last: int, dtype: torch.dtype = torch.float64, through: torch.dtype | None = None) -> Tensor:
    """The logits of the last so many of `ids`, [last, V].

    Args:
        dtype: that of the computation.
        through: the weights are rounded to this one first.
    """

    def rounded(name: str, *, norm: bool = False) -> Tensor:
        w = file.tensor(name)
        if through is None:
            return w
        return (w - 1).to(through).float() + 1 if norm else w.to(through).float()  # a norm is kept as its difference from 1

    def weight(name: str, *, norm: bool = False) -> Tensor:
        return rounded(name, norm=norm).to(dtype)

    def rms(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + file.size("attention.layer_norm_rms_epsilon")) * weight(name, norm=True)

    embedding = rounded("token_embd")
    x = embedding[list(ids)].to(dtype) * file.size("embedding_length") ** 0.5
    for i in range(file.size("block_count")):
        is_global = (i + 1) % PATTERN == 0
        layer = f"blk.{i}"
        h = rms(x, f"{layer}.attn_norm")
        q, k, v = (_heads(h @ weight(f"{layer}.attn_{name}").T, file.size("attention.key_length")) for name in "qkv")
        base = file.size("rope.freq_base") if is_global else LOCAL_BASE
        q, k = _turned(rms(q, f"{layer}.attn_q_norm"), base), _turned(rms(k, f"{layer}.attn_k_norm"), base)
        a = _attended(q, k, v, None if is_global else file.size("attention.sliding_window"))
        x = x + rms(a @ weight(f"{layer}.attn_output").T, f"{layer}.post_attention_norm")
        h = rms(x, f"{layer}.ffn_norm")
        h = torch.nn.functional.gelu(h @ weight(f"{layer}.ffn_gate").T, approximate="tanh") * (h @ weight(f"{layer}.ffn_up").T)
        x = x + rms(h @ weight(f"{layer}.ffn_down").T, f"{layer}.post_ffw_norm")
    x = rms(x[-last:], "output_norm")
    return torch.cat([x @ rows.to(dtype).T for rows in embedding.split(1 << 14)], dim=1)


def _heads(x: Tensor, size: int) -> Tensor:
    return x.view(len(x), -1, size).transpose(0, 1)  # [heads, S, size]


def _turned(x: Tensor, base: float) -> Tensor:
    """Rotary embedding: dimension j turns with dimension j + size / 2."""
    size = x.shape[-1]
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _attended(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    behind = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    seen = (behind >= 0) & (behind < (window or len(behind)))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    mixed = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(q.shape[1], -1)


def token_ids(file: GgufFile, text: str) -> list[int]:
    """The tokens of a text: of all neighbours that a token joins, the pair of the token with the best score is joined first."""
    texts, scores, types = (file.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    id_of = {t: i for i, (t, kind) in enumerate(zip(texts, types, strict=True)) if kind == _NORMAL}
    whole = {t: i for i, (t, kind) in enumerate(zip(texts, types, strict=True)) if kind == _USER}
    ids = [file.get("tokenizer.ggml.bos_token_id")] if file.get("tokenizer.ggml.add_bos_token") else []
    split = re.compile(f"({'|'.join(map(re.escape, sorted(whole, key=len, reverse=True)))})") if whole else re.compile("(?!)")
    for part in filter(None, split.split(text)):
        if part in whole:
            ids.append(whole[part])
            continue
        pieces = list(part.replace(" ", "▁"))
        while joined := [(scores[id_of[a + b]], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in id_of]:
            at = -max(joined)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        for piece in pieces:
            ids += [id_of[piece]] if piece in id_of else [texts.index(f"<0x{byte:02X}>") for byte in piece.encode()]
    return ids
