"""The text that ``pipex train`` trains on."""

import ast
import sysconfig
from pathlib import Path

import pytest
import torch

from pipex.cli.train.data import STANDARD_LIBRARY_BYTES, Text, load_bytes
from pipex.errors import InputError


def test_files_are_joined_in_the_given_order(tmp_path: Path) -> None:
    first, second = tmp_path / "b.txt", tmp_path / "a.txt"
    first.write_text("grün\n", encoding="utf-8")
    second.write_text("red")
    text = load_bytes([first, str(second)])
    assert text == "grün\nred".encode()


def test_a_directory_stands_for_the_files_directly_in_it(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "d").write_text("d")
    assert load_bytes([tmp_path]) == b"abc"


def test_without_a_path_the_standard_library_is_read() -> None:
    text = load_bytes([])
    assert len(text) <= STANDARD_LIBRARY_BYTES
    first = min(Path(sysconfig.get_path("stdlib")).glob("*.py")).read_bytes()
    assert text.startswith(first)
    ast.parse(first)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"ab\0c", "is not a text file; got a NUL byte at offset 2; needed UTF-8 text"),
        (b"ab\xff\xfe", "is not a text file; got byte 0xff at offset 2; needed UTF-8 text"),
        ("text".encode("utf-16-be"), "is not a text file; got a NUL byte at offset 0"),
    ],
    ids=["empty", "NUL", "latin", "UTF-16"],
)
def test_a_file_that_is_not_text_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "good.txt").write_text("good")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load_bytes([tmp_path])
    assert f"{bad} {message}" in str(caught.value)
    assert "leave it out" in str(caught.value)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    with pytest.raises(InputError, match=f"{missing} cannot be read: No such file or directory"):
        load_bytes([missing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"the directory {tmp_path / 'empty'} holds no files"):
        load_bytes([tmp_path / "empty"])
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InputError, match=f"{loop} cannot be read: Too many levels of symbolic links"):
        load_bytes([loop])


def test_windows_are_of_the_text() -> None:
    data = bytes(range(256)) * 4
    windows = Text(data).windows(step=3, count=8, length=20, seed=1)
    assert windows.shape == (8, 20)
    assert windows.dtype == torch.int64
    assert all(bytes(row) in data for row in windows.tolist())


def test_every_window_can_be_drawn_and_none_reaches_past_the_end() -> None:
    windows = Text(b"abcde").windows(step=0, count=500, length=4, seed=0)
    assert {bytes(row) for row in windows.tolist()} == {b"abcd", b"bcde"}


def test_a_text_of_tokens_gives_them() -> None:
    windows = Text(torch.tensor([70000, 3, 5], dtype=torch.int32)).windows(step=0, count=1, length=3, seed=0)
    assert windows.equal(torch.tensor([[70000, 3, 5]]))


def test_windows_depend_on_seed_and_step_alone() -> None:
    text = Text(bytes(range(256)) * 100)

    def windows(step: int, seed: int) -> list[list[int]]:
        return text.windows(step, 4, 16, seed).tolist()

    first = windows(5, 7)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert windows(5, 7) == first
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    others = [windows(step, seed) for step, seed in ((6, 7), (5, 8), (7, 5), (0, 0), (5, 7 + 2**32), (5 + 2**32, 7))]
    assert first not in others


@pytest.mark.parametrize(("tokens", "unit"), [(b"x" * 16, "bytes"), (torch.ones(16), "tokens")])
def test_a_text_shorter_than_a_window_is_refused_with_both_numbers(tokens: bytes | torch.Tensor, unit: str) -> None:
    text = Text(tokens)
    assert text.windows(0, 2, 16, 0).shape == (2, 16)
    with pytest.raises(InputError, match=f"too short; got 16 {unit}; needed at least 17"):
        text.windows(0, 2, 17, 0)
