"""Errors that a user can mend."""

from __future__ import annotations

import pickle

import pytest

from reinforce_ada.errors import InputError
from reinforce_ada.training.distributed import RankError


@pytest.mark.parametrize("hint", ["", "--cpus 2"])
def test_an_error_of_another_process_is_the_same_here(hint: str) -> None:
    error = InputError("engine", "9 cores", "at most 2", hint)
    assert str(error) == "engine: 9 cores; at most 2" + (f"; {hint}" if hint else "")
    for sent in (error, RankError("rank 1 is gone")):
        came = pickle.loads(pickle.dumps(sent))
        assert type(came) is type(sent)
        assert str(came) == str(sent)
