"""Pieces of code, each in a fork of one process that has imported torch and nothing of ours: the import takes 2 s of a processor.

As a program: a line of JSON on standard input is [code, environment], and one on standard output [exit code, output, error].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any, NamedTuple


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Forks:
    """The process that forks; a call runs code in a fork of it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, code: str, environment: Mapping[str, str] | None = None) -> Done:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([code, dict(os.environ if environment is None else environment)]), file=self._process.stdin, flush=True)
        return Done(*json.loads(self._process.stdout.readline()))

    def checked(self, code: str, environment: Mapping[str, str] | None = None) -> str:
        """The output of code that must not fail."""
        done = self(code, environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def forks() -> Iterator[Forks]:
    process = Forks()
    try:
        yield process
    finally:
        process.close()


def _run(code: str, environment: dict[str, str]) -> list[Any]:
    with TemporaryFile("w+") as out, TemporaryFile("w+") as error:
        child = os.fork()
        if child == 0:
            _be_the_process(code, environment, out.fileno(), error.fileno())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, error):
            file.seek(0)
        return [status, out.read(), error.read()]


def _be_the_process(code: str, environment: dict[str, str], out: int, error: int) -> None:
    os.dup2(out, 1)
    os.dup2(error, 2)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    import torch  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)
