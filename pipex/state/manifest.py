"""The manifest of a checkpoint: what it consists of, in one small JSON file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from pipex.errors import CheckpointError

MANIFEST = "checkpoint.json"
FORMAT = "pipex checkpoint 1"


class ShardInfo(TypedDict):
    """One shard: file name, size, CRC-32, its tensors' forms by name (``float32[8, 64]``), and its meta."""

    file: str
    bytes: int
    crc32: int
    tensors: dict[str, str]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint; ``meta`` is what belongs to no single shard."""

    step: int
    shards: list[ShardInfo]
    meta: dict[str, Any]

    def check(self) -> None:
        """
        Raises:
            CheckpointError: two shards say different things about one name.
        """
        self.all_meta()
        self.all_tensors()

    def all_meta(self) -> dict[str, Any]:
        """The meta of the whole checkpoint, the shards' included."""
        return _together([self.meta, *(shard["meta"] for shard in self.shards)])

    def all_tensors(self) -> dict[str, str]:
        """The forms of all tensors by name."""
        return _together([shard["tensors"] for shard in self.shards])

    def to_text(self) -> bytes:
        """The file's content. It has a CRC-32 of its own, since the meta (learning rates) is in no shard."""
        checkpoint = asdict(self)
        return json.dumps({"format": FORMAT, "crc32": _crc32(checkpoint), "checkpoint": checkpoint}, indent=1).encode()

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The current checkpoint's manifest, or None where there is none.

        Raises:
            CheckpointError: the file cannot be read, or is not what ``to_text`` wrote.
        """
        path = directory / MANIFEST
        try:
            outer = json.loads(path.read_bytes())
            if outer["format"] != FORMAT or outer["crc32"] != _crc32(outer["checkpoint"]):
                raise ValueError("format or checksum differ")
            return cls(**outer["checkpoint"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} cannot be read as the manifest of a checkpoint",
                got=f"{type(error).__name__}: {error}",
                needed=f"a file of format {FORMAT!r}, undamaged",
                fix="use another checkpoint, or move this directory away",
            ) from error


def _crc32(checkpoint: object) -> int:
    # Reading and writing JSON again gives the same text: the order of keys is kept, floats round-trip.
    return zlib.crc32(json.dumps(checkpoint).encode())


def _together(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    together: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if together.setdefault(name, value) != value:
                raise CheckpointError(f"ranks save different things as {name}", got=f"{value} and {together[name]}")
    return together
