"""What a pass has freed goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toy_training import toy_config, toy_trainer

from reinforce_ada.training import heap

BLOCK, COUNT = 100_000, 2000  # below the 128 kB from which glibc maps a block of its own


def resident() -> int:
    """VmRSS of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_blocks_between_others_go_back() -> None:
    """One in a hundred stays, so that the heap cannot shrink from its end."""
    blocks = [bytearray(b"x" * BLOCK) for _ in range(COUNT)]
    full = resident()
    kept = blocks[::100]
    blocks.clear()
    heap.trim()
    assert full - resident() > 0.8 * BLOCK * COUNT
    assert all(block == b"x" * BLOCK for block in kept)


@pytest.mark.parametrize("is_worth_it", [True, False])
def test_the_passes_of_a_small_model_are_not_trimmed(is_worth_it: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(heap, "trim", lambda: calls.append(None))
    if is_worth_it:
        monkeypatch.setattr(heap, "WORTH_TRIMMING", 0)
    trainer = toy_trainer(toy_config(tmp_path / "run", steps=2), tmp_path / "run", resume=False)
    trainer.run()
    trainer.parts.store.close()
    assert bool(calls) == is_worth_it


def test_another_c_library_has_nothing_to_trim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    heap.trim()
