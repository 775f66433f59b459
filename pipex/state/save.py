"""Saving: every rank writes its shard, rank 0 makes them the current checkpoint."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from pipex.errors import CheckpointError
from pipex.state.files import sync_directory, writing
from pipex.state.manifest import MANIFEST, SHARD_NAME, Manifest, ShardInfo
from pipex.state.serialize import Serialized, form


def write_shard(
    directory: Path, step: int, rank: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> ShardInfo:
    """Writes one rank's part of a checkpoint and waits until it is on disk. The current checkpoint stays.

    What this rank left behind in a save that was killed is removed first. So no rank may begin a save before the
    ``commit`` or ``discard`` of the last one has returned.

    Args:
        tensors: by name, such as ``model/blocks.0.attn.weight``; of any device, strides and sharing of memory.
        meta: anything else, as JSON values by name.

    Returns:
        What ``commit`` needs to know; itself a JSON value.

    Raises:
        CheckpointError: a tensor cannot be saved, or the file cannot be written (with needed and free bytes where the
            disk is full). Nothing of this shard is left then.
    """
    serialized = Serialized(tensors)
    # A name that no file ever had: a shard of the current checkpoint is never overwritten.
    path = directory / f"step{step:08d}-rank{rank:04d}-{secrets.token_hex(4)}.safetensors"
    with writing(path, serialized.size):
        directory.mkdir(parents=True, exist_ok=True)
        _remove_unused(directory, rank)
        with path.open("xb") as file:
            checksum = serialized.write(file)
            file.flush()
            os.fsync(file.fileno())
        sync_directory(directory)
    return ShardInfo(
        file=path.name,
        bytes=serialized.size,
        crc32=checksum,
        tensors={name: form(tensor) for name, tensor in tensors.items()},
        meta=dict(meta),
    )


def commit(directory: Path, step: int, shards: Sequence[ShardInfo], meta: Mapping[str, Any]) -> None:
    """Makes the shards the current checkpoint, by renaming a manifest into place, and deletes all other shards.

    Args:
        shards: of all ranks, in rank order. Where ranks share a parameter, its tensors stand in several shards, with
            the same bits; the first is read.
        meta: what belongs to no single rank, as JSON values by name. The checkpoint's meta is this and all shards'.

    Raises:
        CheckpointError: shards contradict each other, one cannot be seen from this rank, or the manifest cannot be
            written. The checkpoint before it stays then.
    """
    for shard in shards:
        path = directory / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            raise CheckpointError(
                f"rank 0 does not find the shard {path}",
                got="no such file" if size is None else f"{size} bytes",
                needed=f"{shard['bytes']} bytes",
                fix="save into a directory that all hosts share",
            )
    text = Manifest(step, list(shards), dict(meta)).to_text()
    partial = directory / f"{MANIFEST}.partial"
    with writing(partial, len(text)):
        with partial.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, directory / MANIFEST)
        sync_directory(directory)
    # The new checkpoint stands; a file that cannot be deleted now is tried again by the next save.
    with suppress(OSError, CheckpointError):  # of the manifest, which is read again
        _remove_unused(directory)


def discard(directory: Path, shards: Sequence[ShardInfo]) -> None:
    """Deletes the shards of a save that failed. A shard that the current checkpoint uses is kept."""
    unused = {shard["file"] for shard in shards} - _used(directory)
    for name in unused:
        with suppress(OSError):
            (directory / name).unlink(missing_ok=True)


def _remove_unused(directory: Path, rank: int | None = None) -> None:
    """Deletes the shards (of one rank, or of all) that the current checkpoint does not use."""
    used = _used(directory)
    for path in directory.iterdir():
        match = SHARD_NAME.fullmatch(path.name)
        if match and path.name not in used and rank in (None, int(match["rank"])):
            path.unlink(missing_ok=True)


def _used(directory: Path) -> set[str]:
    manifest = Manifest.read(directory)
    return {shard["file"] for shard in manifest.shards} if manifest else set()
