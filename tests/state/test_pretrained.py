"""The files of a pretrained model: whatever ends a save, the directory holds one whole model; whatever stands in files,
they are read or refused by name."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import SEED
from mutated import mutate
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.state import Piece, PretrainedFiles, publish, withdraw, write_piece
from tests.state.test_interrupted_save import file_limit


def tensors_of(step: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    values = torch.randn(5, 3, generator=generator)
    return {f"a{rank}": values, f"b{rank}": values[0].bfloat16(), f"step{rank}": torch.tensor(step)}


def pieces_of(directory: Path, step: int, ranks: int, stem: str = "model") -> list[Piece]:
    for rank in range(ranks):
        withdraw(directory, stem, rank)
    return [write_piece(directory, stem, rank, tensors_of(step, rank)) for rank in range(ranks)]


def publish_all(directory: Path, step: int, pieces: list[Piece], stem: str = "model") -> None:
    def settings(to: Path) -> None:
        (to / "config.json").write_text(str(step))

    publish(directory, stem, pieces, settings, one_file=stem != "model")


def save(directory: Path, step: int, ranks: int, stem: str = "model") -> None:
    publish_all(directory, step, pieces_of(directory, step, ranks, stem), stem)


def step_in(directory: Path, stem: str = "model") -> int:
    """Of the one save whose tensors all are there."""
    files = PretrainedFiles(directory, stem)
    found = files.read(files.forms)
    step, ranks = int(found["step0"]), len(found) // 3
    expected = {name: tensor for rank in range(ranks) for name, tensor in tensors_of(step, rank).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert int((directory / "config.json").read_text()) >= step
    return step


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


TWO = {"config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
       "model.safetensors.index.json"}  # fmt: skip


def killed_before(calls: int, work: Callable[[], None]) -> bool:
    """Runs ``work`` in a child that kills itself before so many changes of a directory. False: it came to its end."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    left = calls

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("rename", "replace", "link", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("stem", "before", "after"),
    [("model", 1, 1), ("model", 1, 2), ("model", 2, 1), ("model", 2, 2), ("model", 3, 2), ("adapter", 2, 2)],
)
def test_sigkill_anywhere_in_publishing_leaves_one_whole_model(
    stem: str, before: int, after: int, tmp_path: Path
) -> None:
    seen, calls, finished = [], 0, False
    while not finished:
        directory = tmp_path / str(calls)
        save(directory, 1, before, stem)
        pieces = pieces_of(directory, 2, after, stem)
        finished = not killed_before(calls, lambda: publish_all(directory, 2, pieces, stem))  # noqa: B023
        seen.append(step_in(directory, stem))
        save(directory, 3, 2, stem)
        assert step_in(directory, stem) == 3
        left = TWO if stem == "model" else {"config.json", "adapter.safetensors"}
        assert names_in(directory) == left, "leftovers of the killed save"
        calls += 1
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}
    assert calls > 4


