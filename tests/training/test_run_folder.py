"""Where a run may begin, what a start that is killed leaves, who uses a folder; nothing of anybody else is ever touched."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disturbed import IN_SPITE, KILLED, REFUSED, WHOLE, die, fail, in_a_child
from reinforce_ada import config as configuration
from reinforce_ada.errors import InputError
from reinforce_ada.files import replace_folder
from reinforce_ada.rollouts import RolloutStore
from reinforce_ada.training import run_folder
from reinforce_ada.training.event_file import EventFile


def content(folder: Path) -> dict[str, Any]:
    """Everything below it: texts of files, targets of links, None for folders."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def start(out: Path) -> None:
    """What the start of a run makes, in its order."""

    def write(aside: Path) -> None:
        (aside / "config.json").write_text("{}")

    with run_folder.new(out) as folder:
        replace_folder(folder.path / "base_model", write)
        EventFile(folder.path / "tensorboard").close()
        with RolloutStore(folder.path / "rollouts.sqlite"):
            folder.begin(configuration.load())


def goes_on(out: Path) -> bool:
    """Whether `out` holds a run that can go on."""
    try:
        with run_folder.existing(out) as folder:
            configuration.load(folder.path / "config.toml")
            RolloutStore(folder.path / "rollouts.sqlite").close()
            return True
    except InputError:
        return False


# -------------------- a start that is killed


@pytest.mark.parametrize("what", [die, fail])
def test_a_start_disturbed_at_every_call_leaves_a_run_or_a_place_for_one(tmp_path: Path, what: Callable[[], None]) -> None:
    statuses = []
    outcomes = set()
    for n in range(1, 200):
        out = tmp_path / f"{n}" / "run"
        statuses.append(in_a_child(lambda out=out: start(out), n, what))  # type: ignore[misc]
        is_run = goes_on(out)
        outcomes.add(is_run)
        if is_run:
            with pytest.raises(InputError, match="holds a run already"):
                start(out)
        else:
            if statuses[-1] == REFUSED:  # as it was: nothing
                assert not out.parent.exists() or content(out.parent) == {}
            start(out)
        assert goes_on(out)
        assert sorted(p.name for p in out.iterdir() if "lock" not in p.name) == [
            ".reinforce-ada", "base_model", "config.toml", "rollouts.sqlite", "tensorboard",
        ]  # fmt: skip
        if statuses[-1] == WHOLE:
            break
    assert statuses[-1] == WHOLE
    assert len(statuses) > 20
    assert set(statuses[:-1]) <= ({KILLED} if what is die else {REFUSED, IN_SPITE, 1})
    assert outcomes == {True, False}


@pytest.mark.parametrize("kept", range(7))
def test_every_prefix_of_what_a_start_makes(tmp_path: Path, kept: int) -> None:
    start(tmp_path / "whole")
    out = tmp_path / "run"
    out.mkdir()
    made = [".reinforce-ada", "base_model", "tensorboard", "rollouts.sqlite.lock", "rollouts.sqlite", "config.toml"]
    for name in made[:kept]:
        (tmp_path / "whole" / name).rename(out / name)
    assert goes_on(out) == (kept == 6)
    if kept < 6:
        start(out)
    assert goes_on(out)


def test_a_start_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "run"

    def begin() -> None:
        with run_folder.new(out) as folder:
            (folder.path / "base_model").mkdir()
            raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        begin()
    assert list(tmp_path.iterdir()) == []


# -------------------- what is there stays


def folder_with(**entries: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        for name, text in entries.items():
            target = path / name.replace("__", "/").replace("_dot_", ".")
            target.parent.mkdir(exist_ok=True)
            target.write_text(text)

    return make


def looped(path: Path) -> None:
    path.symlink_to(path)


def linked(path: Path) -> None:
    folder_with(mine="x")(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def killed_and_then_used(path: Path) -> None:
    """Somebody puts a model where a start was killed."""
    folder_with(_dot_reinforce_ada="0" * 32, model__config_dot_json="mine")(path)
    (path / ".reinforce_ada").rename(path / run_folder.MARKER)


HOLDS = "; an empty folder, or one that is not there yet; --out names one"
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda p: p.write_text("mine"), "cannot write to .*: it is no folder; a writable folder"),
    "a link to nowhere": (lambda p: p.symlink_to("nowhere"), "cannot write to .*: it is no folder"),
    "a link to itself": (looped, "cannot write to .*: it is no folder"),
    "a link to a folder with a file": (linked, f"holds mine{HOLDS}"),
    "a file in it": (folder_with(notes_dot_txt="mine"), f"holds notes.txt{HOLDS}"),
    "a hidden file in it": (folder_with(_dot_hidden="mine"), f"holds .hidden{HOLDS}"),
    "a model": (folder_with(model__config_dot_json="mine"), f"holds model{HOLDS}"),
    "a base model": (folder_with(base_model__config_dot_json="mine"), f"holds base_model{HOLDS}"),
    "a configuration": (folder_with(config_dot_toml="mine"), f"holds config.toml{HOLDS}"),
    "a figure": (folder_with(figure_dot_png="mine"), f"holds figure.png{HOLDS}"),
    "a store": (folder_with(rollouts_dot_sqlite="mine"), f"holds rollouts.sqlite{HOLDS}"),
    "tensorboard": (folder_with(tensorboard__events="mine"), f"holds tensorboard{HOLDS}"),
    "many": (folder_with(a="", b="", c="", d="", e=""), f"holds a, b, c and 2 more{HOLDS}"),
    "a run": (start, "holds a run already; an empty folder; --resume .* goes on with it, --out names another"),
    "a run of an earlier version": (folder_with(config_dot_toml="", rollouts_dot_sqlite="", log_dot_jsonl=""), "holds a run already"),
    "a killed start with a model": (killed_and_then_used, f"holds model{HOLDS}"),
}


