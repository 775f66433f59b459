"""The products of a linear layer's backward, by torch; and what is refused, whoever would have multiplied."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import case
from tables import made_up_gpu, write_table
from torch import Tensor

from pipex.backward import products
from pipex.backward.products import (
    add_weight_gradient,
    add_weight_gradients,
    input_gradient,
    swiglu_input_gradient,
)
from pipex.backward.tuning import Product, Times
from pipex.errors import InputError

__all__ = ["made_up_gpu"]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64)]


def unit(dtype: torch.dtype) -> float:
    """Half a unit in the last place of 1: the relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def rows_apart(t: int, width: int, dtype: torch.dtype) -> Tensor:
    """[t, width], with a gap between rows."""
    return torch.randn(t, width + 5).to(dtype)[:, 2:-3]


def assert_sum(result: Tensor, exact: Tensor, magnitude: Tensor, terms: int, roundings: int) -> None:
    """A sum in float32 (float64 for a float64 result) that is rounded to the result's dtype some times more."""
    summed = FP64 if result.dtype is FP64 else FP32
    allowed = ((terms + 2) * unit(summed) + roundings * unit(result.dtype)) * magnitude
    error = (result.double() - exact).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max()} times what is allowed"


@pytest.mark.parametrize(("dtype", "gradient_dtype"), DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_weight_gradients_are_those_of_float64(dtype: torch.dtype, gradient_dtype: torch.dtype, bias: bool) -> None:
    several_rows = [1], [17], [17, 16], [5, 0, 7], [33, 32, 32, 32], [9, 9, 9, 9, 0]
    for rows, (n, k) in product(several_rows, ((13, 7), (1, 1), (32, 48))):
        with case(rows, n, k):
            check_weight_gradient(dtype, gradient_dtype, rows, n, k, bias)


def check_weight_gradient(
    dtype: torch.dtype, gradient_dtype: torch.dtype, rows: list[int], n: int, k: int, bias: bool
) -> None:
    dys, xs = [rows_apart(t, n, dtype) for t in rows], [rows_apart(t, k, dtype) for t in rows]
    weight_grad, bias_grad = torch.randn(n, k).to(gradient_dtype), torch.randn(n).to(gradient_dtype)
    dy, x = torch.cat(dys).double(), torch.cat(xs).double()
    exact = weight_grad.double() + torch.einsum("tn,tk->nk", dy, x)
    magnitude = weight_grad.double().abs() + torch.einsum("tn,tk->nk", dy.abs(), x.abs())
    exact_bias, bias_magnitude = bias_grad.double() + dy.sum(0), bias_grad.double().abs() + dy.abs().sum(0)
    before = bias_grad.clone()

    add_weight_gradient(dys, xs, weight_grad, bias_grad if bias else None)

    assert_sum(weight_grad, exact, magnitude, sum(rows), len(rows))
    if bias:
        assert_sum(bias_grad, exact_bias, bias_magnitude, sum(rows), 2 * len(rows))  # the sum, and the addition
    else:
        assert torch.equal(bias_grad, before)


@pytest.mark.parametrize(("values", "total"), [((1e8, 1.0, 1.0, -1e8), 0.0), ((1e8, -1e8, 1.0, 1.0), 2.0)])
def test_micro_batches_are_added_in_their_order(values: tuple[float, ...], total: float) -> None:
    """In float32 1e8 + 1 is 1e8."""
    weight_grad, bias_grad = torch.zeros(1, 1), torch.zeros(1)
    add_weight_gradient([torch.tensor([[v]]) for v in values], [torch.ones(1, 1)] * 4, weight_grad, bias_grad)
    assert (weight_grad.item(), bias_grad.item()) == (total, total)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.usefixtures("made_up_gpu")
def test_exact_has_the_bits_of_one_call_per_micro_batch_whatever_the_table_says(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    write_table({Product("dW+db", 8, 24, 16, n, name, name): Times(1.0, 2.0) for n in (1, 3)})
    dys, xs = [[torch.randn(8, width).to(dtype) for _ in range(3)] for width in (24, 16)]
    weight_grad, bias_grad = torch.randn(24, 16).to(dtype), torch.randn(24).to(dtype)
    by_hand = weight_grad.clone(), bias_grad.clone()
    for dy, x in zip(dys, xs, strict=True):
        by_hand[0].addmm_(dy.t(), x)
        by_hand[1].add_(dy.sum(0))
    add_weight_gradient(dys, xs, weight_grad, bias_grad, exact=True)
    assert torch.equal(weight_grad, by_hand[0])
    assert torch.equal(bias_grad, by_hand[1])


@pytest.mark.parametrize("exact", [False, True])
def test_several_layers_are_each_alone(exact: bool) -> None:
    # Each tensor by itself, since the bits of a product depend on where its operands start.
    dys, xs = [[[torch.randn(8, width) for _ in range(2)] for _ in range(3)] for width in (5, 6)]
    weights, biases = [torch.randn(5, 6) for _ in range(3)], [torch.randn(5) for _ in range(3)]
    alone = [(w.clone(), b.clone()) for w, b in zip(weights, biases, strict=True)]
    for dy, x, gradients in zip(dys, xs, alone, strict=True):
        add_weight_gradient(dy, x, *gradients)
    add_weight_gradients(dys, xs, weights, biases, exact=exact)
    for ours, wanted in zip(zip(weights, biases, strict=True), alone, strict=True):
        assert torch.equal(ours[0], wanted[0])
        assert torch.equal(ours[1], wanted[1])


def test_nothing_to_add() -> None:
    for dtype in (FP32, BF16):
        weight_grad = torch.ones(4, 4, dtype=dtype)
        add_weight_gradient([], [], weight_grad)
        add_weight_gradient([torch.ones(0, 4, dtype=dtype)], [torch.ones(0, 4, dtype=dtype)], weight_grad)
        assert torch.equal(weight_grad, torch.ones(4, 4, dtype=dtype))
    add_weight_gradients([], [], [])


ACTIVATIONS: dict[str | None, Any] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}
STEEPEST = 1.13  # of all of these: gelu's derivative, at √2


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_input_gradients_are_those_of_float64(dtype: torch.dtype, activation: str | None) -> None:
    for shape in ((17, 13, 7), (1, 1, 1), (0, 3, 4), (32, 48, 64)):
        with case(shape):
            check_input_gradient(dtype, activation, *shape)


def check_input_gradient(dtype: torch.dtype, activation: str | None, t: int, n: int, k: int) -> None:
    dy, weight, z = rows_apart(t, n, dtype), rows_apart(n, k, dtype), rows_apart(t, k, dtype)
    variable = z.double().clone().requires_grad_()
    (exact,) = torch.autograd.grad(ACTIVATIONS[activation](variable), variable, dy.double() @ weight.double())

    result = input_gradient(dy, weight, activation=activation, z=None if activation is None else z)

    assert result.dtype is dtype
    magnitude = STEEPEST * (dy.double().abs() @ weight.double().abs())
    assert_sum(result, exact, magnitude, n + 8, 2)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_swiglu_gradients_are_those_of_float64(dtype: torch.dtype) -> None:
    dy, weight = rows_apart(17, 13, dtype), rows_apart(13, 7, dtype)
    gate, up = torch.randn(17, 14).to(dtype).chunk(2, 1)
    variables = [half.double().clone().requires_grad_() for half in (gate, up)]
    output = F.silu(variables[0]) * variables[1]
    exact = torch.autograd.grad(output, variables, dy.double() @ weight.double())

    result = swiglu_input_gradient(dy, weight, gate, up)

    dh = dy.double().abs() @ weight.double().abs()
    for ours, wanted, slope in zip(result, exact, (STEEPEST * up.double().abs(), gate.double().abs()), strict=True):
        assert_sum(ours, wanted, dh * slope, 13 + 8, 3)
    # The halves of one matrix, ready for the backward of a projection that makes both.
    assert result[0].stride() == result[1].stride() == (14, 1)
    assert result[1].data_ptr() == result[0].data_ptr() + 7 * dtype.itemsize


WEIGHT_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"dys": [torch.ones(4, 5), torch.ones(4, 5)]}, "dys and xs have different lengths; got 2 and 1"),
    ({"dys": [torch.ones(4, 6)]}, "dys.0. has another shape .* got \\(4, 6\\); needed \\(4, 5\\)"),
    ({"dys": [torch.ones(5)]}, "dys.0. has another shape"),
    ({"dys": [torch.tensor(1.0)]}, "dys.0. has another shape"),
    ({"xs": [torch.ones(3, 8)]}, "xs.0. has another shape"),
    ({"dys": [torch.ones(4, 5)] * 2, "xs": [torch.ones(4, 8), torch.ones(4, 8).half()]}, "xs.1. has another dtype"),
    ({"xs": [torch.ones(8, 4).t()]}, "xs.0. does not lie row by row"),
    ({"dys": [torch.ones(4, 1).expand(4, 5)]}, "dys.0. does not lie row by row"),
    ({"weight_grad": torch.ones(40)}, "weight_grad (is a matrix|has another shape)"),
    ({"weight_grad": torch.ones(5, 8).half()}, "weight_grad has another dtype; got torch.float16; needed .*float32"),
    ({"bias_grad": torch.ones(8)}, "bias_grad has another shape"),
    ({"bias_grad": torch.ones(5).double()}, "bias_grad has another dtype"),
    ({"bias_grad": torch.ones(5, device="meta")}, "bias_grad is on another device"),
]
PROVIDERS = ["torch", "triton"]