def test_a_single_file_that_stays_is_no_save_of_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be read in their place."""
    save(tmp_path, 1, 1)
    unlink = os.unlink

    def kept(path: Path, **options: object) -> None:
        if Path(path).name == "model.safetensors":
            raise OSError(errno.EPERM, "Operation not permitted")
        unlink(path)

    pieces = pieces_of(tmp_path, 2, 2)
    monkeypatch.setattr(os, "unlink", kept)
    with pytest.raises(CheckpointError, match="Operation not permitted"):
        publish_all(tmp_path, 2, pieces)
    assert step_in(tmp_path) == 1


def test_without_links_the_files_have_other_names_and_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    save(tmp_path, 1, 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "link", no_links)
        save(tmp_path, 2, 2)
    assert step_in(tmp_path) == 2
    assert len(names_in(tmp_path)) == 4
    assert len(list(tmp_path.glob("model-*-0000?-of-00002.safetensors"))) == 2
    save(tmp_path, 3, 2)
    assert step_in(tmp_path) == 3
    assert names_in(tmp_path) == TWO


@pytest.mark.parametrize("limit", [0, 10, 100])
def test_a_piece_that_cannot_be_written_whole_leaves_nothing(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1, 2)
    with pytest.raises(CheckpointError, match=r"cannot write .*File too large"), file_limit(limit):
        pieces_of(tmp_path, 2, 2)
    assert names_in(tmp_path) == TWO
    assert step_in(tmp_path) == 1


def test_settings_that_cannot_be_saved_leave_the_files_as_they_were(tmp_path: Path) -> None:
    def refused(to: Path) -> None:
        (to / "config.json").write_text("2")
        raise ValueError("temperature is set, and do_sample is not")

    save(tmp_path, 1, 2)
    pieces = pieces_of(tmp_path, 2, 2)
    with pytest.raises(CheckpointError, match="settings cannot be saved; got ValueError: temperature"):
        publish(tmp_path, "model", pieces, refused, one_file=False)
    withdraw(tmp_path, "model")
    assert names_in(tmp_path) == TWO
    assert (tmp_path / "config.json").read_text() == "1"
    assert step_in(tmp_path) == 1


def test_withdraw_is_of_one_rank_and_of_one_stem(tmp_path: Path) -> None:
    for stem in ("model", "adapter"):
        for rank in range(2):
            write_piece(tmp_path, stem, rank, tensors_of(1, rank))
    withdraw(tmp_path, "model", 1)
    assert sorted(name.split("-")[1:3] for name in names_in(tmp_path)) == [
        ["adapter", "rank0000"], ["adapter", "rank0001"], ["model", "rank0000"],
    ]  # fmt: skip
    withdraw(tmp_path, "model")
    assert len(names_in(tmp_path)) == 2


def test_one_file_of_several_pieces_has_its_tensors_aligned(tmp_path: Path) -> None:
    """Of a piece with bytes alone, and one of floats."""
    pieces = [
        write_piece(tmp_path, "adapter", 0, {"bytes": torch.arange(3, dtype=torch.uint8)}),
        write_piece(tmp_path, "adapter", 1, {"floats": torch.arange(3.0)}),
    ]
    publish(tmp_path, "adapter", pieces, lambda to: None, one_file=True)
    assert names_in(tmp_path) == {"adapter.safetensors"}
    content = (tmp_path / "adapter.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["floats"]["data_offsets"] == [0, 12]
    found = load_file(tmp_path / "adapter.safetensors")
    assert found["bytes"].tolist() == found["floats"].tolist() == [0, 1, 2]


# Reading.


def test_a_single_file_is_read_before_an_index(tmp_path: Path) -> None:
    """As transformers does."""
    save(tmp_path, 1, 2)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(PretrainedFiles(tmp_path, "model").forms) == ["only"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[]", "cannot be read as the index"),
        ("{}", "KeyError: 'weight_map'"),
        ('{"weight_map": []}', "no file names"),
        ('{"weight_map": {"a": 1}}', "no file names"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "no .*of the directory"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "no .*of the directory"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors is damaged; got No such file"),
        ('{"weight_map": {"a": "1.safetensors", "c": "1.safetensors"}}', "1.safetensors is damaged; got no c;"),
        ('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', "2.safetensors is damaged; got 'a', which"),
        ("[" * 100_000, "cannot be read as the index"),
    ],
)
def test_an_index_that_misleads_is_refused(index: str, words: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=words):
        PretrainedFiles(tmp_path, "model")


def test_files_may_be_links_as_those_of_the_hub_s_cache(tmp_path: Path) -> None:
    save(tmp_path / "blobs", 1, 2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    assert step_in(snapshot) == 1


def test_a_file_that_changes_between_check_and_reading_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, 1)
    files = PretrainedFiles(tmp_path, "model")
    save_file({name: torch.ones(2) for name in files.forms}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="got another a0 than before"):
        files.read(["a0"])


def changed(drawn: random.Random, path: Path, content: bytes) -> bytes:
    """With the JSON in it mutated, the index or a header; or a byte of it."""
    if drawn.random() < 0.2:
        place = drawn.randrange(len(content))
        return content[:place] + bytes([drawn.randrange(256)]) + content[place + drawn.randrange(2) :]
    end = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    value = json.loads(content[8 if end < len(content) else 0 : end])
    mutate(drawn, value, ["F32", "BOOL", "F4", "model-00001-of-00002.safetensors", [0, 4], "a0"])
    text = json.dumps(value).encode()
    return text if end == len(content) else len(text).to_bytes(8, "little") + text + content[end:]


def test_whatever_stands_in_the_files_they_are_read_or_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    drawn = random.Random(SEED)
    originals = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "config.json"}
    refused = 0
    for _ in range(600):
        path = drawn.choice(sorted(originals))
        path.write_bytes(changed(drawn, path, originals[path]))
        try:
            files = PretrainedFiles(tmp_path, "model")
            files.read(files.forms)
        except CheckpointError:
            refused += 1
        path.write_bytes(originals[path])
    assert 100 < refused < 600
    assert step_in(tmp_path) == 1
