"""Reading a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipex.errors import CheckpointError
from pipex.state.files import first_few
from pipex.state.manifest import Manifest, ShardInfo
from pipex.state.serialize import form

CHUNK = 1 << 20


class Checkpoint:
    """The current checkpoint of a directory, independent of how many ranks wrote it.

    Attributes:
        directory: where it lies.
        step: the step after which it was saved.
        meta: JSON values by name.
        tensors: the form of each tensor by name, such as ``float32[8, 64]``.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
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
        for shard in manifest.shards:
            path = directory / shard["file"]
            if not path.exists():
                raise _damaged(path, "no such file", f"a file of {shard['bytes']} bytes")
            if path.stat().st_size != shard["bytes"]:
                raise _damaged(path, f"{path.stat().st_size} bytes", f"{shard['bytes']} bytes")
        return cls(directory, manifest)

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

    def _read(self, shard: ShardInfo, names: list[str]) -> dict[str, Tensor]:
        path = self.directory / shard["file"]
        try:
            if shard["file"] not in self._intact:
                checksum = _crc32(path)
                if checksum != shard["crc32"]:
                    raise _damaged(path, f"checksum {checksum:08x}", f"{shard['crc32']:08x}")
                self._intact.add(shard["file"])
            with safe_open(path, framework="pt") as file:
                # Cloned: what safe_open returns may be a view of the mapped file.
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except (OSError, SafetensorError) as error:
            raise _damaged(path, str(error), "a readable safetensors file") from error
        for name, tensor in tensors.items():
            if form(tensor) != shard["tensors"][name]:
                raise _damaged(path, f"{name} as {form(tensor)}", shard["tensors"][name])
        return tensors


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _damaged(path: Path, got: str, needed: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged", got=got, needed=needed, fix="use another checkpoint")
