"""Shared by the tests of commands."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipex.cli import main
from pipex.runtime import worlds


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """As ``pipex``, in this process, which has imported everything already."""
    monkeypatch.setattr(worlds, "threads_per_rank", lambda ranks: 1)  # more threads here would hang forks

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        found = main(list(arguments))
        said = capfd.readouterr()
        assert found == code, f"exit code {found}\n{said.out}\n{said.err}"
        return said.out, said.err

    return run
