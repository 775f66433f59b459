"""Shared by the tests of the native modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def private_copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a library that the loader takes for another one, so that its globals start afresh."""
    return lambda library: Path(shutil.copy(library, tmp_path / "private.so"))
