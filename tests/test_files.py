"""What is replaced is the old or the new at every moment: a process killed, or a call that fails, at every single step."""

from __future__ import annotations

import errno
import fcntl
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from disturbed import IN_SPITE, KILLED, REFUSED, WHOLE, die, fail, in_a_child
from reinforce_ada import files
from reinforce_ada.errors import InputError

OLD, NEW = {"a": "old a", "below/b": "old b"}, {"a": "new a", "c": "new c"}


def fill(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def found(path: Path) -> object:
    """A file's text, a folder's texts by name, or None."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}
    return path.read_text() if path.exists() else None


def new_folder(final: Path) -> None:
    files.replace_folder(final, lambda aside: fill(aside, NEW))


def new_file(final: Path) -> None:
    files.replace_file(final, "new")


@pytest.fixture(params=[True, False], ids=["one call swaps", "two renames swap"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    return bool(request.param)


@pytest.mark.parametrize("what", [die, fail])
@pytest.mark.parametrize(("replace", "name"), [(new_folder, "final"), (new_file, "final.txt")])
@pytest.mark.parametrize("is_first", [False, True], ids=["over an old one", "for the first time"])
def test_disturbed_at_every_step(
    tmp_path: Path, swap: bool, what: Callable[[], None], replace: Callable[[Path], None], name: str, is_first: bool
) -> None:
    is_folder = replace is new_folder
    new, outcomes, statuses = (NEW if is_folder else "new"), set(), []
    for n in range(1, 100):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        final = folder / name
        old = None if is_first else OLD if is_folder else "old"
        if old is not None and is_folder:
            final.mkdir()
            fill(final, OLD)
        elif old is not None:
            final.write_text("old")
        status = in_a_child(lambda final=final: replace(final), n, what)  # type: ignore[misc]
        if swap or not is_folder:  # not even for a moment is there neither
            assert found(final) in (old, new)
        files.clear_leftovers(folder)
        outcome = found(final)
        assert outcome in (old, new)
        assert sorted(p.name for p in folder.iterdir()) == ([name] if outcome is not None else [])
        outcomes.add(str(outcome))
        statuses.append(status)
        if status == WHOLE:
            break
    assert statuses[-1] == WHOLE
    assert len(statuses) > 4  # the calls were seen
    assert set(statuses[:-1]) <= ({KILLED} if what is die else {REFUSED, IN_SPITE})
    assert outcomes == {str(old), str(new)}


def test_what_is_being_written_is_no_left_over(tmp_path: Path) -> None:
    def write(aside: Path) -> None:
        files.clear_leftovers(tmp_path)
        fill(aside, NEW)

    files.replace_folder(tmp_path / "folder", write)
    files.replace_file(tmp_path / "file", lambda aside: (files.clear_leftovers(tmp_path), aside.write_text("new"))[0])
    assert (found(tmp_path / "folder"), found(tmp_path / "file")) == (NEW, "new")


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def outer(aside: Path) -> None:
        files.replace_file(path, "inner")
        assert path.read_text() == "inner"
        aside.write_text("outer")

    files.replace_file(path, outer)
    assert path.read_text() == "outer"


def test_a_link_is_followed_and_a_pipe_written_into(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    files.replace_file(tmp_path / "link", "through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "through"
    code = "import sys; from pathlib import Path; from reinforce_ada import files; files.replace_file(Path('/dev/stdout'), 'said')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "said"


def test_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    files.replace_file(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_long_names_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 125 + ".txt")  # 254 bytes
    for content in (b"\x00\xff", "texté"):
        files.replace_file(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert list(tmp_path.iterdir()) == [path]


def folder_there(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


@pytest.mark.parametrize(
    ("name", "before", "replace", "message"),
    [
        ("x", folder_there, new_file, "Is a directory"),
        ("x", lambda path: path.write_text("mine"), new_folder, "something that is no folder has this name"),
        ("x", lambda path: path.symlink_to("nowhere"), new_folder, "something that is no folder has this name"),
        ("x" * 300, None, new_file, "File name too long"),
        ("x" * 300, None, new_folder, "File name too long"),
        ("a\0b", None, new_file, "zero byte"),
        ("a\0b", None, new_folder, "zero byte"),
        ("absent/x", None, new_file, "No such file or directory"),
    ],
)
def test_what_cannot_be_replaced_stays_and_is_one_line(
    tmp_path: Path, name: str, before: Callable[[Path], object] | None, replace: Callable[[Path], None], message: str
) -> None:
    if before is not None:
        before(tmp_path / name)
    was = [(p.name, found(p)) for p in tmp_path.iterdir()]
    with pytest.raises(InputError, match=message) as caught:
        replace(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert "a writable folder with space" in str(caught.value)
    assert [(p.name, found(p)) for p in tmp_path.iterdir()] == was


def test_an_error_of_the_writer_is_its_own_and_leaves_the_old(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(aside: Path) -> None:
        aside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace_file(path, write)
    with pytest.raises(KeyboardInterrupt):
        files.replace_folder(tmp_path / "folder", lambda aside: write(aside / "file"))
    assert found(path) == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_removed_by_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder_there(folder)

    def no_further(path: Path) -> None:
        assert not folder.exists()
        raise OSError(errno.EIO, "as asked")

    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", no_further)
        with pytest.raises(OSError, match="as asked"):
            files.remove_folder(folder)
    files.clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_left_over_that_somebody_holds_stays(tmp_path: Path) -> None:
    held, free = tmp_path / ".aside-1.1-held", tmp_path / ".aside-1.2-free"
    free.write_text("")
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        files.clear_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [held]
