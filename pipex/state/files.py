"""Files that must be on disk before something else happens, and clear errors where they cannot be."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipex.errors import CheckpointError


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Around the writing of ``path`` (``size`` bytes): if it fails, what was written of the file is removed.

    Raises:
        CheckpointError: instead of an OSError; with needed and free bytes where the disk is full.
    """
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}",
            got=f"{shutil.disk_usage(path.parent).free} bytes free",
            needed=f"{size} bytes",
            fix="free some space or save elsewhere; the checkpoint saved before is untouched",
        ) from error


def sync_directory(directory: Path) -> None:
    """Makes the entries of a directory (files created and renamed in it) survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def first_few(names: list[str]) -> str:
    """A list of names for an error message: at most four, and how many there are."""
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown}, ... ({len(names)} in all)"


def listed(**found: list[str]) -> str:
    """Findings for an error message by their titles, without those that found nothing."""
    return "; ".join(f"{title}: {first_few(names)}" for title, names in found.items() if names)
