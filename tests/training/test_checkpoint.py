"""Checkpoints: whole or absent, the newest kept, a full disk loses nothing."""

import pytest
import torch

from reinforce_ada.errors import InputError
from reinforce_ada.training import checkpoint


def write(root, step, **kwargs):
    return checkpoint.save(root, step, 10 * step, lambda f: (f.mkdir(), (f / "w").write_text("w")), {"a": torch.tensor([step])}, **kwargs)


def test_saved_and_found_again(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 12)
    found = checkpoint.latest(tmp_path)
    assert (found.step, found.position, found.tensors()["a"].tolist()) == (12, 120, [12])
    assert (found.folder / "model" / "w").read_text() == "w"
    assert [p.name for p in tmp_path.iterdir()] == ["step-000012"]


def test_none_yet(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def test_left_overs_of_a_killed_write_are_ignored_and_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".aside-step-000002").mkdir()
    (tmp_path / ".aside-step-000002" / "half").write_text("x")
    assert checkpoint.latest(tmp_path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    write(tmp_path, 1)

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left.*resume"):
        checkpoint.save(tmp_path, 2, 20, full, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.latest(tmp_path).step == 1


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 1)
    assert write(tmp_path, 1).step == 1
    assert checkpoint.latest(tmp_path).tensors()["a"].tolist() == [1]
