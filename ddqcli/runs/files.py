"""Whole files or none: the one way to write an output; file locks; disk errors as a sentence."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ddqcli.errors import DDQError, UsageError

_WRONG_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FROM_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def write_atomic(
    path: Path,
    write: Callable[[Path], Any],
    *,
    owner: str = "",
    inputs: Iterable[Path] = (),
    mode: int = 0o666,
) -> None:
    """Let `write` fill a temporary file beside `path`, then move it to `path`.

    Readers see the old file or the new one, also after a crash or a power loss. `owner` begins the
    temporary file's name, so that its run can remove it after a kill. The umask limits `mode`.

    Raises UsageError if the place cannot be written to, if `path` is a link or a device, or is one
    of the `inputs` or lies in one; DDQError if the disk refuses.
    """
    check_output(path, inputs)
    temporary = path.with_name(temporary_name(owner))
    with disk_errors(path):
        try:
            # Whoever else can write to the folder can neither guess the name nor prepare a link.
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, mode))
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_folder(
    path: Path, write: Callable[[Path], Any], *, is_own: Callable[[Path], bool]
) -> None:
    """Let `write` make a folder beside `path`, of the same name, then move it to `path`.

    A folder that stands there is replaced if `is_own` says so. A crash leaves the old one or the
    new one; where the system cannot exchange them, perhaps under a temporary name. Raises
    UsageError for a place that cannot be written to, DDQError if the disk refuses.
    """
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or not is_own(path)):
        raise UsageError(
            f"{path} cannot be written: something else is there; remove it, or name another folder."
        )
    temporary = path.with_name(temporary_name(""))
    with disk_errors(path):
        try:
            temporary.mkdir(mode=0o700)
            made, old = temporary / path.name, temporary / "old"
            write(made)
            for below, _, files in os.walk(made):
                for name in files:
                    sync(Path(below, name))
                sync_folder(Path(below))
            if not (path.is_dir() and _exchange(made, path)):
                if path.is_dir():
                    os.replace(path, old)
                os.replace(made, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        sync_folder(path.parent)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it, on the disk, too. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode, parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def temporary_name(owner: str) -> str:
    """Return an unguessable name for a file that is being written for `owner`."""
    return f"{temporary_prefix(owner)}{secrets.token_hex(16)}.tmp"


def is_temporary(name: str) -> bool:
    """True for a name by `temporary_name` without an owner."""
    return re.fullmatch(r"\.ddq-[0-9a-f]{32}\.tmp", name) is not None


def temporary_prefix(owner: str) -> str:
    """Return the beginning of the names of temporary files of `owner`."""
    return f".ddq-{owner}-" if owner else ".ddq-"


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise UsageError unless `path` is free, or a regular file that is none of the `inputs`.

    A folder among the inputs stands for the files below it.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing is there; what else is wrong shows itself in writing
        return
    if not stat.S_ISREG(mode):
        kind = "it is a link" if stat.S_ISLNK(mode) else "it is no regular file"
        reason = "Is a directory" if stat.S_ISDIR(mode) else kind
        raise UsageError(f"{path} cannot be written: {reason}; remove it, or name another file.")
    for source in inputs:
        if _is_same(path, source):
            raise UsageError(
                f"{path} cannot be written: it belongs to what this command reads; name another "
                "file for the output."
            )


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """Return a descriptor of a run's own file. Raises UsageError for links, devices and pipes."""
    check_output(path)
    descriptor = os.open(path, flags | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0), mode)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # put there in this moment
        os.close(descriptor)
        raise UsageError(f"{path} cannot be opened: it is no regular file; remove it.")
    return descriptor


def sync(path: Path) -> None:
    """Wait until what was appended to a file is on the disk; nothing if there is no file."""
    with suppress(FileNotFoundError), os.fdopen(open_own(path, os.O_RDONLY), "rb") as file:
        os.fsync(file.fileno())


def try_lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Take the file's lock until it is closed; return False if another process holds it.

    Any number of processes may hold a shared lock, while none holds an exclusive one.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # not a POSIX system, or a file system without locks
        pass
    return True


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while writing `path` into UsageError (wrong place) or DDQError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError in place of the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        kind = UsageError if isinstance(cause, _WRONG_PLACE) else DDQError
        raise kind(
            f"{path} cannot be written: {cause.strerror}; what was there before is kept."
        ) from error


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two folders at once; return False where that cannot be done."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2  # Linux alone
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return not renameat2(_FROM_HERE, names[0], _FROM_HERE, names[1], _EXCHANGE)


def _is_same(path: Path, source: Path) -> bool:
    try:
        if source.is_dir():
            return path.resolve().is_relative_to(source.resolve())
        return path.samefile(source)
    except OSError:  # the source is gone
        return False


def sync_folder(folder: Path) -> None:
    """Put a rename on the disk. File systems that cannot do it for a folder are left alone."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
