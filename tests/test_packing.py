"""Packed tokens: any ids and logprobs come back to the bit, and realistic ones are small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reinforce_ada.packing import pack, unpack


@given(data=st.data(), count=st.integers(0, 40), largest=st.sampled_from([1, 255, 256, 65535, 65536, 2**24, 2**31 - 1]))
def test_everything_comes_back(data: st.DataObject, count: int, largest: int) -> None:
    smallest = data.draw(st.sampled_from([0, -1, -(2**31)]))
    ids = data.draw(arrays(np.int32, count, elements=st.integers(smallest, largest)))
    bits = data.draw(arrays(np.uint32, count, elements=st.integers(0, 2**32 - 1)))  # NaN with any payload too
    found = unpack(pack(ids, bits.view(np.float32)), count)
    assert [a.dtype for a in found] == [np.int32, np.float32]
    assert found[0].tobytes() == ids.tobytes()
    assert found[1].tobytes() == bits.tobytes()


@given(data=st.binary(max_size=60), count=st.integers(0, 12))
def test_other_bytes_are_an_error(data: bytes, count: int) -> None:
    try:
        ids, logprobs = unpack(data, count)
    except ValueError:
        return
    assert ids.shape == logprobs.shape == (count,)


def test_a_packed_text_that_is_cut_short_is_an_error() -> None:
    whole = pack(np.arange(100, dtype=np.int32), -np.arange(100, dtype=np.float32))
    for size in range(len(whole) - 1):
        with pytest.raises(ValueError):  # noqa: PT011 - whatever zlib says
            unpack(whole[:size], 100)


def test_500_tokens_of_a_large_vocabulary_are_small() -> None:
    """Ids by Zipf's law out of 151936, logprobs exponential: nothing in them repeats."""
    rng = np.random.default_rng(0)
    rates = 1 / np.arange(1, 151937)
    ids = rng.choice(151936, 500, p=rates / rates.sum()).astype(np.int32)
    logprobs = -rng.exponential(0.7, 500).astype(np.float32)
    assert len(pack(ids, logprobs)) < 2600  # of 4000; 2460 for SmolLM2's own at temperature 1
