"""Every Triton kernel on a real GPU, against float64: at most twice torch's own error.

They run as Triton launches them, and, where pipex's launcher can, through that too, to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from pipex.backward.products import add_by_torch
from pipex.triton_kernels.activations import FORWARD
from pipex.triton_kernels.input_gradient import (
    input_gradient,
    input_gradient_reference,
    plan_input_gradient,
    swiglu_input_gradient,
    swiglu_input_gradient_reference,
)
from pipex.triton_kernels.launch import Launch, capability
from pipex.triton_kernels.norm import (
    layer_norm_gradient,
    norm_gradient_reference,
    partial_rows,
    plan_norm_gradient,
    plan_reduce_partials,
    reduce_partials,
    rms_norm_gradient,
)
from pipex.triton_kernels.resources import compile_launch
from pipex.triton_kernels.weight_gradient import grouped_weight_gradient, plan_slabs, weight_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

Compare = Callable[[Tensor, Tensor, Tensor], None]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# [T, N, K]: several tiles each way with ragged edges, rows aligned; unaligned; whole tiles.
RAGGED, UNALIGNED, WHOLE = (1000, 520, 1032), (257, 131, 515), (2048, 1024, 2048)
SHAPES = [RAGGED, UNALIGNED, WHOLE]


def normal(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


# ------------------------------------------------------------------------------------------------- input gradients


def check_input_gradient(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str | None, compare: Compare
) -> None:
    t, n, k = shape
    dy, weight, z = normal(t, n, dtype=dtype), normal(n, k, dtype=dtype), normal(t, k, dtype=dtype)
    saved = None if activation is None else z
    out = torch.full((t, k), torch.nan, dtype=dtype, device="cuda")
    input_gradient(dy, weight, activation=activation, z=saved, out=out)
    torch_s = input_gradient_reference(dy, weight, activation=activation, z=saved)
    exact = input_gradient_reference(dy.double(), weight.double(), activation=activation, z=z.double())
    compare(out, torch_s, exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "activation"),
    [(BF16, None), *((BF16, name) for name in FORWARD), (FP16, None), (FP16, "gelu"), (FP32, None), (FP32, "silu")],
)
def test_input_gradient(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str | None, assert_as_good: Compare
) -> None:
    check_input_gradient(shape, dtype, activation, assert_as_good)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (129, 72, 264)])
def test_small_input_gradient(shape: tuple[int, int, int], assert_as_good: Compare) -> None:
    check_input_gradient(shape, BF16, "gelu", assert_as_good)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, int, int], dtype: torch.dtype, assert_as_good: Compare) -> None:
    t, n, k = shape
    dy, weight = normal(t, n, dtype=dtype), normal(n, k, dtype=dtype)
    gate, up = normal(t, 2 * k, dtype=dtype).split(k, dim=1)  # as one projection makes them
    ours = swiglu_input_gradient(dy, weight, gate, up)
    torch_s = swiglu_input_gradient_reference(dy, weight, gate, up)
    exact = swiglu_input_gradient_reference(dy.double(), weight.double(), gate.double(), up.double())
    for result in zip(ours, torch_s, exact, strict=True):
        assert_as_good(*result)


def test_small_only_its_own_elements_are_written() -> None:
    t, n, k = 130, 16, 136
    dy, weight = normal(t, n, dtype=FP16), normal(n, k, dtype=FP16)
    frame = torch.full((t + 2, k + 16), torch.nan, dtype=FP16, device="cuda")
    input_gradient(dy, weight, out=frame[1:-1, 8:-8])
    assert torch.equal(frame[1:-1, 8:-8], input_gradient(dy, weight))
    frame[1:-1, 8:-8] = torch.nan
    assert frame.isnan().all()


# ------------------------------------------------------------------------------------------------ weight gradients

Layer = tuple[list[Tensor], list[Tensor], list[Tensor]]  # dY and X of each micro-batch; dW and db

# form -> layers, and the share of T that each micro-batch has
FORMS = {
    "one": (1, [1.0]),
    "slab": (1, [1.0] * 3),
    "tuple": (1, [1.0, 0.25, 0.0, 0.5]),
    "table": (1, [1.0, 0.5, 0.25, 1.0, 0.125, 0.5]),
    "grouped": (3, [1.0, 0.25]),
}


def make_layers(
    form: str, shape: tuple[int, int, int], dtype: torch.dtype, gradient_dtype: torch.dtype, bias: bool
) -> list[Layer]:
    t, n, k = shape
    count, shares = FORMS[form]
    layers = []
    for _ in range(count):
        rows = [int(share * t) for share in shares]
        dys, xs = [normal(r, n, dtype=dtype) for r in rows], [normal(r, k, dtype=dtype) for r in rows]
        gradients = [normal(n, k, dtype=gradient_dtype), normal(n, dtype=gradient_dtype)]
        layers.append((dys, xs, gradients[: 1 + bias]))
    return layers


def add(form: str, layers: list[Layer]) -> list[list[Tensor]]:
    """What the kernel makes of the layers' gradients, whose own values stay."""
    results = [[gradient.clone() for gradient in gradients] for _, _, gradients in layers]
    if form == "grouped":
        weights, *biases = zip(*results, strict=True)
        grouped_weight_gradient([dys for dys, _, _ in layers], [xs for _, xs, _ in layers], list(weights),
                                list(biases[0]) if biases else None)  # fmt: skip
    else:
        ((dys, xs, _),) = layers
        if form == "slab":
            weight_gradient(torch.stack(dys), torch.stack(xs), *results[0])
        else:
            weight_gradient(dys, xs, *results[0])
    return results


