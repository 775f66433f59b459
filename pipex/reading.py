"""Reading the files that users name: only what is a file, and no more of it than such a file can have.

A path may name a pipe, at whose opening a program waits for ever, or a device, whose reading never ends. So every file
that comes from outside (plans, costs, traces, checkpoints, tuning tables) is opened here.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


class NotAFile(OSError):
    """The path leads to something else than a file; ``strerror`` says to what."""


_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_file(path: str | os.PathLike[str], *, folder: int | None = None, follow: bool = True) -> BinaryIO:
    """A file, open for reading; never waits.

    Args:
        folder: descriptor of the directory from which a relative path leads; None: the current one.
        follow: whether the path may be a symbolic link.

    Raises:
        OSError: it cannot be opened, or is ``NotAFile``; ``strerror`` says why.
    """
    name = os.fspath(path)
    flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)  # else the opening of a pipe would wait
    try:
        descriptor = os.open(name, flags, dir_fd=folder)
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error), name) from None
    except OSError as error:
        if error.errno != errno.ELOOP or follow:
            raise
        raise NotAFile(errno.ELOOP, "a symbolic link, not a file", name) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise NotAFile(errno.EISDIR, os.strerror(errno.EISDIR), name)
        if not stat.S_ISREG(mode):
            raise NotAFile(errno.EINVAL, f"{_KINDS.get(stat.S_IFMT(mode), 'something')}, not a file", name)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | os.PathLike[str], most: int, *, follow: bool = True) -> bytes:
    """The bytes of a file that has at most ``most``; of a longer one nothing is read.

    Raises:
        OSError: as ``open_file``; or the file is longer, with the error number EFBIG.
    """
    with open_file(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
        if max(size, len(content)) > most:  # a file may grow, and some of /proc say that they have no bytes
            raise OSError(errno.EFBIG, f"{size} bytes, more than the {most} that are read", os.fspath(path))
        return content
