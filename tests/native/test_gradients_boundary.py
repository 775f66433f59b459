"""What the gradient kernels cannot do is refused before anything is launched: here, where there is no driver either."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipex.errors import InputError, NativeUnavailable

_cuda = pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")

PART, GRADIENT, WORKSPACE, IDS, ORDER = 0x10000, 0x20000, 0x30000, 0x40000, 0x50000
BIAS: dict[str, Any] = {
    "parts": [(PART, 300), (PART, 0), (PART, 7)], "number_type": "bfloat16", "columns": 64, "gradient": GRADIENT,
    "gradient_type": "float32", "workspace": WORKSPACE, "workspace_bytes": 3 * 64 * 4, "stream": 0,
}  # fmt: skip
NORM: dict[str, Any] = {
    "parts": [(PART, 132)], "columns": 64, "gradient": GRADIENT, "gradient_type": "float32", "stream": 0,
}  # fmt: skip
EMBEDDING: dict[str, Any] = {
    **BIAS, "ids": IDS, "order": ORDER, "vocabulary": 100, "padding": -1, "workspace_bytes": 2 * 10 * 64 * 4,
}  # fmt: skip
TO_MAIN: dict[str, Any] = {"gradient": GRADIENT, "number_type": "float16", "main": PART, "count": 10, "stream": 0}
FROM_MAIN = dict(TO_MAIN)
ALL = {
    "add_bias_gradient": BIAS,
    "add_norm_gradient": NORM,
    "add_embedding_gradient": EMBEDDING,
    "add_to_main_gradient": TO_MAIN,
    "cast_main_gradient": FROM_MAIN,
}

MATRICES = ("add_bias_gradient", "add_norm_gradient", "add_embedding_gradient")
WITH_WORKSPACE = ("add_bias_gradient", "add_embedding_gradient")
CASTS = ("add_to_main_gradient", "cast_main_gradient")


def test_the_workspace_holds_what_a_pass_leaves_to_the_next() -> None:
    assert [_cuda.bias_gradient_workspace(rows, 64) for rows in (0, 1, 128, 129, 307)] == [0, 256, 256, 512, 768]
    assert [_cuda.embedding_gradient_workspace(rows, 64) for rows in (0, 1, 32, 33)] == [0, 512, 512, 1024]


@pytest.mark.parametrize(
    ("functions", "change", "text"),
    [
        (MATRICES, {"columns": 0}, "got 0 columns"),
        (MATRICES, {"columns": 2**40}, "got 1099511627776 columns"),
        (MATRICES, {"parts": []}, "got 0; needed 1 to 128"),
        (MATRICES, {"parts": [(PART, 1)] * 129}, "got 129; needed 1 to 128"),
        (MATRICES, {"parts": [(PART, 1), (PART, -1)]}, "micro-batch 1 of the call .* got -1 rows"),
        (MATRICES, {"parts": [(PART, 1), (PART, 2**58)]}, "micro-batch 1 of the call .* fewer than"),
        (MATRICES, {"parts": [(0, 1)]}, "micro-batch 0 of the call is not at a usable address; got 0"),
        (MATRICES, {"parts": [(PART + 1, 1)]}, "micro-batch 0 of the call is not at a usable address"),
        (MATRICES, {"gradient": 0}, "the gradient is not at a usable address; got 0"),
        (MATRICES, {"gradient": GRADIENT + 2}, "needed a multiple of 4, not 0"),
        (MATRICES, {"gradient_type": "float64"}, "got float64; needed float32, float16 or bfloat16"),
        (WITH_WORKSPACE, {"number_type": "int8"}, "got int8"),
        (WITH_WORKSPACE, {"gradient_type": "float16"}, "got float16; needed float32 or bfloat16"),
        (WITH_WORKSPACE, {"workspace": 0}, "the workspace is not at a usable address"),
        (WITH_WORKSPACE, {"workspace": WORKSPACE + 8}, "needed a multiple of 16"),
        (["add_bias_gradient"], {"workspace_bytes": 767}, "got 767 bytes; needed 768"),
        (["add_embedding_gradient"], {"workspace_bytes": 5119}, "got 5119 bytes; needed 5120"),
        (["add_embedding_gradient"], {"ids": 0}, "the list of ids"),
        (["add_embedding_gradient"], {"order": 4}, "the order of tokens"),
        (CASTS, {"count": -1}, "got -1"),
        (CASTS, {"gradient": 1}, "the gradient is not at a usable address; got 1; needed a multiple of 2"),
        (CASTS, {"main": 2}, "the main gradient is not at a usable address; got 2; needed a multiple of 4"),
        (CASTS, {"number_type": "float8"}, "got float8"),
    ],
)
def test_what_does_not_fit_is_refused(functions: list[str], change: dict[str, Any], text: str) -> None:
    for function in functions:
        with pytest.raises(InputError, match=text):
            getattr(_cuda, function)(**{**ALL[function], **change})


def test_nothing_to_sum_needs_no_gpu() -> None:
    for function in MATRICES:
        getattr(_cuda, function)(**{**ALL[function], "parts": [(0, 0)], "stream": 0})
    for function in CASTS:
        getattr(_cuda, function)(**{**ALL[function], "count": 0, "gradient": 0, "main": 0})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the addresses above are no GPU's")
@pytest.mark.parametrize("function", ALL)
def test_without_a_driver_the_error_says_so(function: str) -> None:
    with pytest.raises(NativeUnavailable, match=r"launch of the .*cudaError.*this needs an NVIDIA GPU and its driver"):
        getattr(_cuda, function)(**ALL[function])
