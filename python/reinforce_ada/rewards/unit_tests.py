"""The reward for programs in Python: the record's unit tests, run in a limited process. It is off unless a setting allows it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from reinforce_ada.errors import InputError
from reinforce_ada.rewards.answers import after_thoughts
from reinforce_ada.types import Prompt

_WHERE = "reward python"
_RUNNER = str(Path(__file__).with_name("sandbox.py"))
_SECONDS = 5  # of processor time, and of wall time
_MEMORY_BYTES = 512 << 20  # of address space
_FENCE = re.compile(r"^[ \t]*```[^\n`]*$", re.MULTILINE)


class UnitTests:
    """The reward 1.0 if a program passes all tests in `prompt.data["tests"]`, otherwise 0.0.

    The program is the last fenced block (```) of the completion, otherwise the whole text after a model's thoughts. The tests are Python
    statements, a text or a list of texts, which run after it in the same namespace and raise if it is wrong. Both run in a fresh process
    with 5 s, 512 MiB of address space, files of 1 MiB in a folder of their own, no input, and the standard library alone. On Linux the
    process can start no other, signal none, open no network connection and change no file elsewhere, as far as the kernel has seccomp and
    Landlock. docs/rewards.md says what this does not protect from.

    Raises: InputError when the record has no tests.
    """

    def __call__(self, prompt: Prompt, completion: str) -> float:
        return float(_passes(_program(after_thoughts(completion)), tests_of(prompt)))

    def timed_out(self, prompt: Prompt, completion: str) -> float:
        """Return 0.0: a program that does not end in time has failed."""
        return 0.0


def tests_of(prompt: Prompt) -> list[str]:
    """Return the tests of a record. Raises: InputError when there are none."""
    tests = prompt.data.get("tests")
    found = [tests] if isinstance(tests, str) else list(tests) if isinstance(tests, Sequence) else []
    if not found or not all(isinstance(test, str) and test.strip() for test in found):
        given = f"prompt {prompt.prompt_id!r} has no tests"
        raise InputError(_WHERE, given, 'data["tests"], a text or a list of texts of Python statements, is needed')
    return found


def _program(text: str) -> str:
    fences = list(_FENCE.finditer(text))
    if not fences:
        return text
    last = fences[-1] if len(fences) % 2 else fences[-2]
    return text[last.end() :] if last is fences[-1] else text[last.end() : fences[-1].start()]


def _passes(code: str, tests: Sequence[str]) -> bool:
    token = secrets.token_hex(16)  # an exit code would let sys.exit(0) pass
    order = {"code": code, "tests": tests, "token": token, "memory_bytes": _MEMORY_BYTES, "seconds": _SECONDS}
    environment = {"PYTHONHASHSEED": "0"}  # the same completion gets the same reward
    with tempfile.TemporaryDirectory(prefix="answer-") as folder, tempfile.TemporaryFile() as report:
        command = [sys.executable, "-s", "-S", "-B", _RUNNER]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=report, stderr=subprocess.DEVNULL, cwd=folder, env=environment, start_new_session=True
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(json.dumps(order).encode(), timeout=_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        return report.read(1 << 10) == token.encode()
