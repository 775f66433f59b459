"""Checkpoints: a directory of safetensors files and a manifest, keyed by the unsplit model's parameter names.

    directory/
        checkpoint.json                            the manifest: step, meta, and each shard's size, checksum and tensors
        step00000012-rank0003-5f1c09aa.safetensors one shard per rank

A save is: every rank calls ``write_shard``; when all have, rank 0 calls ``commit``, which makes the new checkpoint the
current one by one rename and deletes the files of the one before. If a rank fails, ``discard`` takes the shards away.
Whatever happens in between, the directory holds one complete checkpoint.

Nothing in it is a pickle. Shards can be opened by any safetensors reader; model tensors are called ``model/<name>``.
"""

from pipex.state.checkpoint import Checkpoint
from pipex.state.manifest import ShardInfo
from pipex.state.model import check_model, load_model_state, model_state
from pipex.state.optimizer import load_optimizer_state, optimizer_state
from pipex.state.save import commit, discard, write_shard

__all__ = [
    "Checkpoint",
    "ShardInfo",
    "check_model",
    "commit",
    "discard",
    "load_model_state",
    "load_optimizer_state",
    "model_state",
    "optimizer_state",
    "write_shard",
]
