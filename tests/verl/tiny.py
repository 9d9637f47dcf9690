"""Builds what a run needs and no network has to deliver: a model of 84,416 weights, its tokenizer, and sums of one-digit numbers.

`python tiny.py FOLDER` writes FOLDER/model, FOLDER/train.parquet (64 rows) and FOLDER/val.parquet (16 rows). A completion of the model is
right with a probability between 0.14 and 0.53, 0.31 on average.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pandas
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_TRAIN, NUM_VAL = 64, 16
CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<eos>", "<unk>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character, the two roles and the end, and a chat template."""
    words = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = Split(Regex("."), "isolated"), Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def rows(num_rows: int, split: str) -> list[dict]:
    """Return `num_rows` sums in verl's format; the same split always gives the same rows."""
    draw = random.Random(split)
    pairs = draw.sample([(a, b) for a in range(10) for b in range(10)], num_rows)
    return [
        {
            "data_source": "one_digit_sums",
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"split": split, "index": index},
        }
        for index, (a, b) in enumerate(pairs)
    ]


def warm_up(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, num_steps: int) -> None:
    """Teach the model the form of an answer and some of the sums, so that the first groups have right and wrong completions.

    Every step is one AdamW step on all 100 sums, right-padded, with the loss on the answer and the end.
    """
    sums = [(f"<user>{a}+{b}=<assistant>", f"{a + b}<eos>") for a in range(10) for b in range(10)]
    texts = [tok(prompt + answer, add_special_tokens=False).input_ids for prompt, answer in sums]
    starts = [len(tok(prompt, add_special_tokens=False).input_ids) for prompt, _ in sums]
    width = max(map(len, texts))
    ids = torch.tensor([text + [tok.pad_token_id] * (width - len(text)) for text in texts])
    place = torch.arange(width)
    answer = (place >= torch.tensor(starts)[:, None]) & (ids != tok.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        loss = model(input_ids=ids, labels=ids.masked_fill(~answer, -100), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def model(tok: PreTrainedTokenizerFast, *, seed: int = 0, num_warm_up_steps: int = 40) -> LlamaForCausalLM:
    """Return a Llama with 2 layers of width 64 whose weights are a function of `seed` and of the length of the warm-up."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    built = LlamaForCausalLM(config)
    warm_up(built, tok, num_warm_up_steps)
    return built


def build(folder: Path) -> None:
    """Write the model, its tokenizer and the two data sets into a folder."""
    tok = tokenizer()
    model(tok).save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    pandas.DataFrame(rows(NUM_TRAIN, "train")).to_parquet(folder / "train.parquet")
    pandas.DataFrame(rows(NUM_VAL, "val")).to_parquet(folder / "val.parquet")


def main() -> None:
    """Build everything into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)


if __name__ == "__main__":
    main()
