"""A study file may hold anything: it is read, or one line says what is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from study_world import STUDY

from cli_fuzz import TOML_FILES, TOML_VALUES
from reinforce_ada.errors import InputError
from reinforce_ada.study.plan import cells_of, keep, untrained_run
from reinforce_ada.study.prediction import Prediction
from reinforce_ada.study.settings import read_study

KEYS = re.findall(r"^\w+ = .*$", STUDY, re.MULTILINE)
TABLES = re.findall(r"^\[.*\]$", STUDY, re.MULTILINE)


def reads(path: Path) -> bool:
    """Whether the study can be read and planned; False after one line."""
    try:
        study = read_study(path)
        keep(path.parent / "out", [untrained_run(study)])
        for cell in cells_of(study, [Prediction(arm.name, 1, 8.0, 0.5) for arm in study.arms]):
            cell.run.config(path.parent)
    except InputError as e:
        said = str(e)
    else:
        return True
    assert re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{1,4000}", said)
    return False


@pytest.mark.parametrize("key", [*KEYS, *TABLES])
def test_any_value_for_any_key(tmp_path: Path, key: str) -> None:
    """For a table: for a key of its own that studies lack, such as those of the configuration."""
    path = tmp_path / "s.toml"
    found = []
    for value in TOML_VALUES:
        name = key.split(" = ")[0]
        new = [f"{name} = {value}"] if key in KEYS else [f"{key}\n{own} = {value}" for own in ("group_size", "stop")]
        for text in new:
            path.write_text(STUDY.replace(key, text, 1))
            found.append(reads(path))
    assert False in found


def test_any_file(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    for content in TOML_FILES:
        path.write_bytes(content)
        assert not reads(path)
    assert not reads(tmp_path / "gone.toml")
    assert not reads(tmp_path)
