"""Where tables are kept: private, whole, and never an obstacle."""

from __future__ import annotations

import os
import stat
import time
from functools import partial
from pathlib import Path

import pytest
from forked import Forked, outcomes
from tables import GPU, made_up_gpu, write_table

from pipex.backward import tuning_files
from pipex.backward.tuning import LARGEST, Conditions, Gpu, Product, Times
from pipex.backward.tuning_files import find, update, user_file
from pipex.errors import InputError

__all__ = ["made_up_gpu"]

HERE = Conditions.here(GPU)


def weights(tokens: int) -> Product:
    return Product("dW", tokens, 4096, 1024, 8, "bfloat16", "float32")


ONE = {weights(512): Times(1.0, 2.0)}


def test_a_table_is_found_where_it_was_written(made_up_gpu: Path) -> None:
    assert find(GPU) == (None, None, None)
    file = write_table(ONE)
    assert file == made_up_gpu / "pipex" / "gemm-Made-up-GPU-2-sm90.json"
    found = find(GPU)
    assert found.table is not None
    assert (found.table.entries, found.file, found.ignored) == (ONE, file, None)
    assert find(Gpu("Made-up GPU/3", (9, 0))) == (None, None, None)


def test_directory_and_file_are_private(made_up_gpu: Path) -> None:
    before = os.umask(0)
    try:
        file = write_table(ONE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_entries_are_added_and_replaced(made_up_gpu: Path) -> None:
    write_table({weights(1): Times(1.0, 1.0), weights(2): Times(2.0, 2.0)})
    write_table({weights(2): Times(None, 3.0), weights(3): Times(4.0, 4.0)})
    found = find(GPU).table
    assert found is not None
    assert found.entries == {
        weights(1): Times(1.0, 1.0),
        weights(2): Times(None, 3.0),
        weights(3): Times(4.0, 4.0),
    }


def test_entries_of_other_conditions_are_dropped(made_up_gpu: Path) -> None:
    file = write_table({weights(1): Times(1.0, 1.0)})
    assert update(file, HERE._replace(torch="1.0"), "1.0", ONE, private=True).entries == ONE
    file.write_bytes(b"[")
    assert update(file, HERE, "1.0", ONE, private=True).entries == ONE


def test_the_home_is_used_without_an_absolute_xdg_cache_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert user_file(GPU) == Path("/home/somebody/.cache/pipex/gemm-Made-up-GPU-2-sm90.json")


def test_no_home_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert find(GPU) == (None, None, None)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_others_may_write_is_refused(what: str, mode: int, made_up_gpu: Path) -> None:
    file = write_table(ONE)
    path = file if what == "file" else file.parent
    path.chmod(mode)
    found = find(GPU)
    assert found.table is None
    assert found.ignored is not None
    assert found.ignored.startswith(f"others may write to {path}; got ")
    assert found.ignored.endswith(f"chmod go-w {path}; run pipex tune")
    if what == "directory":
        with pytest.raises(InputError, match="others may write to"):
            write_table(ONE)
    path.chmod(0o700)
    assert find(GPU).table is not None


def test_what_belongs_to_somebody_else_is_refused(made_up_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_table(ONE)
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    found = find(GPU)
    assert found.table is None
    assert found.ignored is not None
    assert found.ignored.startswith(f"{file.parent} belongs to somebody else; got user {file.stat().st_uid}; needed")
    with pytest.raises(InputError, match="belongs to somebody else"):
        update(file, HERE, "1.0", ONE, private=True)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "directory", "link", "large", "empty", "garbage"])
def test_whatever_is_there_is_ignored_with_a_reason(
    kind: str, made_up_gpu: Path, request: pytest.FixtureRequest
) -> None:
    file = write_table(ONE)
    elsewhere = file.rename(made_up_gpu / "elsewhere")
    if kind == "pipe":
        os.mkfifo(file, mode=0o600)
        request.addfinalizer(partial(os.close, os.open(file, os.O_RDWR)))  # somebody who may yet write
    elif kind == "directory":
        file.mkdir(mode=0o700)
    elif kind == "link":
        file.symlink_to(elsewhere)
    else:
        file.write_bytes({"large": b" " * (LARGEST + 1), "empty": b"", "garbage": b"\xff\xfe{"}[kind])
        file.chmod(0o600)
    found = find(GPU)
    assert (found.table, found.file) == (None, None)
    assert found.ignored is not None
    assert str(file) in found.ignored
    assert found.ignored.endswith("run pipex tune")


def test_a_file_in_the_directory_s_place_is_ignored(made_up_gpu: Path) -> None:
    (made_up_gpu / "pipex").write_text("")
    found = find(GPU)
    assert found.table is None
    assert found.ignored is not None
    assert "Not a directory" in found.ignored
    with pytest.raises(InputError, match=r"cannot write .*gemm-Made-up-GPU-2-sm90\.json; got "):
        write_table(ONE)


def test_a_shipped_table_is_used_where_the_user_has_none(
    made_up_gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir(mode=0o775)  # packages may be anybody's
    monkeypatch.setattr(tuning_files, "SHIPPED", shipped)
    file = shipped / "gemm-Made-up-GPU-2-sm90.json"
    update(file, HERE, "1.0", ONE, private=False)
    file.chmod(0o664)
    found = find(GPU)
    assert found.table is not None
    assert (found.table.entries, found.file, found.ignored) == (ONE, file, None)

    mine = write_table({weights(7): Times(1.0, 1.0)})
    assert find(GPU).file == mine
    mine.write_text("")
    found = find(GPU)
    assert found.file == file
    assert found.ignored is not None

    mine.unlink()
    update(file, HERE._replace(torch="1.0"), "1.0", ONE, private=False)
    assert find(GPU) == (None, None, None)  # of other versions: not the user's to mend


def write_many(first: int, count: int) -> None:
    for number in range(first, first + count):
        write_table({weights(number): Times(1.0, 2.0)})


def test_two_processes_that_write_at_once_lose_nothing(made_up_gpu: Path) -> None:
    for outcome in outcomes([partial(write_many, first, 100) for first in (1, 1001)]):
        assert outcome.get("result", outcome) is None
    assert tokens() == {*range(1, 101), *range(1001, 1101)}


def test_a_killed_writer_leaves_a_whole_table(made_up_gpu: Path) -> None:
    write_table(ONE)
    for attempt in range(5):
        before, deadline = len(tokens()), time.monotonic() + 30
        with Forked([partial(write_many, 1 + 10_000 * attempt, 10_000)]):
            while len(tokens()) < before + 1 + attempt:  # it is in the middle of its writing
                assert time.monotonic() < deadline
        assert len(tokens()) > before
    write_table({weights(9): Times(1.0, 2.0)})  # its lock died with it
    assert {9, 512} < tokens()


def tokens() -> set[int]:
    found = find(GPU)
    assert found.table is not None, found.ignored
    return {product.tokens for product in found.table.entries}


def test_a_full_disk_leaves_the_table_before(made_up_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_table(ONE)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*; got No space left on device"):
        write_table({weights(7): Times(1.0, 1.0)})
    assert list(file.parent.iterdir()) == [file]
    assert tokens() == {512}
