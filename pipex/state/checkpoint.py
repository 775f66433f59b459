"""Reading a checkpoint."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.reading import open_file
from pipex.state.files import first_few
from pipex.state.manifest import MANIFEST, SHARD_NAME, Manifest, ShardInfo, shown
from pipex.state.serialize import form

CHUNK = 1 << 20
_SHARD_NAME = "step00000012-rank0003-5f1c09aa.safetensors"

Restore = Callable[[], None]
"""Puts in place what was read. All is read, and so every fault of the files found, before anything is changed."""


class Checkpoint:
    """The current checkpoint of a directory, independent of how many ranks wrote it.

    Attributes:
        directory: where it lies.
        identity: differs between any two checkpoints that were ever saved.
        ranks: how many ranks saved it.
        step: the step after which it was saved.
        meta: JSON values by name.
        tensors: the form of each tensor by name, such as ``float32[8, 64]``.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.identity = manifest.shards[0]["file"]
        self.ranks = len(manifest.shards)
        self.step = manifest.step
        self.meta: dict[str, Any] = manifest.all_meta()
        self.tensors: dict[str, str] = manifest.all_tensors()
        self._shards = manifest.shards
        self._intact: set[str] = set()

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads the manifest and checks the sizes of all shards.

        Raises:
            CheckpointError: there is no checkpoint, or a file of it is missing or damaged; named.
        """
        manifest = Manifest.read(directory)
        if manifest is None:
            raise CheckpointError(f"there is no checkpoint in {directory}", fix="check the path, or start without one")
        checkpoint = cls(directory, manifest)
        for shard in manifest.shards:
            checkpoint.open_shard(shard).close()
        return checkpoint

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, on the CPU, in memory of their own.

        Only shards that hold one of them are read; each is checked against its checksum first, once.

        Raises:
            CheckpointError: a name is not in the checkpoint, or a shard is damaged; named.
        """
        wanted = dict.fromkeys(names)
        missing = [name for name in wanted if name not in self.tensors]
        if missing:
            raise CheckpointError(f"{self.directory} does not hold {first_few(missing)}")
        found: dict[str, Tensor] = {}
        for shard in self._shards:
            here = [name for name in wanted if name in shard["tensors"] and name not in found]
            if here:
                found |= self._read(shard, here)
        return found

    def open_shard(self, shard: ShardInfo) -> BinaryIO:
        if not SHARD_NAME.fullmatch(shard["file"]):
            raise _damaged(self.directory / MANIFEST, f"a shard {shown(shard['file'])}", f"names such as {_SHARD_NAME}")
        path = self.directory / shard["file"]
        try:
            # Neither the name nor, as a link, the file leads out of the directory.
            file = open_file(path, follow=False)
        except FileNotFoundError:
            raise _damaged(path, "no such file", f"a file of {shard['bytes']} bytes") from None
        except OSError as error:
            raise _damaged(path, str(error.strerror), f"a file of {shard['bytes']} bytes") from error
        size = os.fstat(file.fileno()).st_size
        if size != shard["bytes"]:
            file.close()
            raise _damaged(path, f"{size} bytes", f"{shard['bytes']} bytes")
        return file

    def _read(self, shard: ShardInfo, names: list[str]) -> dict[str, Tensor]:
        path = self.directory / shard["file"]
        with self.open_shard(shard) as file:
            if shard["file"] not in self._intact:
                checksum = _crc32(path, file)
                if checksum != shard["crc32"]:
                    raise _damaged(path, f"checksum {checksum:08x}", f"{shard['crc32']:08x}")
                self._intact.add(shard["file"])
            try:
                # By its descriptor: the file that was checked, whatever its name stands for by now.
                with safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt") as opened:
                    # Cloned: what safe_open returns may be a view of the mapped file.
                    tensors = {name: opened.get_tensor(name).clone() for name in names}
            except Exception as error:  # the package has no one error for what it finds in a file, nor has torch
                raise _damaged(path, f"{type(error).__name__}: {error}", "a readable safetensors file") from error
        for name, tensor in tensors.items():
            if form(tensor) != shard["tensors"][name]:
                raise _damaged(path, f"{name} as {form(tensor)}", shard["tensors"][name])
        return tensors


def _crc32(path: Path, file: BinaryIO) -> int:
    checksum = 0
    try:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    except OSError as error:
        raise _damaged(path, str(error.strerror), "a readable file") from error
    return checksum


def _damaged(path: Path, got: str, needed: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged", got=got, needed=needed, fix="use another checkpoint")
