"""No file that a user names is waited for, read without an end, or followed out of where it should be."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipex import state
from pipex.cli.train.data import load_bytes
from pipex.errors import CheckpointError, InputError, PipexError
from pipex.observe import read_trace
from pipex.plan.interop import read_plan
from pipex.plan.layer_costs import LayerCosts
from pipex.reading import NotAFile, open_file, read_file

pytestmark = pytest.mark.timeout(20)  # what waits for a pipe waits for ever


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def in_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (pipe, "a pipe, not a file"),
    "device": (endless, "a device, not a file"),
    "folder": (Path.mkdir, "Is a directory"),
    "socket": (in_socket, "No such device or address"),
}


@pytest.fixture(params=NO_FILES)
def no_file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Something that is no file, and what is said of it."""
    make, problem = NO_FILES[request.param]
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    make(Path("it"))
    return tmp_path / "it", problem


def test_what_is_no_file_is_named(no_file: tuple[Path, str]) -> None:
    path, problem = no_file
    for read in (open_file, lambda path: read_file(path, 10)):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            read(path)
        assert caught.value.strerror == problem
        assert caught.value.filename == str(path)


def of_sidecar(path: Path) -> Any:
    plan = path.with_name("plan.csv")
    plan.write_text("0F0,0B0\n")
    return read_plan(path.rename(path.with_name("plan.csv.json")).with_name("plan.csv"))


READERS: dict[str, Callable[[Path], Any]] = {
    "plan": read_plan,
    "sidecar": of_sidecar,
    "layer costs": LayerCosts.read,
    "trace": read_trace,
    "manifest": lambda path: state.Checkpoint.open(path.rename(path.with_name("checkpoint.json")).parent),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_refuses_it_by_its_own_error(read: Callable[[Path], Any], no_file: tuple[Path, str]) -> None:
    path, problem = no_file
    followed = read is not READERS["manifest"] or not path.is_symlink()
    with pytest.raises((InputError, CheckpointError)) as caught:
        read(path)
    assert f"got {problem if followed else 'a symbolic link, not a file'}" in str(caught.value)


def test_a_text_to_train_on_is_a_file(tmp_path: Path) -> None:
    pipe(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe cannot be read: a pipe, not a file"):
        load_bytes([tmp_path / "pipe"])


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[Path]:
    """A file of 8 GiB that takes no place; read whole, it would take that much memory."""
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 8 << 30)
    return path


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_every_reader_has_a_largest_file(read: Callable[[Path], Any], huge: Path) -> None:
    with pytest.raises(PipexError, match=r"8589934592 bytes, more than the \d+ that are read|got \d{7,8} characters"):
        read(huge)


def test_no_more_is_read_than_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    assert read_file(file, 10) == b"0123456789"
    with pytest.raises(OSError, match="10 bytes, more than the 9 that are read"):
        read_file(file, 9)
    # To the kernel this one has 0 bytes.
    assert read_file("/proc/self/status", 1 << 16).startswith(b"Name:")
    with pytest.raises(OSError, match="more than the 9 that are read"):
        read_file("/proc/self/status", 9)


def test_links_are_followed_only_where_they_may_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"it")
    (tmp_path / "link").symlink_to("file")
    assert read_file(tmp_path / "link", 10) == b"it"
    with pytest.raises(NotAFile, match="a symbolic link, not a file"):
        read_file(tmp_path / "link", 10, follow=False)
    assert read_file(tmp_path / "file", 10, follow=False) == b"it"


def test_a_path_that_can_be_none_is_named() -> None:
    for path, problem in (("a\0b", "embedded null byte"), ("a" * 10_000, "File name too long"), ("", "No such file")):
        with pytest.raises(OSError, match=problem):
            open_file(path)


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pipe(tmp_path / "pipe")
    for _ in range(3):
        with pytest.raises(NotAFile):
            open_file(tmp_path / "pipe")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_shard_is_a_file_of_the_checkpoints_own_directory(kind: str, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    state.commit(directory, 1, [state.write_shard(directory, 1, 0, {"a": torch.ones(3)}, {})], {})
    (shard,) = directory.glob("*.safetensors")
    outside = shard.rename(tmp_path / shard.name)
    {"pipe": pipe, "link": lambda path: path.symlink_to(outside), "folder": Path.mkdir}[kind](shard)
    said = {"pipe": "a pipe, not a file", "link": "a symbolic link, not a file", "folder": "Is a directory"}[kind]
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged; got {said}"):
        state.Checkpoint.open(directory)