@pytest.fixture(params=PROVIDERS)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(products, "provider", lambda *_: request.param)


@pytest.mark.parametrize(("fault", "message"), WEIGHT_FAULTS)
@pytest.mark.usefixtures("chosen")
def test_a_weight_gradient_that_cannot_be_is_refused_before_anything_changes(
    fault: dict[str, Any], message: str
) -> None:
    good = {
        "dys": [torch.ones(4, 5)],
        "xs": [torch.ones(4, 8)],
        "weight_grad": torch.ones(5, 8),
        "bias_grad": torch.ones(5),
    }
    arguments = good | fault
    kept = {name: arguments[name].clone() for name in ("weight_grad", "bias_grad")}
    with pytest.raises(InputError, match=message):
        add_weight_gradient(**arguments)
    lists = {"dys": "dys", "xs": "xs", "weight_grad": "weight_grads", "bias_grad": "bias_grads"}
    with pytest.raises(InputError, match=message):  # the first layer is right
        add_weight_gradients(**{name: [good[one], arguments[one]] for one, name in lists.items()})
    for name, before in kept.items():
        assert before.is_meta or torch.equal(arguments[name], before)
        assert torch.equal(good[name], torch.ones_like(good[name]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"dy": torch.ones(2, 4, 5)}, "dy and weight are matrices"),
        ({"weight": torch.ones(8)}, "dy and weight are matrices"),
        ({"weight": torch.ones(6, 8)}, "weight has another shape"),
        ({"weight": torch.ones(5, 8).half()}, "weight has another dtype"),
        ({"weight": torch.ones(8, 5).t()}, "weight does not lie row by row"),
        ({"dy": torch.ones(4, 5, dtype=torch.int8)}, "dy has another dtype"),
        ({"z": torch.ones(4, 7)}, "z has another shape"),
        ({"z": torch.ones(4, 8, device="meta")}, "z is on another device"),
        ({"z": None}, "needs the activation's input; got activation 'gelu' without z"),
        ({"activation": None}, "got activation None with z"),
        ({"activation": "tanh"}, "unknown activation; got 'tanh'; needed 'relu' or "),
    ],
)
@pytest.mark.usefixtures("chosen")
def test_an_input_gradient_that_cannot_be_is_refused(fault: dict[str, Any], message: str) -> None:
    good = {"dy": torch.ones(4, 5), "weight": torch.ones(5, 8), "activation": "gelu", "z": torch.ones(4, 8)}
    with pytest.raises(InputError, match=message):
        input_gradient(**(good | fault))


@pytest.mark.usefixtures("chosen")
def test_a_swiglu_gradient_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="up has another shape"):
        swiglu_input_gradient(torch.ones(4, 5), torch.ones(5, 8), torch.ones(4, 8), torch.ones(4, 7))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import pipex.backward
from pipex.backward import choice, products
weight_grad = torch.zeros(2, 3)
products.add_weight_gradient([torch.ones(4, 2)], [torch.ones(4, 3)], weight_grad)
assert (weight_grad == 4).all()
products.input_gradient(torch.ones(4, 2), torch.ones(2, 3), activation="gelu", z=torch.ones(4, 3))
try:
    products.add_weight_gradient([torch.ones(4, 2)], [torch.ones(5, 3)], weight_grad)
except products.check_weight_gradients.__globals__["InputError"]:
    print("refused")
"""


def test_all_works_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


def test_triton_is_not_imported_before_it_multiplies() -> None:
    code = "import sys, pipex.backward.products; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
