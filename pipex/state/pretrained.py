"""The files of a pretrained model, as transformers and PEFT lay them out, written by several ranks.

    directory/
        config.json                           and whatever else the model's settings are
        model.safetensors                     all tensors where one file holds them; else
        model-00001-of-00002.safetensors
        model-00002-of-00002.safetensors
        model.safetensors.index.json          which tensor is in which file

A save is: every rank calls ``write_piece``, as often as it has to; when all have, rank 0 calls ``publish``, or
``withdraw`` if one of them has failed. Until then the files of the save before are untouched, and whenever a save is
killed the directory holds one of the two.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypedDict

from safetensors import safe_open
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.reading import open_file
from pipex.state.files import sync_directory, writing
from pipex.state.serialize import Serialized


class Piece(TypedDict):
    """A file of one rank: its name and bytes, those of its tensors alone, and their shapes by name."""

    file: str
    bytes: int
    data: int
    shapes: dict[str, list[int]]


_PARTIAL = re.compile(r"\.pipex-(?P<stem>\w+)-rank(?P<rank>\d{4,})-[0-9a-f]{8}(\.partial|\.settings)", re.ASCII)


def write_piece(directory: Path, stem: str, rank: int, tensors: Mapping[str, Tensor]) -> Piece:
    """Writes tensors into a file that nobody reads yet, and waits until it is on disk.

    Raises:
        CheckpointError: a tensor cannot be saved, or the file cannot be written. Nothing of it is left then.
    """
    serialized = Serialized(tensors)
    path = directory / _partial(stem, rank)
    with writing(path, serialized.size):
        directory.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            serialized.write(file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(directory)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return Piece(file=path.name, bytes=serialized.size, data=sum(t.nbytes for t in tensors.values()), shapes=shapes)


def publish(
    directory: Path, stem: str, pieces: Sequence[Piece], settings: Callable[[Path], None], *, one_file: bool
) -> None:
    """Makes the pieces of all ranks the files of the model, and removes those that they replace.

    Args:
        settings: writes the files beside the tensors into a directory that is there.
        one_file: whether readers know no other way, as of adapters. The pieces are copied into one then.

    Raises:
        CheckpointError: a piece cannot be seen from this rank, the settings cannot be saved, or a file cannot be
            written. The files before stay as they were.
    """
    for piece in pieces:
        path = directory / piece["file"]
        size = path.stat().st_size if path.exists() else None
        if size != piece["bytes"]:
            raise CheckpointError(
                f"rank 0 does not find {path}", got="no such file" if size is None else f"{size} bytes",
                needed=f"{piece['bytes']} bytes", fix="save into a directory that all hosts share",
            )  # fmt: skip
    staged = directory / _partial(stem, 0, "settings")
    with writing(staged, sum(piece["bytes"] for piece in pieces) * one_file):
        try:
            staged.mkdir()
            _call(settings, staged)
            joined = _joined(directory, stem, pieces) if one_file and len(pieces) > 1 else None
            for path in staged.iterdir():
                os.replace(path, directory / path.name)
            if joined or len(pieces) == 1:
                os.replace(joined or directory / pieces[0]["file"], directory / f"{stem}.safetensors")
                used = {f"{stem}.safetensors"}
            else:
                used = _name(directory, stem, pieces)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        sync_directory(directory)
    # The new files stand; what cannot be deleted now is tried again by the next save.
    with suppress(OSError):
        _remove_others(directory, stem, used)
    withdraw(directory, stem)


def withdraw(directory: Path, stem: str, rank: int | None = None) -> None:
    """Deletes what saves that failed or were killed have left: of one rank, or of all."""
    with suppress(OSError):
        for path in directory.iterdir():
            match = _PARTIAL.fullmatch(path.name)
            if match and match["stem"] == stem and rank in (None, int(match["rank"])):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _partial(stem: str, rank: int, ending: str = "partial") -> str:
    return f".pipex-{stem}-rank{rank:04d}-{secrets.token_hex(4)}.{ending}"


def _call(settings: Callable[[Path], None], directory: Path) -> None:
    try:
        settings(directory)
    except OSError:
        raise
    except Exception as error:  # a configuration that is checked when it is saved
        raise CheckpointError("the model's settings cannot be saved", got=f"{type(error).__name__}: {error}") from error
    for path in directory.iterdir():
        with open_file(path) as file:
            os.fsync(file.fileno())


def _joined(directory: Path, stem: str, pieces: Sequence[Piece]) -> Path:
    """A file of all tensors of the pieces, of which none is in memory: the system reads what is written."""
    path = directory / _partial(stem, 0)
    with ExitStack() as opened, writing(path, sum(piece["bytes"] for piece in pieces)):
        tensors: dict[str, Tensor] = {}
        for piece in pieces:
            file = opened.enter_context(open_file(directory / piece["file"], follow=False))
            mapped = opened.enter_context(safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt"))
            tensors |= {name: mapped.get_tensor(name) for name in piece["shapes"]}
        with path.open("xb") as whole:
            Serialized(tensors).write(whole)
            whole.flush()
            os.fsync(whole.fileno())
    return path


def _name(directory: Path, stem: str, pieces: Sequence[Piece]) -> set[str]:
    """Gives the pieces their names, and the index that says so its own; returns all of them.

    The files of a save before may have the very names. Then the pieces get others first, and the index that of these:
    from there on the old files are out of use, and can make room.
    """
    index, count, whole = directory / f"{stem}.safetensors.index.json", len(pieces), directory / f"{stem}.safetensors"
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if not any((directory / name).exists() for name in names):
        _rename(directory, pieces, names)
        _write_index(index, pieces, names)
        whole.unlink(missing_ok=True)  # would be read before the index
        return {index.name, *names}
    token = secrets.token_hex(4)
    others = [f"{stem}-{token}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    _rename(directory, pieces, others)
    _write_index(index, pieces, others)
    whole.unlink(missing_ok=True)
    try:
        for other, name in zip(others, names, strict=True):
            (directory / name).unlink(missing_ok=True)
            os.link(directory / other, directory / name)
    except OSError:  # a file system without links: the other names stay
        return {index.name, *others}
    _write_index(index, pieces, names)
    return {index.name, *names}


def _rename(directory: Path, pieces: Sequence[Piece], names: Sequence[str]) -> None:
    for piece, name in zip(pieces, names, strict=True):
        os.rename(directory / piece["file"], directory / name)
    sync_directory(directory)


def _write_index(index: Path, pieces: Sequence[Piece], names: Sequence[str]) -> None:
    shapes = [shape for piece in pieces for shape in piece["shapes"].values()]
    metadata = {"total_parameters": sum(map(math.prod, shapes)), "total_size": sum(piece["data"] for piece in pieces)}
    places = {tensor: name for piece, name in zip(pieces, names, strict=True) for tensor in piece["shapes"]}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
    stem = index.name.removesuffix(".safetensors.index.json")
    partial = index.with_name(_partial(stem, 0))
    with partial.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, index)
    sync_directory(index.parent)


def _remove_others(directory: Path, stem: str, used: set[str]) -> None:
    """Deletes the files of tensors of saves before, whoever made them."""
    numbered = rf"{re.escape(stem)}(-[0-9a-f]{{8}})?-\d{{5}}-of-\d{{5}}\.safetensors"
    known = re.compile(rf"{numbered}|{re.escape(stem)}\.safetensors(\.index\.json)?", re.ASCII)
    for path in directory.iterdir():
        if known.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)
