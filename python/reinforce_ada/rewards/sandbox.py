"""The process that runs one program of a model with its tests; it is started by its path and needs the standard library alone.

It reads {"code", "tests", "token", "memory_bytes", "seconds"} as JSON from standard input. It limits itself, runs the code and then each
test in the same namespace, and writes the token to standard output if none of them raises. What the program prints is dropped.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import sys
from collections.abc import Sequence
from typing import Any

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
_WRITES = 0x1FFE & ~0x0C  # every right of Landlock's version 1 but to execute (1), to read a file (4) and to list a folder (8)
_TRUNCATE = 1 << 14  # since version 3
# The architecture, the calls that start or reach other processes or open a network, clone, and clone3; numbers of 64-bit Linux.
_ARCHITECTURES = {
    "x86_64": (0xC000003E, (41, 53, 57, 58, 59, 62, 101, 129, 200, 234, 297, 302, 310, 311, 322, 424, 425, 434, 438), 56, 435),
    "aarch64": (0xC00000B7, (117, 129, 130, 131, 138, 198, 199, 221, 240, 261, 270, 271, 281, 424, 425, 434, 438), 220, 435),
}
_CLONE_THREAD = 0x10000
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026


def main() -> None:
    """Run what standard input describes; never return."""
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]
    order = json.loads(sys.stdin.read())
    report = os.dup(1)
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(devnull, fd)
    _limit(order["memory_bytes"], order["seconds"])
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform.startswith("linux"):
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _forbid_writes(libc, os.getcwd())
        _forbid_calls(libc)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for text in [order["code"], *order["tests"]]:
            exec(compile(text, "<answer>", "exec", dont_inherit=True), names)
    except BaseException:
        os._exit(1)
    os.write(report, order["token"].encode())
    os._exit(0)


def _limit(memory_bytes: int, seconds: int) -> None:
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),  # the kernel does not apply it to root; the filter of system calls forbids processes there
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _forbid_writes(libc: Any, folder: str) -> None:
    """Allow changes of files below `folder` only, where the kernel has Landlock (Linux 5.13)."""
    rights = _WRITES | (_TRUNCATE if libc.syscall(_LANDLOCK_CREATE, None, 0, 1) >= 3 else 0)
    rules = libc.syscall(_LANDLOCK_CREATE, struct.pack("Q", rights), 8, 0)
    if rules < 0:
        return
    inside = os.open(folder, os.O_PATH)
    libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, inside), 0)
    libc.syscall(_LANDLOCK_RESTRICT, rules, 0)
    os.close(inside)
    os.close(rules)


def _forbid_calls(libc: Any) -> None:
    """Let system calls of `_ARCHITECTURES` fail with EPERM, where the kernel has seccomp."""
    if os.uname().machine not in _ARCHITECTURES:
        return
    audit, forbidden, clone, clone3 = _ARCHITECTURES[os.uname().machine]
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    # Another architecture (32-bit calls) or x32 numbers would pass by the list: all of them are refused.
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (answer, 0, 0, _EPERM)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, _EPERM)]
    for number in forbidden:
        program += [(equal, 0, 1, number), (answer, 0, 0, _EPERM)]
    program += [(equal, 0, 1, clone3), (answer, 0, 0, _ENOSYS)]  # the C library then makes threads by clone, whose flags can be seen
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, _CLONE_THREAD), (answer, 0, 0, _EPERM), (answer, 0, 0, _ALLOW)]
    _install(libc, program)


def _install(libc: Any, program: Sequence[tuple[int, int, int, int]]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc.prctl(_PR_SET_SECCOMP, 2, ctypes.c_char_p(header), 0, 0)


if __name__ == "__main__":
    main()
