"""Gradients that are sums over the tokens of several micro-batches, by the kernels of ``pipex._cuda``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipex.errors import NativeUnavailable

try:
    from pipex import _cuda
except ImportError:  # built without CUDA kernels
    _cuda = None  # type: ignore[assignment]

PARTS = 128
"""The most that one call takes."""


def serves(device: torch.device) -> bool:
    """Whether these functions can be called for tensors there."""
    return _cuda is not None and device.type == "cuda"


def add_embedding_gradient(
    dys: Sequence[Tensor], ids: Sequence[Tensor], weight_grad: Tensor, padding: int = -1
) -> None:
    """weight_grad[id] += Σ of the rows of dY whose token is id; no other row is read or written. torch's own makes a
    gradient of the table's size for each micro-batch.

    Args:
        dys: [T, C] of each micro-batch, contiguous; float32, float16 or bfloat16.
        ids: [T] of each, the tokens' ids, of any integer type, on the same GPU.
        weight_grad: [V, C], contiguous, float32 or of dY's dtype; added to, rounded once per call. Sums are made in
            float32, in an order that depends on the ids only: the same bits run after run.
        padding: an id without gradient.

    Raises:
        NativeUnavailable: built without CUDA kernels.
    """
    if _cuda is None:
        raise NativeUnavailable("pipex was built without CUDA kernels", fix="pipex info says why")
    vocabulary, columns = weight_grad.shape
    for start in range(0, len(dys), PARTS):
        parts = dys[start : start + PARTS]
        rows = sum(len(part) for part in parts)
        if not rows or not columns:
            continue
        sorted_ids, order = torch.cat([part.long() for part in ids[start : start + PARTS]]).sort(stable=True)
        size = _cuda.embedding_gradient_workspace(rows, columns)
        workspace = torch.empty(size, dtype=torch.uint8, device=weight_grad.device)
        # What is freed here is used again only by work that comes later on this stream.
        _cuda.add_embedding_gradient(
            [(part.data_ptr(), len(part)) for part in parts], _name(parts[0]), columns, sorted_ids.data_ptr(),
            order.data_ptr(), weight_grad.data_ptr(), _name(weight_grad), vocabulary, padding, workspace.data_ptr(),
            size, torch.cuda.current_stream(weight_grad.device).cuda_stream,
        )  # fmt: skip


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