@pytest.mark.parametrize(("make", "message"), PLACES.values(), ids=PLACES.keys())
def test_a_run_begins_in_no_place_that_holds_anything(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    out = tmp_path / "run"
    make(out)
    before = content(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        start(out)
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "é" * 200, "a\0b"])
def test_a_name_that_cannot_be_is_one_line_and_makes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"^train: cannot write to ") as caught:
        start(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="holds no run"), run_folder.existing(tmp_path / name):
        pass


@pytest.mark.parametrize("name", ["run", "x[/b]", "$x_{", "é \u202e", "-o"])
def test_a_run_begins_in_an_empty_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    start(tmp_path / name)
    assert goes_on(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    start(tmp_path / "link")
    assert goes_on(tmp_path / "empty")


@pytest.mark.parametrize("entry", ["model", "base_model", "tensorboard", "checkpoints", "config.toml", "log.jsonl", "figure.png"])
def test_something_of_the_wrong_kind_in_a_run_is_named_and_stays(tmp_path: Path, entry: str) -> None:
    start(tmp_path / "run")
    path = tmp_path / "run" / entry
    if path.is_dir():
        path.rename(tmp_path / "moved")
    path.unlink(missing_ok=True)
    if "." in entry:
        path.mkdir()
    else:
        path.write_text("mine")
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"is no (file|folder); |holds no run"), run_folder.existing(tmp_path / "run"):
        pass
    assert content(tmp_path) == before


def test_a_configuration_that_was_cut_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    start(tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    text = path.read_text()
    for size in (0, 1, len(text) // 2, len(text) - 2):
        path.write_text(text[:size])
        assert not goes_on(tmp_path / "run")
    path.write_text(text + "# a note\n")
    assert goes_on(tmp_path / "run")


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    start(tmp_path / "run")
    (tmp_path / "run" / run_folder.MARKER).unlink()
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("# the end of a whole file\n", ""))
    assert goes_on(tmp_path / "run")
    assert goes_on(tmp_path / "run")


# -------------------- one process at a time

HOLDER = """
import sys
from pathlib import Path
from reinforce_ada.training import run_folder

with run_folder.existing(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(out)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "in\n"
        before = content(out)
        with pytest.raises(InputError, match=r"another process uses .*; one process at a time"), run_folder.existing(out):
            pass
        with pytest.raises(InputError, match="another process uses"):
            start(out)
        assert content(out) == before
        holder.kill()
    assert goes_on(out)


def test_two_starts_do_not_share_a_place(tmp_path: Path) -> None:
    with run_folder.new(tmp_path / "run") as folder:
        with pytest.raises(InputError, match="another process uses"):
            start(tmp_path / "run")
        folder.begin(configuration.load())
    assert (tmp_path / "run" / "config.toml").is_file()


# -------------------- folders for weights


def test_a_weights_folder_belongs_to_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    for _ in range(2):
        with run_folder.weights_folder(folder, "a" * 32) as path:
            (path / "version-1").mkdir(exist_ok=True)
    before = content(tmp_path)
    with pytest.raises(InputError, match="holds the weights of another run; an empty folder"), run_folder.weights_folder(folder, "b" * 32):
        pass
    assert content(tmp_path) == before


@pytest.mark.parametrize("make", [folder_with(mine="x"), folder_with(**{"version-1__mine": "x"}), lambda p: p.write_text("mine"), looped])
def test_a_weights_folder_of_others_is_refused_as_it_is(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "weights")
    before = content(tmp_path)
    with pytest.raises(InputError, match=r"^engine: --weights-dir "), run_folder.weights_folder(tmp_path / "weights", "a" * 32):
        pass
    assert content(tmp_path) == before
