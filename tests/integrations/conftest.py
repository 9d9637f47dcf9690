"""The tiny model that TRL's trainers train here, of random weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from reinforce_ada.training.models import build_tiny, tiny_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl") / "model"
    build_tiny(folder, tiny_tokenizer(["1+1="]), [("1+1=", "2")], seed=0, num_updates=0)
    return folder
