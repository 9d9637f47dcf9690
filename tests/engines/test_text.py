"""Completions as text: the same as vLLM's own incremental texts, piece by piece and for two kinds of tokenizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from reinforce_ada.engines.text import decode_after, find_stop, tail_for_stop
from reinforce_ada.training.models import tiny_tokenizer

TEXTS = ["The sum of 17 and 25 is 42.", "größer als ½, naïve café", "数学の答えは四十二", "tabs\tand  two spaces", "🙂 smile 👍🏽"]


def metaspace_tokenizer() -> Any:
    """As Llama 2's: a word carries the space before it, and decoding drops the first one."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    inner.train_from_iterator(TEXTS[:2], trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<end>", *byte_tokens]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")


@pytest.fixture(scope="module", params=["bytes", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tiny_tokenizer(TEXTS[:2]) if request.param == "bytes" else metaspace_tokenizer()


def streamed(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """What vLLM's detokenizer does, token by token."""
    stream = decoders.DecodeStream(ids=before, skip_special_tokens=True)
    return "".join(stream.step(tokenizer._tokenizer, i) or "" for i in ids)


def test_texts_are_vllms(tokenizer: Any) -> None:
    """Every cut of every text into prompt and completion."""
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        for cut in range(1, len(ids)):
            if "\ufffd" in tokenizer.decode(ids[:cut]):
                continue  # within a character: vLLM repeats the prompt's text there
            for end in range(cut, len(ids) + 1):
                assert decode_after(tokenizer, ids[:cut], ids[cut:end]) == streamed(tokenizer, ids[:cut], ids[cut:end])


def test_a_word_keeps_its_space(tokenizer: Any) -> None:
    before, after = (tokenizer(t, add_special_tokens=False).input_ids for t in ("The sum", "The sum is 42"))
    assert after[: len(before)] == before
    assert decode_after(tokenizer, before, after[len(before) :]) == " is 42"


def test_special_tokens_have_no_text(tokenizer: Any) -> None:
    ids = tokenizer("42", add_special_tokens=False).input_ids
    end = tokenizer.eos_token_id
    assert decode_after(tokenizer, [*tokenizer("The", add_special_tokens=False).input_ids, end], [end, *ids, end]).strip() == "42"


def test_an_unfinished_character_is_left_out() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a½").input_ids
    assert len(ids) == 3
    assert [decode_after(tokenizer, ids[:1], ids[1:n]) for n in (1, 2, 3)] == ["", "", "½"]


def test_nothing_before_and_nothing_after(tokenizer: Any) -> None:
    ids = tokenizer("42", add_special_tokens=False).input_ids
    assert decode_after(tokenizer, [], ids) == "42"
    assert decode_after(tokenizer, ids, []) == ""


@pytest.mark.parametrize(
    ("text", "stop", "at"),
    [
        ("", ["a"], -1),
        ("abc", [], -1),
        ("abc", ["c"], 2),
        ("abc", ["c", "b"], 1),
        ("abcabc", ["bc", "abc"], 0),
        ("abc", ["abcd"], -1),
    ],
)
def test_the_first_stop_string(text: str, stop: list[str], at: int) -> None:
    assert find_stop(text, stop) == at


def test_a_stop_string_shows_in_the_tail(tokenizer: Any) -> None:
    """However it is cut into tokens: the tail holds every stop string that the last token completes."""
    stops = ["½, na", "四十", "👍🏽", " two", "42."]
    assert tail_for_stop([]) == 0
    rng = np.random.default_rng(0)
    for text in TEXTS:
        prefix = "".join(rng.choice(list("abc 123"), 20))
        ids = tokenizer(prefix + text, add_special_tokens=False).input_ids
        before = tokenizer("Q: ", add_special_tokens=False).input_ids
        for end in range(1, len(ids) + 1):
            whole = decode_after(tokenizer, before, ids[:end])
            earlier = decode_after(tokenizer, before, ids[: end - 1])
            for stop in stops:
                tail = ids[:end][-tail_for_stop([stop]) :]
                completes = stop in whole and stop not in earlier
                if completes:
                    assert find_stop(decode_after(tokenizer, before, tail), [stop]) >= 0
