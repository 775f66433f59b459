"""Starting and ending the service that shares a GPU out, by a stand-in of its control program."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipex.bench.virtual_devices import shared_among
from pipex.cli import main
from pipex.errors import NativeUnavailable

SCRIPT = """#!/bin/sh
echo "$CUDA_MPS_ACTIVE_THREAD_PERCENTAGE in $CUDA_MPS_PIPE_DIRECTORY: $* $(cat)" >> {journal}
exit {code}
"""


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return install(tmp_path, 0)


def install(folder: Path, code: int) -> Path:
    program, journal = folder / "nvidia-cuda-mps-control", folder / "journal"
    program.write_text(SCRIPT.format(journal=journal, code=code))
    program.chmod(0o755)
    return journal


def test_ranks_find_the_service_and_their_share(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "70")
    with shared_among(4):
        folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
        assert os.path.isdir(folder)
        assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    assert journal.read_text().splitlines() == [f"25 in {folder}: -d ", f"25 in {folder}:  quit"]
    assert not os.path.exists(folder)
    assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "70"
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ


def test_a_service_that_does_not_start_is_named(journal: Path) -> None:
    install(journal.parent, 3)
    with pytest.raises(NativeUnavailable, match=r"a GPU cannot be shared out among ranks; .*: exit 3") as problem:
        shared_among(2).__enter__()
    assert "leave --virtual-devices out" in str(problem.value)


def test_without_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NativeUnavailable, match="No such file"):
        shared_among(2).__enter__()


def test_cpus_are_not_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overlap", "--virtual-devices"]) == 1
    assert "CPUs are not shared out" in capsys.readouterr().err
