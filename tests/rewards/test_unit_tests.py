"""The reward python: programs that pass, fail, cheat and misbehave, each in a real process; and that nothing runs unless it is allowed."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
from test_reward_pool import score

from reinforce_ada.errors import InputError
from reinforce_ada.rewards import RewardPool, UnitTests, names, sandbox, unit_tests
from reinforce_ada.types import Prompt

F = "def f(x):\n    return x + 1\n"
TESTS = ["assert f(1) == 2", "assert f(-1) == 0"]
LINUX = sys.platform.startswith("linux") and os.uname().machine in sandbox._ARCHITECTURES
HAS_LANDLOCK = LINUX and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
needs_linux = pytest.mark.skipif(not LINUX, reason="system calls are filtered on Linux, x86-64 and aarch64")
needs_landlock = pytest.mark.skipif(not HAS_LANDLOCK, reason="this kernel has no Landlock")

PROGRAMS = [
    pytest.param(F, 1.0, id="right"),
    pytest.param(f"Here it is:\n```python\n{F}```\nIt adds one.", 1.0, id="fenced"),
    pytest.param(f"```\ndef f(x): return 0\n```\nNo:\n```python\n{F}", 1.0, id="the last block, not closed"),
    pytest.param(f"<think>f(x) is hard</think>{F}", 1.0, id="after thoughts"),
    pytest.param("def f(x):\n    return x\n", 0.0, id="wrong"),
    pytest.param("def f(x) return x", 0.0, id="no Python"),
    pytest.param("", 0.0, id="empty"),
    pytest.param("\0", 0.0, id="NUL"),
    pytest.param("\ud800", 0.0, id="half of a surrogate pair"),
    pytest.param("import sys; sys.exit(0)", 0.0, id="exit"),
    pytest.param("import os; os._exit(0)", 0.0, id="os._exit"),
    pytest.param("print('x' * 10**6)\n" + F, 1.0, id="prints"),
    pytest.param("input()\n" + F, 0.0, id="reads its input"),
    pytest.param("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()\n" + F, 1.0, id="thread"),
    pytest.param("x = bytearray(1 << 30)\n" + F, 0.0, id="memory"),
    pytest.param("open('own', 'w').write('x')\n" + F, 1.0, id="own file"),
    pytest.param("open('own', 'w').write('x' * (1 << 22))\n" + F, 0.0, id="long file"),
    pytest.param("import numpy\n" + F, 0.0, id="a package"),
    pytest.param("import socket; socket.socket()\n" + F, 0.0, id="network", marks=needs_linux),
    pytest.param("import os; os.fork()\n" + F, 0.0, id="fork", marks=needs_linux),
    pytest.param("import subprocess, sys; subprocess.run([sys.executable, '-V'])\n" + F, 0.0, id="process", marks=needs_linux),
    pytest.param("import os; os.kill(os.getppid(), 0)\n" + F, 0.0, id="signal", marks=needs_linux),
]


@pytest.mark.parametrize(("completion", "reward"), PROGRAMS)
def test_a_program(completion: str, reward: float) -> None:
    assert UnitTests()(Prompt("p", data={"tests": TESTS}), completion) == reward


@pytest.mark.parametrize("how", ["open({!r}, 'w')", "os.unlink({!r})", "os.rename({!r}, 'own')", "os.truncate({!r}, 0)"])
@needs_landlock
def test_a_program_changes_no_other_file(tmp_path: Path, how: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    assert UnitTests()(Prompt("p", data={"tests": TESTS}), f"import os\n{how.format(str(victim))}\n{F}") == 0.0
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("wait", ["while True: pass", "import time; time.sleep(99)"])
def test_a_program_that_does_not_end_fails(monkeypatch: pytest.MonkeyPatch, wait: str) -> None:
    monkeypatch.setattr(unit_tests, "_SECONDS", 1)
    assert UnitTests()(Prompt("p", data={"tests": TESTS}), wait) == 0.0
    assert UnitTests().timed_out(Prompt("p"), wait) == 0.0


def test_one_text_of_tests_is_enough() -> None:
    assert UnitTests()(Prompt("p", data={"tests": "def check(g):\n    assert g(1) == 2\ncheck(f)"}), F) == 1.0


@pytest.mark.parametrize("tests", [None, "", [], [1], 3])
def test_a_record_without_tests_is_refused(tests: object) -> None:
    with pytest.raises(InputError, match=r"^reward python: prompt 'p' has no tests; "):
        UnitTests()(Prompt("p", data={"tests": tests}), F)


def test_nothing_runs_unless_it_is_allowed() -> None:
    for spec in ("python", "exact,python:0.5"):
        with pytest.raises(InputError, match=r"^--reward: reward 'python' runs code that the model wrote; run_code = true") as caught:
            RewardPool(spec)
        assert "\n" not in str(caught.value)
    assert not names.needs_answer("python")
    with RewardPool("python", num_workers=1, run_code=True) as pool:
        assert score(pool, [F, "def f(x): return x"], data={"tests": TESTS}) == [1.0, 0.0]
