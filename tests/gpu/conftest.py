"""In an interpreter run, whatever is launched has to be in the catalogue of what is compiled ahead of time; and tests that are a process
of their own run two at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gpu_proof import launches

_PROCESS_S = 1200  # of a test that is a process: on a busy machine it waits for minutes until the others before it are done


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("process") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_PROCESS_S))


@pytest.fixture(scope="session", autouse=True)
def _launches_are_in_the_catalogue() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with launches.watch() as seen:
        yield
    known: dict[str, set[Any]] = {}
    for kernel, choices in (launch.variant for launch in launches.recorded("cuda")):
        known.setdefault(kernel, set()).update(choices)
    ours = ((kernel, choices) for kernel, choices in seen if not kernel.startswith("_"))  # such are kernels of a test
    missing = {f"{kernel}: {choice}" for kernel, choices in ours for choice in choices - known.get(kernel, set())}
    assert not missing, "calls.py leads to no such launches:\n" + "\n".join(sorted(missing))


@pytest.fixture(scope="session")
def processes(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    """From the id of a test marked `process(function, *arguments)` to what that call returned.

    All such calls of the session begin with the first test that asks, two at a time: each is a process that takes a minute of one core.
    """
    pool = ThreadPoolExecutor(2)
    marked = [(item.nodeid, item.get_closest_marker("process")) for item in request.session.items]
    calls = {name: pool.submit(*mark.args) for name, mark in marked if mark is not None}
    yield lambda name: calls[name].result()
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def result(request: pytest.FixtureRequest, processes: Callable[[str], Any]) -> Any:
    """What the call in the test's mark `process` returned; raises what it raised."""
    return processes(request.node.nodeid)
