"""Triton kernels of the backward pass, each beside its plain reference.

    input_gradient          dX = dY·W, with the gradient of the activation in its epilogue
    swiglu_input_gradient   the same for SwiGLU's gate and up halves
    weight_gradient         dW += dYᵀ·X over several micro-batches in one launch, with the bias gradient
    grouped_weight_gradient the same for several layers of one shape in one launch
    rms_norm_gradient       dX of RMSNorm, with partial rows of its weight's gradient
    layer_norm_gradient     dX of LayerNorm, with partial rows of the gradients of its weight and bias
    reduce_partials         adds such partial rows, of any number of micro-batches, to a gradient

Triton is imported when one of them is first asked for, since most commands need none of them.
"""

from __future__ import annotations

import importlib
from typing import Any

from pipex.errors import NativeUnavailable

_HOME = {
    "input_gradient": "input_gradient",
    "swiglu_input_gradient": "input_gradient",
    "weight_gradient": "weight_gradient",
    "grouped_weight_gradient": "weight_gradient",
    "rms_norm_gradient": "norm",
    "layer_norm_gradient": "norm",
    "reduce_partials": "norm",
}

__all__ = list(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"pipex.triton_kernels.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise NativeUnavailable(
            "the kernels need Triton", got="no module of that name", fix="pip install 'triton>=3.6'"
        ) from error
    return getattr(module, name)
