"""The text that ``pipex train`` trains on."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipex.errors import InputError
from pipex.reading import open_file

STANDARD_LIBRARY_BYTES = 4 << 20  # enough that a short run does not see the same text often; read in milliseconds


class Text:
    """A text as one row of tokens; of bytes where it is given as these. Batches are a pure function of their arguments,
    so that every rank can make the same one, and a resumed run sees what the uninterrupted one would have seen."""

    def __init__(self, tokens: bytes | Tensor) -> None:
        self.unit = "bytes" if isinstance(tokens, bytes) else "tokens"
        self.tokens = torch.frombuffer(bytearray(tokens), dtype=torch.uint8) if isinstance(tokens, bytes) else tokens

    def windows(self, step: int, count: int, length: int, seed: int) -> Tensor:
        """Random windows of the text, int64 [count, length].

        Raises:
            InputError: the text is shorter than that.
        """
        if len(self.tokens) < length:
            raise InputError(
                "the text is too short", got=f"{len(self.tokens)} {self.unit}", needed=f"at least {length}",
                fix="give more text or a smaller context",
            )  # fmt: skip
        # Hashed together: torch's CPU generator uses only the low 32 bits of a seed.
        digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        starts = torch.randint(len(self.tokens) - length + 1, (count, 1), generator=generator)
        return self.tokens[starts + torch.arange(length)].long()


def load_bytes(paths: Sequence[str | Path]) -> bytes:
    """Reads text files, in the given order; a directory stands for the files directly in it, in order of their names.
    Without a path: the first few MB of the Python standard library's own modules.

    Raises:
        InputError: a file cannot be read, is empty, or is not UTF-8 text; named.
    """
    if not paths:
        return _standard_library()
    return b"".join(_read(file) for path in paths for file in _files(Path(path)))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        files = sorted(file for file in path.iterdir() if file.is_file())
    except OSError as error:
        raise _unreadable(path, error) from error
    if not files:
        raise InputError(f"the directory {path} holds no files", fix="give text files, or a directory with text files")
    return files


def _read(file: Path) -> bytes:
    try:
        with open_file(file) as opened:
            text = opened.read()
    except OSError as error:
        raise _unreadable(file, error) from error
    if not text:
        raise InputError(f"{file} is empty", fix="leave it out, or give another file")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise _not_text(file, f"byte {error.object[error.start]:#04x} at offset {error.start}") from error
    if b"\0" in text:
        raise _not_text(file, f"a NUL byte at offset {text.index(0)}")
    return text


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read: {error.strerror}", fix="check the path and its permissions")


def _not_text(file: Path, got: str) -> InputError:
    return InputError(
        f"{file} is not a text file", got=got, needed="UTF-8 text", fix="leave it out, or convert it to UTF-8"
    )


def _standard_library() -> bytes:
    # Only the modules directly in it: no site-packages, no tests.
    directory = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(directory.glob("*.py")))
    if not text:
        raise InputError(
            f"this Python has no standard library sources in {directory}", fix="give text files as arguments"
        )
    return text[:STANDARD_LIBRARY_BYTES]
