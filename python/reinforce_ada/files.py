"""Replace files and folders as a whole: at every moment either the old one or the new one is there. Stdlib only.

New content is written beside its place as `.aside-<process>.<number>-<name>`, locked by its writer, so that it is not taken for a
left-over. `clear_leftovers` removes what killed processes left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from reinforce_ada.errors import InputError
from reinforce_ada.outside import one_line

ASIDE = ".aside-"
_OLD = f"{ASIDE}old-"  # the one name under which something may be the only copy: see `_swap`
_LONGEST_NAME = 200  # bytes; file systems allow 255
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_number = itertools.count(1)


def replace_file(path: Path, content: str | bytes | Callable[[Path], None], *, where: str = "write", hint: str = "") -> None:
    """Give `path` new content, which is on the disk when this returns.

    A symbolic link is followed; anything but a regular file, such as /dev/stdout, is written into.

    Args:
        content: text (as UTF-8), bytes, or a function that writes a file under the given name, which ends like `path`.
        where, hint: parts of the error.
    Raises: InputError when it cannot be written; the old content then stays untouched.
    """
    with _one_line(path, where, hint):
        old = _status(path, os.stat)
        if old is not None and not stat.S_ISREG(old.st_mode) and not stat.S_ISDIR(old.st_mode):
            _write(path, content)
            return
        target = Path(os.path.realpath(path))
        if old is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
        with _aside(target, lambda aside: os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)) as aside:
            _write(aside, content)
            if old is not None:
                aside.chmod(stat.S_IMODE(old.st_mode))
            _sync(aside)
            os.replace(aside, target)
            _sync(target.parent)


def replace_folder(
    final: Path, write: Callable[[Path], None], *, durable: bool = True, where: str = "write", hint: str = "",
    failures: tuple[type[Exception], ...] = (),
) -> None:  # fmt: skip
    """Let `write` fill a folder beside `final`, and put it in its place; the old folder is removed.

    Args:
        write: takes an empty folder that exists.
        durable: everything is on the disk before the swap, so that a power loss cannot undo or halve it.
        where, hint: parts of the error.
        failures: exceptions of `write` that mean the same as an OSError, for example a full disk.
    Raises: InputError when it cannot be written, or when `final` is not a folder; the old folder then stays untouched.
    """
    with _one_line(final, where, hint, failures):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _aside(final, _make_folder) as aside:
            write(aside)
            for path in [*aside.rglob("*"), aside] if durable else []:
                _sync(path)
            if not os.path.lexists(final):
                aside.rename(final)
            elif final.is_symlink() or not final.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "something that is no folder has this name", str(final))
            else:
                _swap(aside, final)
            if durable:
                _sync(final.parent)


def remove_folder(folder: Path) -> None:
    """Rename a folder, then remove it, so that a process killed half-way leaves no half of it under that name. Raises: OSError."""
    leftover = _aside_name(folder)
    folder.rename(leftover)
    _delete(leftover)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder`, and put back what they had moved away; what is being written now stays."""
    for path in sorted(folder.glob(f"{ASIDE}*")) if folder.is_dir() else []:
        final = folder / path.name.removeprefix(_OLD)
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to remove, and harmless
            if path.name.startswith(_OLD) and not os.path.lexists(final):
                path.rename(final)
            elif not _is_locked(path):
                _delete(path)


def _swap(aside: Path, final: Path) -> None:
    """Exchange both folders; on return the old one is called `aside`."""
    if _exchange(aside, final):
        return
    # Two renames: a process killed between them leaves the old folder under a name from which `clear_leftovers` restores it.
    old = final.parent / f"{_OLD}{final.name}"
    _delete(old)
    final.rename(old)
    try:
        aside.rename(final)
    except BaseException:
        old.rename(final)
        raise
    old.rename(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; return False if the system or the file system has no such call."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError):
        return False
    # The reason of a failure is not needed: if it matters, the renames that are tried instead fail too, and report it.
    return bool(call(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)


@contextlib.contextmanager
def _aside(final: Path, make: Callable[[Path], int]) -> Iterator[Path]:
    """Yield a new file or folder beside `final`, locked while it lasts, and removed unless it was renamed."""
    while True:
        aside = _aside_name(final)
        descriptor = make(aside)
        with contextlib.suppress(OSError):  # on a file system without locks no process removes it as a left-over either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        there = _status(aside)
        if there is not None and there.st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)  # taken for a left-over before it was locked
    try:
        yield aside
    finally:
        with contextlib.suppress(OSError):
            _delete(aside)
        os.close(descriptor)


def _aside_name(final: Path) -> Path:
    name = final.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f"{zlib.crc32(os.fsencode(name)):08x}{final.suffix[:20]}"
    return final.parent / f"{ASIDE}{os.getpid()}.{next(_number)}-{name}"


def _make_folder(aside: Path) -> int:
    aside.mkdir()
    return os.open(aside, os.O_RDONLY)


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _write(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder with all its content, if there is one."""
    status = _status(path)
    if status is None:
        return
    if stat.S_ISDIR(status.st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()


def _status(path: Path, look: Callable[[Path], os.stat_result] = os.lstat) -> os.stat_result | None:
    try:
        return look(path)
    except FileNotFoundError:
        return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _one_line(path: Path, where: str, hint: str, failures: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    failures = (OSError, UnicodeEncodeError, *failures)
    try:
        if "\0" in str(path):
            raise OSError(errno.EINVAL, "a name cannot hold a zero byte")
        yield
    except failures as e:
        said = getattr(e, "strerror", None) or str(e)
        raise InputError(where, f"cannot write {one_line(str(path))}: {said}", "a writable folder with space", hint) from e
