from __future__ import annotations

from collections.abc import Iterator

import pytest
from toy_runs import Runner


@pytest.fixture(scope="module")
def toy_run() -> Iterator[Runner]:
    """Starts toy runs in processes of their own, whose imports are paid for once a module."""
    runner = Runner()
    yield runner
    runner.close()
