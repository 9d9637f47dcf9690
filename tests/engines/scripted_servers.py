"""Scripted servers as processes that tests start, kill, stop and start again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("scripted_server.py")
PATIENCE_S = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(port: int, **settings: Any) -> list[str]:
    return [sys.executable, str(SCRIPT), str(port), json.dumps(settings)]


def ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
        body = response.read()
        return json.loads(body) if body else None


def until(condition: Any, what: str = "") -> None:
    """Waits for a real process. Fails after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what or condition
        time.sleep(0.01)


def answers(url: str) -> bool:
    try:
        ask(f"{url}/health")
    except OSError:
        return False
    return True


class Process:
    """One server."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.port = settings, free_port()
        self.url = f"{'https' if settings.get('certificate') else 'http'}://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(command(self.port, **self.settings))

    def ready(self) -> None:
        until(lambda: answers(self.url), f"{self.url} does not answer")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)


@contextmanager
def servers(*all_settings: dict[str, Any]) -> Iterator[list[Process]]:
    """They all answer; they are gone at the end."""
    processes = [Process(**settings) for settings in all_settings]
    try:
        for process in processes:
            process.ready()
        yield processes
    finally:
        for process in processes:
            process.kill()
