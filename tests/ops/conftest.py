from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
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
    """torch.compile forgets what earlier tests compiled, also on disk: its cache does not see what an operator of ours returns, and hands
    out graphs of older sources."""
    torch.compiler.reset()
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()