def check_weight_gradient(
    form: str,
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: bool,
    compare: Compare,
    repeats: int = 1,
) -> None:
    layers = make_layers(form, shape, *dtypes, bias)
    ours = add(form, layers)
    for _ in range(repeats):
        for first, again in zip(ours, add(form, layers), strict=True):
            assert all(torch.equal(f, a) for f, a in zip(first, again, strict=True)), "other bits in another run"
    for (dys, xs, start), results in zip(layers, ours, strict=True):
        torch_s, exact = [s.clone() for s in start], [s.double() for s in start]
        add_by_torch(dys, xs, torch_s[0], torch_s[1] if bias else None)
        add_by_torch([d.double() for d in dys], [x.double() for x in xs], exact[0], exact[1] if bias else None)
        for result in zip(results, torch_s, exact, strict=True):
            compare(*result)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtypes", [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32)])
def test_weight_and_bias_gradient(
    form: str, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], assert_as_good: Compare
) -> None:
    check_weight_gradient(form, shape, dtypes, True, assert_as_good)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_gradient_alone(form: str, shape: tuple[int, int, int], assert_as_good: Compare) -> None:
    check_weight_gradient(form, shape, (BF16, FP32), False, assert_as_good)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [(64, 128, 256), (96, 256, 64), (512, 1024, 1024), (4096, 2048, 512), (8192, 384, 4096)]
)
def test_bias_gradient_does_not_race(form: str, shape: tuple[int, int, int], assert_as_good: Compare) -> None:
    """Triton gives a tile that is both multiplied and read one buffer less, so that the next copy may land in what is
    still being read (``weight_gradient_kernel.ONES``); whether it does depends on sizes and on timing."""
    check_weight_gradient(form, shape, (BF16, FP32), True, assert_as_good, repeats=5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 5, 7), (70, 136, 264)])
def test_small_weight_gradient(form: str, shape: tuple[int, int, int], assert_as_good: Compare) -> None:
    check_weight_gradient(form, shape, (BF16, FP32), True, assert_as_good)


@pytest.mark.parametrize("gradient_dtype", [FP32, BF16])
@pytest.mark.parametrize("form", ["slab", "list"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_has_the_bits_of_one_call_per_micro_batch(
    shape: tuple[int, int, int], form: str, gradient_dtype: torch.dtype
) -> None:
    t, n, k = shape
    dys, xs = normal(3, t, n, dtype=BF16), normal(3, t, k, dtype=BF16)
    weight_grad, bias_grad = normal(n, k, dtype=gradient_dtype), normal(n, dtype=gradient_dtype)
    one_by_one = weight_grad.clone(), bias_grad.clone()
    for m in range(3):
        weight_gradient(dys[m : m + 1], xs[m : m + 1], *one_by_one, exact=True)
    weight_gradient(*((dys, xs) if form == "slab" else (list(dys), list(xs))), weight_grad, bias_grad, exact=True)
    assert torch.equal(weight_grad, one_by_one[0])
    assert torch.equal(bias_grad, one_by_one[1])


def test_small_only_its_own_gradient_is_changed() -> None:
    dys, xs = [normal(9, 136, dtype=FP16)], [normal(9, 40, dtype=FP16)]
    frame, bias = torch.full((138, 56), 7.0, device="cuda"), torch.full((138,), 7.0, device="cuda")
    weight_gradient(dys, xs, frame[1:-1, 8:-8], bias[1:-1])
    frame[1:-1, 8:-8] = 7.0
    assert (frame == 7.0).all()
    assert (bias[[0, -1]] == 7.0).all()


# ----------------------------------------------------------------------------------------------------------- norms


def check_norm(layer: bool, rows: int, width: int, dtype: torch.dtype, compare: Compare) -> None:
    dy, x = normal(rows, width, dtype=dtype), (2 * normal(rows, width) + 1).to(dtype)
    weight, bias = normal(width, dtype=dtype), normal(width, dtype=dtype) if layer else None
    dx, *partials = (layer_norm_gradient if layer else rms_norm_gradient)(dy, x, weight, 1e-5)
    gradients = [torch.zeros(width, device="cuda") for _ in partials]
    for rows_of, gradient in zip(partials, gradients, strict=True):
        reduce_partials(rows_of, gradient)
    torch_s = norm_gradient_reference(dy, x, weight, bias, 1e-5, layer=layer)
    double = [None if t is None else t.double() for t in (dy, x, weight, bias)]
    exact = norm_gradient_reference(*double, 1e-5, layer=layer)  # type: ignore[arg-type]
    for result in zip((dx, *gradients), torch_s, exact, strict=True):
        compare(*result)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1000, 4096), (777, 1023), (300, 8192)])
