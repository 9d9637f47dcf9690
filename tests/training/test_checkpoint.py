"""Checkpoints: whole or absent, the newest two kept, a full disk loses nothing, and a damaged one is known."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from reinforce_ada.errors import InputError
from reinforce_ada.training import checkpoint


def write(root, step, **kwargs):
    def save_model(folder):
        folder.mkdir()
        (folder / "w").write_text("w")

    checkpoint.save(root, step, 10 * step, save_model, {"a": torch.tensor([step])}, **kwargs)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_saved_and_found_again(tmp_path):
    for step in (3, 7, 12):
        write(tmp_path, step, run="me")
    assert names(tmp_path) == ["step-000007", "step-000012"]
    newest, before = (checkpoint.read(folder) for folder in checkpoint.folders(tmp_path))
    assert (newest.step, newest.position, newest.run, newest.tensors["a"].tolist()) == (12, 120, "me", [12])
    assert (newest.folder / "model" / "w").read_text() == "w"
    assert before.step == 7


def test_none_yet(tmp_path):
    assert checkpoint.folders(tmp_path) == []
    assert checkpoint.folders(tmp_path / "absent") == []


def test_left_overs_of_a_killed_write_are_ignored_and_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".aside-7.1-step-000002").mkdir()
    (tmp_path / ".aside-7.1-step-000002" / "half").write_text("x")
    assert [folder.name for folder in checkpoint.folders(tmp_path)] == ["step-000001"]
    assert names(tmp_path) == ["step-000001"]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    write(tmp_path, 1)

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left.*resume"):
        checkpoint.save(tmp_path, 2, 20, full, {})
    assert names(tmp_path) == ["step-000001"]
    assert checkpoint.read(tmp_path / "step-000001").step == 1


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert checkpoint.read(tmp_path / "step-000001").tensors["a"].tolist() == [1]


def test_one_set_aside_goes_when_the_next_is_written(tmp_path):
    write(tmp_path, 4)
    for _ in range(2):
        write(tmp_path, 6)
        checkpoint.set_aside(tmp_path / "step-000006")
    assert names(tmp_path) == ["set-aside-step-000006", "step-000004"]
    write(tmp_path, 6)
    assert names(tmp_path) == ["step-000004", "step-000006"]


def test_one_of_an_earlier_version_says_less_and_is_read(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-000001" / "state.json").write_text(json.dumps({"step": 1, "position": 10}))
    found = checkpoint.read(tmp_path / "step-000001")
    assert (found.step, found.position, found.run) == (1, 10, "")


def rewritten(path):
    tensors = load_file(path)
    save_file({name: t + 1 for name, t in tensors.items()}, path)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


STATE, TENSORS = "state.json", "trainer.safetensors"
DAMAGES = {
    "no state": (STATE, lambda p: p.unlink(), "state.json is not there"),
    "an empty state": (STATE, lambda p: p.write_text(""), "state.json: not JSON"),
    "half a state": (STATE, lambda p: p.write_text(p.read_text()[:20]), "state.json: not JSON"),
    "a state of another kind": (STATE, lambda p: p.write_text("[1]"), "state.json: no JSON object"),
    "a state nested deeply": (STATE, lambda p: p.write_text("[" * 100_000), "nested too deeply"),
    "a state without a position": (STATE, lambda p: p.write_text('{"step": 1}'), "no step and position"),
    "a step that is no number": (STATE, lambda p: p.write_text('{"step": true, "position": 1}'), "no step and position"),
    "a state that is not UTF-8": (STATE, lambda p: p.write_bytes(b"\xff"), "not UTF-8"),
    "another step": (STATE, lambda p: p.write_text('{"step": 2, "position": 10}'), "state.json is of step 2"),
    "another position": (STATE, lambda p: p.write_text(p.read_text().replace("10", "11", 1)), "state.json is not what was written"),
    "a folder for a state": (STATE, lambda p: (p.unlink(), p.mkdir()), "state.json is not there"),
    "no tensors": (TENSORS, lambda p: p.unlink(), "trainer.safetensors is not there"),
    "an empty file": (TENSORS, lambda p: p.write_bytes(b""), "trainer.safetensors is not what was written"),
    "garbage": (TENSORS, lambda p: p.write_bytes(b"x" * 1000), "trainer.safetensors is not what was written"),
    "half of it": (TENSORS, lambda p: p.write_bytes(p.read_bytes()[:40]), "trainer.safetensors is not what was written"),
    "a bit": (TENSORS, flipped, "trainer.safetensors is not what was written"),
    "other tensors": (TENSORS, rewritten, "trainer.safetensors is not what was written"),
    "a folder for tensors": (TENSORS, lambda p: (p.unlink(), p.mkdir()), "trainer.safetensors is not there"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_one_is_known(tmp_path, name, damage, message):
    write(tmp_path, 1)
    damage(tmp_path / "step-000001" / name)
    with pytest.raises(checkpoint.UnusableError, match=message):
        checkpoint.read(tmp_path / "step-000001")


@pytest.mark.parametrize("content", [b"", b"x" * 1000, b"\x10" + bytes(7) + b"not a header at all"])
def test_garbage_is_known_without_a_checksum_too(tmp_path, content):
    write(tmp_path, 1)
    (tmp_path / "step-000001" / STATE).write_text('{"step": 1, "position": 10}')
    (tmp_path / "step-000001" / TENSORS).write_bytes(content)
    with pytest.raises(checkpoint.UnusableError, match=r"^trainer.safetensors: "):
        checkpoint.read(tmp_path / "step-000001")
