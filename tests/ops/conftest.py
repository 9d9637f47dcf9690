from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from conformance import threads, using


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The build given by `@pytest.mark.parametrize("backend", builds(op), indirect=True)`, selected."""
    with using(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def _seeded_and_single() -> Iterator[None]:
    """One thread unless a test says otherwise: teams on a busy machine wait for each other, and these tensors are small."""
    torch.manual_seed(0)
    with threads(1):
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """torch.compile forgets what earlier tests compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