@pytest.mark.parametrize("layer", [False, True])
def test_norm(layer: bool, rows: int, width: int, dtype: torch.dtype, assert_as_good: Compare) -> None:
    check_norm(layer, rows, width, dtype, assert_as_good)


@pytest.mark.parametrize("layer", [False, True])
def test_small_norm(layer: bool, assert_as_good: Compare) -> None:
    check_norm(layer, 13, 200, BF16, assert_as_good)


# ------------------------------------------------------------------------------------------ without Triton's launcher


def plain(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str | None = None
) -> tuple[Launch, list[Tensor]]:
    t, n, k = shape
    saved = tuple(normal(t, k, dtype=dtype) for _ in range({None: 0, "swiglu": 2}.get(activation, 1)))
    out = [normal(t, k, dtype=dtype) for _ in saved or (None,)]
    dy, weight = normal(t, n, dtype=dtype), normal(n, k, dtype=dtype)
    return plan_input_gradient(dy, weight, activation, saved, tuple(out), capability(dy.device)), out


def slabs(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    counts: Sequence[int],
    gradient_dtype: torch.dtype = FP32,
    bias: bool = True,
    exact: bool = False,
) -> tuple[Launch, list[Tensor]]:
    t, n, k = shape
    operands = [(normal(c, t, n, dtype=dtype), normal(c, t, k, dtype=dtype)) for c in counts]
    out = [normal(n, k, dtype=gradient_dtype), normal(n, dtype=gradient_dtype)][: 1 + bias]
    bias_grad = out[1] if bias else None
    return plan_slabs(operands, out[0], bias_grad, exact, capability(out[0].device)), out


def norm(layer: bool) -> tuple[Launch, list[Tensor]]:
    x, weight, dx = normal(100, 1032), normal(1032), normal(100, 1032)
    partials = [normal(partial_rows(x.device), 1032) for _ in range(1 + layer)]
    bias_partials = partials[1] if layer else None
    launch = plan_norm_gradient(normal(100, 1032), x, weight, dx, partials[0], bias_partials, 1e-5, layer=layer)
    return launch, [dx, *partials]


def partials() -> tuple[Launch, list[Tensor]]:
    gradient = normal(1032)
    return plan_reduce_partials(normal(264, 1032), gradient), [gradient]


LAUNCHES: dict[str, Callable[[], tuple[Launch, list[Tensor]]]] = {
    "plain": lambda: plain(RAGGED, BF16),
    "gelu": lambda: plain(RAGGED, BF16, "gelu"),
    "swiglu": lambda: plain(RAGGED, FP16, "swiglu"),
    "plain, unaligned": lambda: plain(UNALIGNED, BF16),
    "plain, float32": lambda: plain(UNALIGNED, FP32),
    "one element": lambda: plain((1, 1, 1), BF16),
    "slab": lambda: slabs(RAGGED, BF16, [3]),
    "slab, no bias": lambda: slabs(WHOLE, BF16, [1], bias=False),
    "slab, bfloat16 gradient": lambda: slabs(RAGGED, BF16, [2], BF16),
    "slab, exact": lambda: slabs(RAGGED, BF16, [3], exact=True),
    "tuple": lambda: slabs(RAGGED, BF16, [1, 1, 1]),
    "slab, unaligned": lambda: slabs(UNALIGNED, FP16, [3]),
    "slab, float32": lambda: slabs(UNALIGNED, FP32, [2]),
    "RMSNorm": lambda: norm(False),
    "LayerNorm": lambda: norm(True),
    "partials": partials,
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launcher_gives_the_bits_of_triton_s(name: str) -> None:
    _cuda = pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")
    from pipex.triton_kernels import compiled

    if "exact" in name and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the form that rounds in between is Hopper's")
    launch, out = LAUNCHES[name]()
    start = [tensor.clone() for tensor in out]
    launch.run(out[0].device)
    wanted = [tensor.clone() for tensor in out]
    major, minor = torch.cuda.get_device_capability()
    code = compile_launch(launch, 10 * major + minor)
    kernel = compiled.load(_cuda.Device(torch.cuda.current_device()), code)
    values = compiled.values(code.src.signature, launch.arguments)
    for tensor, before in zip(out, start, strict=True):
        tensor.copy_(before)
    grid = (*launch.grid, 1, 1)[:3]
    kernel.launch(*grid, torch.cuda.current_stream().cuda_stream, values)
    for found, triton_s in zip(out, wanted, strict=True):
        assert torch.equal(found, triton_s)
