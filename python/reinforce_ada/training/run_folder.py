"""The folder of a run: begun in an empty one only, identified by a marker, used by one process at a time. Foreign files are never touched.

A run exists once its config.toml does, which a start writes last. If a start is killed before that, the marker shows that the contents are
the left-overs of a start, and the next start may remove them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reinforce_ada import config as configuration
from reinforce_ada.config import Config
from reinforce_ada.config.paths import RECORDS
from reinforce_ada.errors import InputError
from reinforce_ada.files import ASIDE, clear_leftovers, replace_file
from reinforce_ada.outside import one_line

MARKER = ".reinforce-ada"  # holds the run's name, which is random, and is the lock
CONFIG = "config.toml"
_END = "# the end of a whole file\n"  # TOML has no end marker: a file that was cut short may still be valid
_STORE = ("rollouts.sqlite", "rollouts.sqlite-wal", "rollouts.sqlite-shm", "rollouts.sqlite-journal", "rollouts.sqlite.lock")
# What a start creates before config.toml.
_OF_A_START = (MARKER, *_STORE, RECORDS, "base_model", "tensorboard", "track.json", "wandb")
_FOLDERS = ("base_model", "tensorboard", "checkpoints", "model", "wandb")
_FILES = (CONFIG, RECORDS, "log.jsonl", "track.json", "figure.png", "rollouts.parquet", *_STORE)
_EVIDENCE = ("rollouts.sqlite", "log.jsonl", "checkpoints", MARKER)  # expected beside a config.toml, which is a common name
_WHERE = "train"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder that only this process uses."""

    path: Path
    name: str  # the name of the run, which stays the same wherever its folder is moved

    def begin(self, config: Config) -> None:
        """Write the configuration, from which on the run exists; a resumed run gets its current configuration."""
        text = configuration.dump(config)
        replace_file(self.path / CONFIG, text + _END, where=_WHERE, hint="then resume the run")


@contextlib.contextmanager
def new(path: Path) -> Iterator[RunFolder]:
    """Yield a folder for a new run: absent, empty, or with left-overs of a killed start. It is restored if the run does not begin.

    Raises: InputError for any other folder, for one that cannot be written, and for one that another process uses.
    """
    made = _make(path)
    try:
        with _locked(path) as lock:
            _check_free(path, is_named=bool(_name(lock)))
            name = _named(lock)
            _clear(path)
            try:
                yield RunFolder(path, name)
            finally:
                if not (path / CONFIG).exists():
                    _clear(path)
                    (path / MARKER).unlink(missing_ok=True)
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # not empty: the run has begun
                folder.rmdir()


@contextlib.contextmanager
def existing(path: Path) -> Iterator[RunFolder]:
    """Yield the folder of a run to be resumed.

    Raises: InputError when it holds no run, when something in it is not of the kind it should be, when its configuration was cut short,
        when it cannot be written, and when another process uses it.
    """
    check_run(path)
    with _locked(path) as lock:
        for entries, is_right, kind in ((_FOLDERS, os.path.isdir, "folder"), (_FILES, os.path.isfile, "file")):
            for entry in entries:
                if os.path.lexists(path / entry) and not is_right(path / entry):
                    raise InputError(_WHERE, f"{path / entry} is no {kind}", f"a {kind}", "move it out of the way")
        if not (path / "rollouts.sqlite").exists() and any(path.glob("checkpoints/step-*")):  # opening it would make an empty one
            hint = "put that file back; train --model with the model of a checkpoint begins a new run"
            raise InputError(_WHERE, f"{path / 'rollouts.sqlite'} is not there", "the journal that the checkpoints were trained on", hint)
        _check_whole(path, is_named=bool(_name(lock)))
        clear_leftovers(path)
        yield RunFolder(path, _named(lock))


def check_run(path: Path) -> None:
    """Raise InputError if `path` is not the folder of a run."""
    if not os.path.isfile(path / CONFIG) or not any(os.path.exists(path / name) for name in _EVIDENCE):
        raise InputError(_WHERE, f"{one_line(str(path))} holds no run", "a folder that `reinforce-ada train` wrote")


