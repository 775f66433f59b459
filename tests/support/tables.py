"""A GPU that does not exist, and tables of what it would have measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipex.backward import choice
from pipex.backward.tuning import Conditions, Gpu, Product, Times
from pipex.backward.tuning_files import update, user_file

GPU = Gpu("Made-up GPU/2", (9, 0))


@pytest.fixture
def made_up_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All devices are this GPU, Triton is there, and the user's cache is a folder of the test's, which is given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "gpu_of", lambda _: GPU)
    monkeypatch.setattr(choice, "problem", lambda _: None)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """As in a new process."""
    choice.provider.cache_clear()
    choice._table.cache_clear()


def write_table(entries: Mapping[Product, Times]) -> Path:
    """The user's table, with these entries added."""
    file = user_file(GPU)
    assert file is not None
    update(file, Conditions.here(GPU), "1.0", entries, private=True)
    forget()
    return file
