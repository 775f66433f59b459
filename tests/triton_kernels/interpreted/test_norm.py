"""Backward of RMSNorm and LayerNorm, against torch and float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipex.errors import InputError
from pipex.triton_kernels.norm import (
    WIDEST,
    layer_norm_gradient,
    norm_gradient_reference,
    partial_rows,
    reduce_partials,
    rms_norm_gradient,
)

Compare = Callable[[Tensor, Tensor, Tensor], None]
CPU = torch.device("cpu")
EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 96), (13, 200)])
@pytest.mark.parametrize("layer", [False, True])
def test_against_torch(layer: bool, rows: int, width: int, dtype: torch.dtype, assert_as_good: Compare) -> None:
    dy, x = torch.randn(rows, width).to(dtype), (2 * torch.randn(rows, width) + 1).to(dtype)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype) if layer else None
    dx, *partials = (layer_norm_gradient if layer else rms_norm_gradient)(dy, x, weight, EPS)
    gradients = [torch.zeros(width) for _ in partials]
    for rows_of, gradient in zip(partials, gradients, strict=True):
        reduce_partials(rows_of, gradient)
    torch_s = norm_gradient_reference(dy, x, weight, bias, EPS, layer=layer)
    exact = norm_gradient_reference(
        *(None if t is None else t.double() for t in (dy, x, weight, bias)), EPS, layer=layer
    )
    for result in zip((dx, *gradients), torch_s, exact, strict=True):
        assert_as_good(*result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_micro_batches_are_summed_at_once(dtype: torch.dtype, assert_as_good: Compare) -> None:
    width, count = 70, 12
    partials = torch.full((count, partial_rows(CPU), width), torch.nan)
    weight = torch.randn(width)
    batches = [(torch.randn(5, width), torch.randn(5, width)) for _ in range(count)]
    for (dy, x), slot in zip(batches, partials, strict=True):
        assert rms_norm_gradient(dy, x, weight, EPS, partials=slot)[1] is slot
    start = torch.randn(width).to(dtype)
    ours, torch_s, exact = start.clone(), start.clone(), start.double()
    reduce_partials(partials, ours)
    for dy, x in batches:
        torch_s += norm_gradient_reference(dy, x, weight, None, EPS, layer=False)[1].to(dtype)
        exact += norm_gradient_reference(dy.double(), x.double(), weight.double(), None, EPS, layer=False)[1]
    assert_as_good(ours, torch_s, exact)


def test_only_its_own_elements_are_written() -> None:
    dy, x, weight = torch.randn(6, 40), torch.randn(6, 40), torch.randn(40)
    frame, partials = torch.full((8, 44), torch.nan), torch.full((partial_rows(CPU) + 2, 40), torch.nan)
    dx, _ = rms_norm_gradient(dy, x, weight, EPS, out=frame[1:-1, 2:-2], partials=partials[1:-1])
    assert torch.equal(dx, rms_norm_gradient(dy, x, weight, EPS)[0])
    frame[1:-1, 2:-2] = torch.nan
    assert frame.isnan().all()
    assert partials[[0, -1]].isnan().all()
    assert not partials[1:-1].isnan().any()


def test_no_rows() -> None:
    dx, partials = rms_norm_gradient(torch.ones(0, 8), torch.ones(0, 8), torch.ones(8), EPS)
    assert dx.shape == (0, 8)
    assert torch.equal(partials, torch.zeros(partial_rows(CPU), 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, "x is a matrix"),
        ({"x": torch.ones(2, WIDEST + 1)}, f"H from 1 to {WIDEST}"),
        ({"dy": torch.ones(3, 8)}, "dy has another shape"),
        ({"weight": torch.ones(8).half()}, "weight has another dtype"),
        ({"x": torch.ones(8, 4).t()}, "x does not lie row by row"),
        ({"partials": torch.ones(2, 8)}, "partials has another shape"),
        ({"partials": torch.ones(partial_rows(CPU), 16)[:, ::2]}, "partials does not lie row by row"),
        ({"partials": torch.ones(partial_rows(CPU), 16)[:, :8]}, "partials have gaps"),
    ],
)
def test_what_cannot_be_used_is_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {"dy": torch.ones(4, 8), "x": torch.ones(4, 8), "weight": torch.ones(8)}
    with pytest.raises(InputError, match=message):
        rms_norm_gradient(eps=EPS, **(arguments | change))  # type: ignore[arg-type]


def test_partials_must_fit_the_gradient() -> None:
    with pytest.raises(InputError, match="partials has another shape"):
        reduce_partials(torch.ones(4, 8), torch.ones(9))
    with pytest.raises(InputError, match="have gaps"):
        reduce_partials(torch.ones(4, 16)[:, :8], torch.ones(8))
