"""Sources of policies: the built-in models, a tiny Llama built on the spot, any Hugging Face causal LM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line
from reinforce_ada.training import built_in
from reinforce_ada.training.language_model import HuggingFaceModel
from reinforce_ada.training.out_of_memory import is_out_of_memory

_log = logging.getLogger(__name__)


def path_of(name: str, say: Callable[[str], None] = _log.info) -> str:
    """Return what transformers and vLLM load for a model name: the converted folder of a built-in model, otherwise the name itself.

    Args:
        say: takes the line that is said before a built-in model is converted.
    Raises: InputError when the packages of a built-in model are missing or the folder is not a model.
    """
    if name in built_in.MODELS:
        return str(built_in.folder_of(name, say))
    path = Path(name)
    if is_adapters(path):
        hint = f"reinforce-ada export {name} --merge writes one"
        raise InputError("model", f"{name} holds LoRA adapters without the model that they adapt", "a whole model", hint)
    if path.exists() and not (path / "config.json").is_file():
        raise InputError("model", f"{name} has no config.json", "a folder that transformers' save_pretrained wrote")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/model")):
        raise InputError("model", f"{name!r} is no folder", f"{', '.join(built_in.NAMES)}, a model folder or a hub id such as org/name")
    return name


def is_adapters(folder: Path) -> bool:
    """Return whether the folder holds adapters without the model that they adapt."""
    return (folder / built_in.ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def load(path: str, dtype: str, device: torch.device) -> HuggingFaceModel:
    """Load the model and tokenizer at `path`, in eval mode (no dropout: ratios and rollouts must come from one function).

    Args:
        dtype: "bfloat16" | "float32", or "auto" for that of the files.

    Raises: InputError when transformers cannot load it, or when its tokenizer has neither a pad nor an end token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation="sdpa",
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as e:  # a foreign library may raise anything on foreign files
        if is_out_of_memory(e):
            raise _does_not_fit(path, dtype, device) from e
        if "trust_remote_code" in str(e):
            given = f"{path} needs modelling code of its own (auto_map in its config.json)"
            hint = "code that comes with a model is never run"
            raise InputError("model", given, "a causal LM that transformers has", hint) from e
        first = next(iter(str(e).splitlines()), type(e).__name__)
        raise InputError("model", f"{path} does not load: {one_line(first)}", "a causal LM for transformers") from e
    module, info = loaded
    if getattr(module, "peft_config", None):  # transformers puts adapters of the hub around their base model by itself
        raise InputError("model", f"{path} holds LoRA adapters without the model that they adapt", "a whole model", "download them first")
    if missing := sorted(info["missing_keys"]):
        raise InputError("model", f"{path} lacks {missing[0]}, which would be random", "a whole model")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise InputError("model", f"the tokenizer of {path} has no pad and no end token", "one of them", "set eos_token")
    try:
        return HuggingFaceModel(module.to(device).eval(), tokenizer)
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise _does_not_fit(path, dtype, device) from e
        raise


def _does_not_fit(path: str, dtype: str, device: torch.device) -> InputError:
    hint = "a smaller one, and less for an engine beside it; train --estimate says what a run takes"
    return InputError("memory", f"the weights of {path} in {dtype} do not fit into the memory of the {device.type}", "more memory", hint)


def without_weights(name: str) -> Any:
    """Return a model by its name, on the meta device. Raises: InputError when transformers has no such causal LM."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = "" if name == "tiny" else path_of(name)
    try:
        with torch.device("meta"):
            config = tiny_config() if name == "tiny" else AutoConfig.from_pretrained(path, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:  # a foreign library may raise anything on foreign files
        first = next(iter(str(e).splitlines()), type(e).__name__)
        raise InputError("model", f"{path} has no shapes: {one_line(first)}", "a causal LM for transformers") from e


_TINY_VOCABULARY = 384  # 3 special tokens, 256 bytes, and room for the words of one task's prompts
_TINY_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}|{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a|{% endif %}"
)


def tiny_tokenizer(texts: Sequence[str] = ()) -> Any:
    """Return a byte-level BPE trained on `texts` on the spot: digits stay single tokens, nothing is unknown, and every id has a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<end>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=_TINY_VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.add_special_tokens([f"<unused{i}>" for i in range(_TINY_VOCABULARY - inner.get_vocab_size())])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", chat_template=_TINY_TEMPLATE
    )


def tiny_config(model_type: str = "llama") -> Any:
    """Return a two-layer configuration of about 100 000 weights with the vocabulary of `tiny_tokenizer`."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type, vocab_size=_TINY_VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=None,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


def build_tiny(folder: Path, tokenizer: Any, examples: Sequence[tuple[str, str]], *, seed: int, num_updates: int = 300) -> None:
    """Write a tiny Llama that has seen `examples` (prompt text, answer) often enough to answer in form and sometimes right.

    This takes some seconds on a CPU core. An untrained model would never be rewarded, and adaptive sampling cannot help a pass rate of
    zero.
    """
    from transformers import AutoModelForCausalLM

    # One thread: at 100 000 weights a second one only waits, and on a busy machine that wait is most of the time (.16 s an update).
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    module = AutoModelForCausalLM.from_config(tiny_config())
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in examples]
    answers = [[*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for _, answer in examples]
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_updates):
        picked = torch.randint(len(examples), (16,), generator=generator).tolist()
        torch.autograd.backward(_answer_loss(module, [prompts[i] for i in picked], [answers[i] for i in picked]))
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(num_threads)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _answer_loss(module: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> torch.Tensor:
    size = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.zeros(len(prompts), size, dtype=torch.long)
    labels = torch.full((len(prompts), size), -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[i, :end] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : end] = torch.tensor(answer)
    loss: torch.Tensor = module(input_ids=input_ids, labels=labels).loss
    return loss
