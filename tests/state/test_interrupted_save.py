"""Whatever ends a save before its end, the directory holds one whole checkpoint, and the next save clears up."""

import errno
import os
import resource
import signal
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

import pipex.state
from pipex.errors import CheckpointError
from pipex.state.checkpoint import Checkpoint
from pipex.state.save import commit, discard, write_shard

Save = Callable[..., None]
TensorsOf = Callable[..., dict[str, Tensor]]


def shards_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def test_discard_removes_this_attempt_only(
    tmp_path: Path, save: Save, assert_holds: Save, tensors_of: TensorsOf
) -> None:
    save(tmp_path, 1)
    attempt = write_shard(tmp_path, 2, 0, tensors_of(2, 0), {})
    discard(tmp_path, [attempt])
    assert len(shards_in(tmp_path)) == 2
    assert_holds(tmp_path, 1)


def test_discard_keeps_a_checkpoint_that_was_committed_after_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_holds: Save, tensors_of: TensorsOf
) -> None:
    shards = [write_shard(tmp_path, 1, rank, tensors_of(1, rank), {f"rank{rank}": 1}) for rank in range(2)]

    def no_sync(directory: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pipex.state.save.sync_directory", no_sync)
    with pytest.raises(CheckpointError, match="Input/output error"):
        commit(tmp_path, 1, shards, {"lr": 0.1})
    discard(tmp_path, shards)
    assert_holds(tmp_path, 1)


def test_a_shard_that_rank_0_does_not_see_is_named(tmp_path: Path, tensors_of: TensorsOf) -> None:
    shards = [write_shard(tmp_path / f"host{rank}", 1, rank, tensors_of(1, rank), {}) for rank in range(2)]
    with pytest.raises(CheckpointError, match=f"rank 0 does not find the shard .*{shards[1]['file']}"):
        commit(tmp_path / "host0", 1, shards, {})


@pytest.mark.parametrize("error", [CheckpointError("unreadable"), OSError(errno.EIO, "Input/output error")])
def test_a_checkpoint_that_stands_is_not_said_to_have_failed_by_what_is_cleared_up_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assert_holds: Save, tensors_of: TensorsOf, error: Exception
) -> None:
    shards = [write_shard(tmp_path, 1, rank, tensors_of(1, rank), {f"rank{rank}": 1}) for rank in range(2)]

    def unreadable(directory: Path) -> set[str]:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("pipex.state.save._used", unreadable)
        commit(tmp_path, 1, shards, {"lr": 0.1})
    assert_holds(tmp_path, 1)


# The kernel's own limit on the size of a file stands in for a disk that is full after so many bytes.


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """For the one call only: pytest's own output may go to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [0, 10, 5000, 199_999])
def test_a_shard_that_cannot_be_written_whole_leaves_nothing(
    tmp_path: Path, limit: int, save: Save, assert_holds: Save
) -> None:
    save(tmp_path, 1)
    message = f"cannot write {tmp_path}/step00000002-rank0000-.*: File too large"
    with pytest.raises(CheckpointError, match=message), file_limit(limit):
        save(tmp_path, 2)
    assert len(list(tmp_path.iterdir())) == 3
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("call", [0, 1], ids=["shard", "its directory"])
def test_a_full_disk_is_reported_with_needed_and_free_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, save: Save, assert_holds: Save
) -> None:
    save(tmp_path, 1)
    calls = iter(range(10))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = rf"cannot write {tmp_path}/.*No space left on device; got \d+ bytes free; needed \d+ bytes"
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 2, ranks=1)
    assert len(list(tmp_path.iterdir())) == 3
    assert_holds(tmp_path, 1)


def test_a_full_disk_while_committing_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Save, assert_holds: Save, tensors_of: TensorsOf
) -> None:
    save(tmp_path, 1)
    shards = [write_shard(tmp_path, 2, 0, tensors_of(2, 0), {})]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*\.partial: No space left on device; got \d+ bytes free"):
        commit(tmp_path, 2, shards, {})
    discard(tmp_path, shards)
    assert len(list(tmp_path.iterdir())) == 3
    assert_holds(tmp_path, 1)


# SIGKILL at every line of the saver, by a trace function that counts them.

PACKAGE = str(Path(pipex.state.__file__).parent)


def only_looks(frame: types.FrameType | None) -> bool:
    """Whether the frame is within the checks of a manifest's text: hundreds of lines that touch no file."""
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        if frame.f_code.co_name == "_parse":
            return True
        frame = frame.f_back
    return False


def killed_after(lines: int, work: Callable[[], None]) -> bool:
    """Runs ``work`` in a child that kills itself after so many lines of pipex.state. False: it came to its end."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = lines

    def trace(frame: types.FrameType, event: str, argument: object) -> object:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE) or only_looks(frame):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sigkill_at_any_line_of_a_save_leaves_one_whole_checkpoint(
    tmp_path: Path, save: Save, assert_holds: Save
) -> None:
    seen = set()
    finished = False
    lines = 0
    while not finished:
        directory = tmp_path / str(lines)
        save(directory, 1, ranks=1)
        finished = not killed_after(lines, lambda: save(directory, 2, ranks=1))  # noqa: B023
        step = Checkpoint.open(directory).step
        assert_holds(directory, step, ranks=1)
        seen.add(step)
        save(directory, 3, ranks=1)
        assert_holds(directory, 3, ranks=1)
        assert len(list(directory.iterdir())) == 2, "leftovers of the killed save"
        lines += 1
    assert seen == {1, 2}
    assert lines > 100


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("size", [1, 4096, 100_000, 200_000])
def test_sigkill_within_the_writing_of_a_file_leaves_the_checkpoint_before(
    tmp_path: Path, size: int, save: Save, assert_holds: Save, tensors_of: TensorsOf
) -> None:
    save(tmp_path, 1)
    child = os.fork()
    if not child:
        # The kernel ends the process at this byte of the file, unless the signal is ignored, as Python does.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        write_shard(tmp_path, 2, 0, tensors_of(2, 0), {})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGXFSZ
    assert [path.stat().st_size for path in shards_in(tmp_path) if "step00000002" in path.name] == [size]
    assert_holds(tmp_path, 1)
    save(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 3