@contextlib.contextmanager
def weights_folder(path: Path, name: str) -> Iterator[Path]:
    """Yield a folder outside that of the run `name` for its weights, where new ones replace old ones: absent, empty, or used by it before.

    Raises: InputError for any other folder, and for one that cannot be written.
    """
    mark, where = path / MARKER, "engine"
    try:
        others = [entry for entry in os.listdir(path) if not entry.startswith(ASIDE)] if os.path.lexists(path) else []
        owner = mark.read_text(errors="replace").strip() if MARKER in others else ""
        if others and owner != name:
            whose = "the weights of another run" if owner else _some(others)
            raise InputError(where, f"--weights-dir {path} holds {whose}", "an empty folder, or one that is not there yet")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(where, f"--weights-dir {path}: {e.strerror}", "a writable folder") from e
    replace_file(mark, name, where=where)
    yield path


# -------------------- a new run


def _make(path: Path) -> list[Path]:
    """Make the folder, and return those that were made, the outermost first."""
    made: list[Path] = []
    try:
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is no folder")
        for folder in [*reversed(path.absolute().parents), path.absolute()]:
            if folder.is_dir():
                continue
            try:
                folder.mkdir()
            except FileExistsError:  # a file, or a folder that another process has just made
                if not folder.is_dir():
                    raise
            else:
                made.append(folder)
    except (OSError, ValueError) as e:
        for folder in reversed(made):
            folder.rmdir()
        raise _unwritable(path, getattr(e, "strerror", None) or str(e)) from e
    return made


def _check_free(path: Path, *, is_named: bool) -> None:
    entries = sorted(set(os.listdir(path)) - {MARKER})
    if CONFIG in entries and (is_named or any(name in entries for name in _EVIDENCE)):
        raise InputError(_WHERE, f"{path} holds a run already", "an empty folder", f"--resume {path} goes on with it, --out names another")
    foreign = [name for name in entries if not is_named or not (name in _OF_A_START or name.startswith(ASIDE))]
    if foreign:
        raise InputError(_WHERE, f"{path} holds {_some(foreign)}", "an empty folder, or one that is not there yet", "--out names one")


def _clear(path: Path) -> None:
    """Remove what a start creates except the marker, without which the rest would look like foreign files."""
    for name in _OF_A_START[1:]:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    clear_leftovers(path)


def _some(names: list[str]) -> str:
    shown = ", ".join(one_line(name, 60) for name in sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -------------------- the lock and the marker


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Yield the marker, open and locked for this process. Remove it afterwards if it is new and no run began."""
    is_new = not os.path.lexists(path / MARKER)
    lock = _lock(path)
    try:
        yield lock
    finally:
        if is_new and not _name(lock):
            (path / MARKER).unlink(missing_ok=True)
        os.close(lock)


def _name(lock: int) -> str:
    """Return the run's name in its marker; "" if a start was killed before writing it."""
    text = os.pread(lock, 100, 0).decode(errors="replace")
    return text if re.fullmatch("[0-9a-f]{32}", text) else ""


def _named(lock: int) -> str:
    if name := _name(lock):
        return name
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, uuid.uuid4().hex.encode(), 0)
    except OSError as e:  # for example a full disk
        raise InputError(_WHERE, f"cannot write {MARKER}: {e.strerror}", "a folder with space") from e
    return _name(lock)


def _lock(path: Path) -> int:
    mark = path / MARKER
    while True:
        try:
            lock = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as e:
            raise _unwritable(path, e.strerror) from e
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(mark) and os.stat(mark).st_ino == os.fstat(lock).st_ino:
                return lock
        except BlockingIOError as e:
            os.close(lock)
            raise InputError(_WHERE, f"another process uses {path}", "one process at a time", "wait for its end, or end it") from e
        except OSError as e:
            os.close(lock)
            raise _unwritable(path, f"no locks: {e.strerror}") from e
        os.close(lock)  # its owner has just removed it


def _check_whole(path: Path, *, is_named: bool) -> None:
    """Require the last line of the configuration; add it to that of an earlier version, which had no marker."""
    text = (path / CONFIG).read_bytes()
    if _END.encode() in text:
        return
    if is_named:
        given = f"{path / CONFIG} lacks its last line, {_END.strip()!r}: it was cut short"
        raise InputError(_WHERE, given, "the whole file", "the first line of log.jsonl has all that it held")
    replace_file(path / CONFIG, text + b"\n" + _END.encode(), where=_WHERE)


def _unwritable(path: Path, why: str | None) -> InputError:
    return InputError(_WHERE, f"cannot write to {one_line(str(path))}: {why}", "a writable folder", "--out names one")
