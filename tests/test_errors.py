"""Errors that a user can mend."""

from __future__ import annotations

import pickle

import pytest

from reinforce_ada.errors import InputError


@pytest.mark.parametrize("hint", ["", "--cpus 2"])
def test_an_error_of_another_process_is_the_same_here(hint: str) -> None:
    error = InputError("engine", "9 cores", "at most 2", hint)
    assert str(error) == "engine: 9 cores; at most 2" + (f"; {hint}" if hint else "")
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is InputError
    assert str(there) == str(error)
