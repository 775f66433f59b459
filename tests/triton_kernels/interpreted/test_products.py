"""The split backward's entry points, where a table says that Triton multiplies."""

from __future__ import annotations

import pytest
import torch
from tables import made_up_gpu, write_table
from torch import Tensor

from pipex.backward import products
from pipex.backward.products import (
    add_by_torch,
    add_weight_gradient,
    add_weight_gradients,
    input_gradient,
    swiglu_input_gradient,
)
from pipex.backward.tuning import DTYPES, KINDS, Product, Times
from pipex.triton_kernels.activations import FORWARD
from pipex.triton_kernels.checks import ACTIVATIONS
from pipex.triton_kernels.input_gradient import input_gradient_reference, swiglu_input_gradient_reference
from pipex.triton_kernels.launch import Launch

__all__ = ["made_up_gpu"]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def launches(made_up_gpu: object, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches so far; all products of [40, 48] are Triton's, and torch's would fail."""
    write_table(
        {
            Product(kind, t, 40, 48, micro_batches, dtype, gradient): Times(1.0, 2.0)
            for kind in KINDS
            for t in (16, 64)
            for micro_batches in (1, 2, 4)
            for dtype in DTYPES
            for gradient in {dtype, "float32"}
        }
    )
    made: list[Launch] = []
    run = Launch.run

    def recorded(self: Launch, device: torch.device) -> None:
        made.append(self)
        run(self, device)

    monkeypatch.setattr(Launch, "run", recorded)
    for name in ("add_by_torch", "input_gradient_by_torch", "swiglu_input_gradient_by_torch"):
        monkeypatch.setattr(products, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    return made


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype"), [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32)]
)
@pytest.mark.parametrize("rows", [[33], [17, 16], [20, 0, 20], [9, 9, 9, 8, 8]])
@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_gradient_is_triton_s_and_as_good_as_torch_s(
    dtype: torch.dtype, gradient_dtype: torch.dtype, rows: list[int], bias: bool, launches: list[Launch], assert_as_good
) -> None:
    dys, xs = [torch.randn(t, 40).to(dtype) for t in rows], [torch.randn(t, 48).to(dtype) for t in rows]
    start = [torch.randn(40, 48).to(gradient_dtype), torch.randn(40).to(gradient_dtype)][: 1 + bias]
    ours, torch_s, exact = [t.clone() for t in start], [t.clone() for t in start], [t.double() for t in start]
    padding = [] if bias else [None]
    add_weight_gradient(dys, xs, *ours, *padding)
    assert len(launches) == 1
    add_by_torch(dys, xs, *torch_s, *padding)
    add_by_torch([dy.double() for dy in dys], [x.double() for x in xs], *exact, *padding)
    for results in zip(ours, torch_s, exact, strict=True):
        assert_as_good(*results)


def test_layers_are_one_launch(launches: list[Launch], assert_as_good) -> None:
    dys, xs = [[[torch.randn(17, width).half() for _ in range(2)] for _ in range(3)] for width in (40, 48)]
    start = [(torch.randn(40, 48), torch.randn(40)) for _ in range(3)]
    weights, biases = [w.clone() for w, _ in start], [b.clone() for _, b in start]
    add_weight_gradients(dys, xs, weights, biases)
    assert len(launches) == 1
    for layer, ours in enumerate(zip(weights, biases, strict=True)):
        torch_s, exact = [t.clone() for t in start[layer]], [t.double() for t in start[layer]]
        add_by_torch(dys[layer], xs[layer], *torch_s)
        add_by_torch([t.double() for t in dys[layer]], [t.double() for t in xs[layer]], *exact)
        for results in zip(ours, torch_s, exact, strict=True):
            assert_as_good(*results)


@pytest.mark.usefixtures("launches")
def test_exact_is_torch_s() -> None:
    dy, x = torch.randn(17, 40), torch.randn(17, 48)
    with pytest.raises(pytest.fail.Exception, match="add_by_torch was called"):
        add_weight_gradient([dy], [x], torch.zeros(40, 48), exact=True)
    with pytest.raises(pytest.fail.Exception, match="add_by_torch was called"):
        add_weight_gradients([[dy]], [[x]], [torch.zeros(40, 48)], exact=True)


def operands(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(*shape).to(dtype) for shape in ((33, 40), (40, 48), (33, 48), (33, 48))]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_an_input_gradient_is_triton_s(
    activation: str | None, dtype: torch.dtype, launches: list[Launch], assert_as_good
) -> None:
    dy, weight, z, _ = operands(dtype)
    given = None if activation is None else z
    ours = input_gradient(dy, weight, activation=activation, z=given)
    assert len(launches) == 1
    torch_s = input_gradient_reference(dy, weight, activation=activation, z=given)
    exact = input_gradient_reference(dy.double(), weight.double(), activation=activation, z=z.double())
    assert_as_good(ours, torch_s, exact)


def test_a_swiglu_gradient_is_triton_s(launches: list[Launch], assert_as_good) -> None:
    given = operands(BF16)
    ours = swiglu_input_gradient(*given)
    assert len(launches) == 1
    torch_s = swiglu_input_gradient_reference(*given)
    exact = swiglu_input_gradient_reference(*(t.double() for t in given))
    for results in zip(ours, torch_s, exact, strict=True):
        assert_as_good(*results)


def test_both_providers_know_the_same_activations() -> None:
    assert set(ACTIVATIONS) == set(FORWARD) == set(products._ACTIVATION_GRADIENTS)
