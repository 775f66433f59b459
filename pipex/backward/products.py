"""The weight gradient of a linear layer over several micro-batches, in place: dW += Σ dYᵀ·X and db += Σ dY."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_by_torch(dys: Sequence[Tensor], xs: Sequence[Tensor], weight_grad: Tensor, bias_grad: Tensor | None) -> None:
    """One product with beta = 1 per micro-batch, in rising order; on a GPU that is cuBLAS.

    Args:
        dys, xs: [T, N] and [T, K] of each micro-batch.
        weight_grad, bias_grad: [N, K] and [N], in the operands' dtype or in float32; then no product is rounded to
            fewer bits on its way into them.
    """
    for dy, x in zip(dys, xs, strict=True):
        if weight_grad.dtype is dy.dtype:
            weight_grad.addmm_(dy.t(), x)
        elif dy.is_cuda:
            torch.addmm(weight_grad, dy.t(), x, out_dtype=weight_grad.dtype, out=weight_grad)
        else:  # torch has products of mixed dtypes on GPUs only
            weight_grad.addmm_(dy.t().to(weight_grad.dtype), x.to(weight_grad.dtype))
        if bias_grad is not None:
            bias_grad += dy.sum(0, dtype=bias_grad.dtype)
