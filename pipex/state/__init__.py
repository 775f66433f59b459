"""Checkpoints: a directory of safetensors files and a manifest, keyed by the unsplit model's parameter names.

    directory/
        checkpoint.json                            the manifest: step, meta, and each shard's size, checksum and tensors
        step00000012-rank0003-5f1c09aa.safetensors one shard per rank

A save is: every rank calls ``write_shard``; when all have, rank 0 calls ``commit``, which makes the new checkpoint the
current one by one rename and deletes the files of the one before. If a rank fails, ``discard`` takes the shards away.
Whatever happens in between, the directory holds one complete checkpoint.

A load reads all that it needs, and so meets every fault of the files, before it changes anything: each ``read_...``
returns what puts it in place.

A pretrained model's own files (``pipex.state.pretrained``) are written and read beside these, without an optimizer.

Nothing in it is a pickle. Shards can be opened by any safetensors reader; model tensors are called ``model/<name>``.
"""

from pipex.state.checkpoint import Checkpoint, Restore
from pipex.state.files import listed
from pipex.state.manifest import ShardInfo
from pipex.state.model import check_model, forms_of, model_state, read_model_state
from pipex.state.objects import Stateful, object_state, read_object_state
from pipex.state.optimizer import optimizer_state, read_optimizer_state
from pipex.state.pretrained import Piece, publish, withdraw, write_piece
from pipex.state.pretrained_load import PretrainedFiles
from pipex.state.save import commit, discard, write_shard
from pipex.state.serialize import form

__all__ = [
    "Checkpoint",
    "Piece",
    "PretrainedFiles",
    "Restore",
    "ShardInfo",
    "Stateful",
    "check_model",
    "commit",
    "discard",
    "form",
    "forms_of",
    "listed",
    "model_state",
    "object_state",
    "optimizer_state",
    "publish",
    "read_model_state",
    "read_object_state",
    "read_optimizer_state",
    "withdraw",
    "write_piece",
    "write_shard",
]
