"""What `--reward` may name, and the one line for what it may not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_reward_pool import score

from reinforce_ada.errors import InputError
from reinforce_ada.loading import described
from reinforce_ada.rewards import RewardPool
from reinforce_ada.rewards.loading import MAX_REWARD, as_reward, check_reward
from reinforce_ada.rewards.names import load_reward

FILES = {
    "rwd.py": "import helper_of_rwd\n\ndef ok(prompt, text):\n    return helper_of_rwd.VALUE\n\nclass Keeper:\n    @staticmethod\n"
    "    def inner(prompt, text):\n        return 0.25\n\nVALUE = 3\n\nasync def later(prompt, text):\n    return 1.0\n",
    "helper_of_rwd.py": "VALUE = 0.5\n",
    "json.py": "def score(prompt, text):\n    return 0.75\n",
    "package_of_rwd/__init__.py": "",
    "package_of_rwd/inner.py": "def ok(prompt, text):\n    return 1.0\n",
    "sub/rwd.py": "def ok(prompt, text):\n    return 0.125\n",
    "breaks.py": "import no_such_module_anywhere\n",
    "wrong.py": "def ok(prompt, text)\n    return 1.0\n",
    "raises.py": "raise ValueError('two\\nlines')\n",
    "exits.py": "import sys; sys.exit(0)\n",
    "binary.py": "\0",
    "text.txt": "",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules, in which the command runs."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in set(sys.modules) & {"rwd", "helper_of_rwd", "package_of_rwd"}:  # of another test of this process
        monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


GOOD = {
    "rwd:ok": 0.5,
    "./rwd.py:ok": 0.5,
    "rwd.py:ok": 0.5,
    "sub/rwd.py:ok": 0.125,
    "{}/rwd.py:ok": 0.5,
    "./rwd.py:Keeper.inner": 0.25,
    "package_of_rwd.inner:ok": 1.0,
    "./json.py:score": 0.75,  # beside the one of the standard library
}


@pytest.mark.parametrize("spec", GOOD)
def test_what_may_be_named(here: Path, spec: str) -> None:
    assert load_reward(spec.replace("{}", str(here)))(None, "") == GOOD[spec]


def test_a_worker_finds_it_too(here: Path) -> None:
    with RewardPool("./rwd.py:ok", num_workers=1) as pool:
        assert score(pool, ["x"]) == [0.5]


BAD = {
    "rwd": 'the form "module:function" or "file.py:function" is needed',
    "rwd:": "the form",
    ":ok": "the form",
    "./rwd.py": "the form",
    "./rwd.py:absent": "has no attribute 'absent'",
    "./rwd.py:ok.deeper": "has no attribute 'deeper'",
    "./rwd.py:VALUE": "is not callable",
    "./rwd.py:Keeper": "is a class",
    "./rwd.py:later": "is an async function",
    "./none.py:ok": "there is no file {}/none.py",
    "{}:ok": "there is no file {}",
    "./text.txt:ok": "is no Python file",
    "json:score": "another module has that name; ./json.py:score loads the file",
    "no_such_module_anywhere:ok": "No module named 'no_such_module_anywhere'; an importable module is needed",
    "package_of_rwd.none:ok": "No module named 'package_of_rwd.none'",
    "breaks:ok": "No module named 'no_such_module_anywhere'; an importable module is needed; it is imported there",
    "./breaks.py:ok": "No module named 'no_such_module_anywhere'",
    "wrong:ok": "wrong does not import (SyntaxError: expected ':', at {}/wrong.py:1)",
    "./wrong.py:ok": "SyntaxError: expected ':', at {}/wrong.py:1)",
    "./raises.py:ok": "ValueError: two lines, at {}/raises.py:1)",
    "./exits.py:ok": "SystemExit: 0, at {}/exits.py:1)",
    "./binary.py:ok": "does not import",
    "..:ok": "does not import",
    ".rwd:ok": "does not import",
    "\0:ok": "",
    "a" * 5000 + ":ok": "",
}


@pytest.mark.parametrize("spec", BAD)
def test_what_may_not_is_one_line(here: Path, spec: str) -> None:
    with pytest.raises(InputError, match=r"^--reward: reward ") as caught:
        RewardPool(spec.replace("{}", str(here)))
    assert BAD[spec].replace("{}", str(here)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_is_described_in_one_line() -> None:
    assert described(ValueError("a\nb")) == "ValueError: a b"
    check_reward(max, "max")  # a builtin has no signature to look at


@given(value=st.floats())
def test_a_reward_is_finite_and_bounded(value: float) -> None:
    if abs(value) <= MAX_REWARD:
        assert as_reward(value) == value
    else:
        with pytest.raises(ValueError, match="the reward returned"):
            as_reward(value)
