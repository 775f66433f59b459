"""The manifest of a checkpoint: what it consists of, in one small JSON file.

A checkpoint may come from somebody else, so everything in a manifest is checked before it is used.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from pipex.errors import CheckpointError
from pipex.reading import read_file

MANIFEST = "checkpoint.json"
FORMAT = "pipex checkpoint 1"
SHARD_NAME = re.compile(r"step\d{8,}-rank(?P<rank>\d{4,})-[0-9a-f]{8}\.safetensors", re.ASCII)

LARGEST = 64 << 20
"""Bytes of a manifest; some hundred thousand parameters under AdamW, which take 600 each."""
DEEPEST = 100
"""Lists and objects within each other; what reads and writes JSON calls itself for each."""
MOST_STEPS = 1 << 31
"""Ranks tell each other their step in 32 bits."""


class ShardInfo(TypedDict):
    """One shard: file name, size, CRC-32, its tensors' forms by name (``float32[8, 64]``), and its meta."""

    file: str
    bytes: int
    crc32: int
    tensors: dict[str, str]
    meta: dict[str, Any]


_FILE = {"format": str, "crc32": int, "checkpoint": dict}
_CHECKPOINT = {"step": int, "shards": list, "meta": dict}
_SHARD = {"file": str, "bytes": int, "crc32": int, "tensors": dict, "meta": dict}


@dataclass(frozen=True)
class Manifest:
    """A complete checkpoint; ``meta`` is what belongs to no single shard."""

    step: int
    shards: list[ShardInfo]
    meta: dict[str, Any]

    def all_meta(self) -> dict[str, Any]:
        """The meta of the whole checkpoint, the shards' included.

        Raises:
            CheckpointError: two shards say different things about one name.
        """
        return _together([self.meta, *(shard["meta"] for shard in self.shards)])

    def all_tensors(self) -> dict[str, str]:
        """The forms of all tensors by name; raises as ``all_meta``."""
        return _together([shard["tensors"] for shard in self.shards])

    def to_text(self) -> bytes:
        """The file's content. It has a CRC-32 of its own, since the meta (learning rates) is in no shard.

        Raises:
            CheckpointError: shards contradict each other, or the meta is nothing that ``from_text`` would read back.
        """
        self.all_meta()
        self.all_tensors()
        checkpoint = {"step": self.step, "shards": self.shards, "meta": self.meta}
        try:
            outer = {"format": FORMAT, "crc32": _crc32(checkpoint), "checkpoint": checkpoint}
            text = json.dumps(outer, indent=1).encode()
            _parse(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                "the manifest of this checkpoint could not be read again", got=str(error),
                needed=f"meta that JSON can hold, at most {DEEPEST} deep and {LARGEST} bytes together",
            ) from error  # fmt: skip
        return text

    @classmethod
    def read(cls, directory: Path) -> Manifest | None:
        """The current checkpoint's manifest, or None where there is none.

        Raises:
            CheckpointError: the file cannot be read, or is not what ``to_text`` wrote.
        """
        path = directory / MANIFEST
        try:
            return _parse(read_file(path, LARGEST, follow=False))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"{path} cannot be read as the manifest of a checkpoint",
                got=error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__,
                needed=f"a file of format {FORMAT!r}, undamaged",
                fix="use another checkpoint, or move this directory away",
            ) from error


def _parse(text: bytes) -> Manifest:
    """
    Raises:
        ValueError: says what is wrong, and where.
    """
    if len(text) > LARGEST:
        raise ValueError(f"{len(text)} bytes, more than {LARGEST}")
    outer = json.loads(text)
    _check_depth(outer)
    if not isinstance(outer, dict) or outer.get("format") != FORMAT:
        raise ValueError("another format")
    _check_fields("the file", outer, _FILE)
    checkpoint = outer["checkpoint"]
    if outer["crc32"] != _crc32(checkpoint):
        raise ValueError("another checksum than it says")
    _check_fields("checkpoint", checkpoint, _CHECKPOINT)
    if not 0 <= checkpoint["step"] < MOST_STEPS:
        raise ValueError(f"step {shown(checkpoint['step'])}, which is not from 0 to {MOST_STEPS - 1}")
    for number, shard in enumerate(checkpoint["shards"]):
        _check_shard(f"shard {number}", shard)
    files = {shard["file"] for shard in checkpoint["shards"]}
    if not files or len(files) < len(checkpoint["shards"]):
        raise ValueError(f"{len(checkpoint['shards'])} shards in {len(files)} files")
    return Manifest(**checkpoint)


def _check_shard(where: str, shard: object) -> None:
    fields = _check_fields(where, shard, _SHARD)
    for name, bits in (("bytes", 63), ("crc32", 32)):
        if not 0 <= fields[name] < 1 << bits:
            raise ValueError(f"{name} {shown(fields[name])} of {where}")
    for name, form in fields["tensors"].items():
        if not isinstance(form, str):
            raise ValueError(f"{shown(form)} as the form of {shown(name)} in {where}")


def _check_fields(where: str, value: object, types: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != types.keys():
        raise ValueError(f"{where} is no object of {', '.join(types)}")
    for name, needed in types.items():
        if type(value[name]) is not needed:  # a bool is an int to isinstance
            raise ValueError(f"{name} of {where} is {shown(value[name])}, no {needed.__name__}")
    return value


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"lists and objects more than {DEEPEST} deep")


def _inside(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _crc32(checkpoint: object) -> int:
    # Reading and writing JSON again gives the same text: the order of keys is kept, floats round-trip.
    return zlib.crc32(json.dumps(checkpoint).encode())


def _together(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    together: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name in together and together[name] != value:
                raise CheckpointError(
                    f"ranks save different things as {name}",
                    got=f"{shown(value, str)} and {shown(together[name], str)}",
                )
            together[name] = value
    return together


def shown(value: object, text_of: Any = repr) -> str:
    """A value from a file for an error message, cut where it is long."""
    text = text_of(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
