"""Where tables are: the user's, written by ``pipex tune``, in a private directory; and those that pipex ships.

    $XDG_CACHE_HOME/pipex/gemm-NVIDIA-H200-sm90.json    (~/.cache without XDG_CACHE_HOME)
    pipex/backward/tuned/gemm-NVIDIA-H200-sm90.json

The directory is made with mode 0700. One that belongs to another user, or that others may write to, is refused, and so
is such a file. A file is replaced as a whole, under a lock on its directory, so two processes lose nothing.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipex.backward.tuning import LARGEST, Conditions, Gpu, Product, Table, Times, now
from pipex.errors import InputError
from pipex.reading import NotAFile, open_file

SHIPPED = Path(__file__).parent / "tuned"


class Found(NamedTuple):
    """The table to use and its file, if any; and why the user's is ignored, where it is."""

    table: Table | None
    file: Path | None
    ignored: str | None


def user_file(gpu: Gpu) -> Path | None:
    """Where this user's table for this GPU is; None for a user without a home."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification asks to ignore paths that are relative.
        cache = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return cache / "pipex" / _file_name(gpu)


def find(gpu: Gpu) -> Found:
    """The user's table, or else the one that pipex ships. Never raises; nothing of what it reads is executed."""
    ignored = None
    needed = Conditions.here(gpu)
    mine, shipped = user_file(gpu), SHIPPED / _file_name(gpu)
    try:
        if mine is not None and (table := read(mine, needed, private=True)) is not None:
            return Found(table, mine, None)
    except InputError as error:
        ignored = str(error)
    except OSError as error:
        ignored = f"{mine} cannot be read; got {error.strerror}; remove it; run pipex tune"
    # A shipped table may be of other versions than this user has: nothing that a user could mend.
    with suppress(InputError, OSError):
        if (table := read(shipped, needed, private=False)) is not None:
            return Found(table, shipped, ignored)
    return Found(None, None, ignored)


def read(file: Path, needed: Conditions, *, private: bool) -> Table | None:
    """The table in a file; None where there is no such file.

    Args:
        private: refuse a directory or file that others could have written.

    Raises:
        InputError: it is no table, one of other conditions, or not private.
        OSError: it cannot be read.
    """
    try:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        return _read_in(folder, file, needed, private)
    finally:
        os.close(folder)


def update(
    file: Path, conditions: Conditions, driver: str, entries: Mapping[Product, Times], *, private: bool
) -> Table:
    """Adds entries to the table in a file, and returns all that it has then. Entries of other conditions are dropped,
    as is what is no table.

    Args:
        private: make the directory where it is missing, and refuse one that others may write to.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with _locked(file.parent, private) as folder:
            before: Mapping[Product, Times] = {}
            with suppress(InputError):
                if (table := _read_in(folder, file, conditions, private)) is not None:
                    before = table.entries
            table = Table(conditions, {**before, **entries}, driver, now())
            _replace(file, table.to_text().encode())
            return table
    except OSError as error:
        raise InputError(
            f"cannot write {file}", got=error.strerror or error, fix="give another file with --output"
        ) from error


def _file_name(gpu: Gpu) -> str:
    major, minor = gpu.capability
    return f"gemm-{re.sub('[^A-Za-z0-9]+', '-', gpu.name)}-sm{major}{minor}.json"


def _read_in(folder: int, file: Path, needed: Conditions, private: bool) -> Table | None:
    if private:
        _check_private(os.fstat(folder), file.parent)
    try:
        stream = open_file(file.name, folder=folder, follow=not private)
    except FileNotFoundError:
        return None
    except NotAFile as error:
        raise InputError(f"{file} is no file", got=error.strerror, fix="remove it; run pipex tune") from None
    with stream:
        if private:
            _check_private(os.fstat(stream.fileno()), file)
        data = stream.read(LARGEST + 1)
    return Table.from_text(data, needed, str(file))


def _check_private(status: os.stat_result, path: Path) -> None:
    if status.st_uid != os.geteuid():
        raise InputError(
            f"{path} belongs to somebody else",
            got=f"user {status.st_uid}",
            needed=f"user {os.geteuid()}",
            fix="remove it, or set XDG_CACHE_HOME; run pipex tune",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"others may write to {path}",
            got=stat.filemode(status.st_mode),
            needed="write permission for its owner only",
            fix=f"chmod go-w {path}; run pipex tune",
        )


@contextmanager
def _locked(directory: Path, private: bool) -> Iterator[int]:
    if private:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if private:
            _check_private(os.fstat(folder), directory)
        with suppress(OSError):  # some network file systems lock no directories; then the last writer wins
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(folder)


def _replace(file: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # with mode 0600
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
