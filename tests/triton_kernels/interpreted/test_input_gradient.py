"""dX = dY·W with activation gradients, against torch and float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipex.errors import InputError
from pipex.triton_kernels.activations import FORWARD
from pipex.triton_kernels.input_gradient import (
    input_gradient,
    input_gradient_reference,
    plan_input_gradient,
    swiglu_input_gradient,
    swiglu_input_gradient_reference,
)

Compare = Callable[[Tensor, Tensor, Tensor], None]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# [T, N, K]: two tiles each way of those for 16 bits, and of those for 32 bits, with rows aligned; two tiles of K,
# unaligned; one element.
RAGGED, RAGGED_32, UNALIGNED, ONE = (130, 72, 264), (66, 40, 72), (5, 33, 259), (1, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [RAGGED, UNALIGNED, ONE])
@pytest.mark.usefixtures("architecture")
def test_plain(shape: tuple[int, int, int], dtype: torch.dtype, assert_as_good: Compare) -> None:
    t, n, k = RAGGED_32 if shape == RAGGED and dtype is torch.float32 else shape
    dy, weight = torch.randn(t, n).to(dtype), torch.randn(n, k).to(dtype)
    exact = input_gradient_reference(dy.double(), weight.double())
    assert_as_good(input_gradient(dy, weight), input_gradient_reference(dy, weight), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FORWARD)
def test_activation(activation: str, dtype: torch.dtype, assert_as_good: Compare) -> None:
    t, n, k = 40, 24, RAGGED_32[2] if dtype is torch.float32 else RAGGED[2]
    dy, weight, z = torch.randn(t, n).to(dtype), torch.randn(n, k).to(dtype), torch.randn(t, k).to(dtype)
    ours = input_gradient(dy, weight, activation=activation, z=z)
    torch_s = input_gradient_reference(dy, weight, activation=activation, z=z)
    exact = input_gradient_reference(dy.double(), weight.double(), activation=activation, z=z.double())
    assert_as_good(ours, torch_s, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 24, 72), UNALIGNED])
@pytest.mark.usefixtures("architecture")
def test_swiglu(shape: tuple[int, int, int], dtype: torch.dtype, assert_as_good: Compare) -> None:
    t, n, k = shape
    dy, weight, joint = torch.randn(t, n).to(dtype), torch.randn(n, k).to(dtype), torch.randn(t, 2 * k).to(dtype)
    gate, up = joint.split(k, dim=1)  # as one projection makes them
    ours = swiglu_input_gradient(dy, weight, gate, up)
    torch_s = swiglu_input_gradient_reference(dy, weight, gate, up)
    exact = swiglu_input_gradient_reference(dy.double(), weight.double(), gate.double(), up.double())
    for result in zip(ours, torch_s, exact, strict=True):
        assert_as_good(*result)
    assert ours[0].stride() == ours[1].stride() == (2 * k, 1), "one matrix for the projection's own backward"


@pytest.mark.parametrize("activation", FORWARD)
def test_activation_far_out(activation: str, assert_as_good: Compare) -> None:
    z = torch.cat([torch.linspace(-12, 12, 241), torch.tensor([-1e4, -88.0, -0.0, 88.0, 1e4])])[None]
    dy, weight = torch.ones(1, 1), torch.ones(1, z.shape[1])
    ours = input_gradient(dy, weight, activation=activation, z=z)
    torch_s = input_gradient_reference(dy, weight, activation=activation, z=z)
    exact = input_gradient_reference(dy.double(), weight.double(), activation=activation, z=z.double())
    assert_as_good(ours, torch_s, exact)


@pytest.mark.usefixtures("architecture")
def test_only_its_own_elements_are_written() -> None:
    t, n, k = 130, 16, 136
    dy, weight = torch.randn(t, n).half(), torch.randn(n, k).half()
    frame = torch.full((t + 2, k + 16), torch.nan, dtype=torch.float16)
    out = frame[1:-1, 8:-8]
    assert input_gradient(dy, weight, out=out) is out
    assert torch.equal(out, input_gradient(dy, weight))
    frame[1:-1, 8:-8] = torch.nan
    assert frame.isnan().all()


def test_nan_does_not_come_from_beside_an_operand() -> None:
    wide_dy, wide_weight = torch.full((20, 48), torch.nan), torch.full((40, 48), torch.nan)
    dy, weight = wide_dy[:, :33], wide_weight[:33, :41]
    dy[:], weight[:] = torch.randn(20, 33), torch.randn(33, 41)
    torch.testing.assert_close(input_gradient(dy, weight), dy @ weight)


@pytest.mark.parametrize("shape", [(0, 16, 16), (16, 0, 16), (16, 16, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    t, n, k = shape
    assert torch.equal(input_gradient(torch.ones(t, n), torch.ones(n, k)), torch.zeros(t, k))


def test_descriptors_are_used_where_they_can_be() -> None:
    def uses(dy: Tensor, weight: Tensor, capability: tuple[int, int]) -> object:
        launch = plan_input_gradient(dy, weight, None, (), (dy.new_empty(dy.shape[0], weight.shape[1]),), capability)
        return launch.constants["DESCRIPTORS"]

    aligned, odd = torch.ones(24, 24).half(), torch.ones(25, 25).half()
    assert uses(aligned, aligned, (9, 0))
    assert not uses(aligned, aligned, (8, 0))
    assert not uses(aligned, aligned, (10, 0))
    assert not uses(odd, odd, (9, 0)), "rows of 50 bytes"
    assert not uses(torch.ones(24, 32).half()[:, 1:25], aligned, (9, 0)), "starts at 2 bytes"
    assert not uses(aligned.float(), aligned.float(), (9, 0)), "float32 is not for tensor cores"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.ones(4, 6)}, "weight has another shape .* got \\(5, 8\\); needed \\(6, 8\\)"),
        ({"dy": torch.ones(4)}, "are matrices"),
        ({"z": torch.ones(4, 9)}, "z has another shape"),
        ({"z": torch.ones(4, 8).half()}, "z has another dtype"),
        ({"dy": torch.ones(4, 5).double()}, "dy has another dtype; got torch.float64"),
        ({"weight": torch.ones(8, 5).t()}, "weight does not lie row by row"),
        ({"dy": torch.ones(1, 5).expand(4, 5)}, "dy does not lie row by row"),
        ({"weight": torch.ones(5, 8, device="meta")}, "weight is on another device"),
        ({"activation": "tanh"}, "unknown activation; got 'tanh'"),
        ({"z": None}, "needs the activation's input"),
    ],
)
def test_what_cannot_be_used_is_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "dy": torch.ones(4, 5), "weight": torch.ones(5, 8), "activation": "relu", "z": torch.ones(4, 8),
    }  # fmt: skip
    input_gradient(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        input_gradient(**(arguments | change))  # type: ignore[arg-type]
