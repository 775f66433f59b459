"""A kernel that Triton compiled, launched without Triton on a real GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

_cuda = pytest.importorskip("pipex._cuda", reason="built without CUDA kernels")
from pipex.triton_kernels import compiled  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")]

LAYOUTS = Path(__file__).parents[1] / "native" / "triton_layouts.py"


@pytest.fixture(scope="module")
def layouts() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these kernels are compiled for sm_90")
    spec = importlib.util.spec_from_file_location("triton_layouts", LAYOUTS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_layouts"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels(layouts: ModuleType) -> dict[str, _cuda.Kernel]:
    device = _cuda.Device(torch.cuda.current_device())
    return {kernel.metadata.name: compiled.load(device, kernel) for kernel in layouts.compiled()}


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def described(tensor: torch.Tensor) -> tuple[int, ...]:
    return (tensor.data_ptr(), *tensor.shape, *tensor.stride())


def test_scalars(kernels: dict[str, _cuda.Kernel]) -> None:
    x, out = torch.randn(1000, device="cuda"), torch.full((1001,), 5.0, device="cuda")
    kernels["scalars"].launch(8, 1, 1, stream(), (out.data_ptr(), -3, x.data_ptr(), 2**33, 0.5, 1000))
    assert torch.equal(out[:1000], x * 0.5 - 3.0 + 2.0**33)
    assert out[1000] == 5


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Small, so that products and sums are exact and a wrong element cannot hide."""
    return torch.randint(-3, 4, shape, device="cuda").to(dtype)


def test_descriptors(kernels: dict[str, _cuda.Kernel]) -> None:
    x, dy = integers(64, 64, dtype=torch.bfloat16), integers(64, 64, dtype=torch.bfloat16)
    bias, vector, slab = integers(64), integers(64), integers(2, 64, 64)
    out = torch.zeros(64, 80, device="cuda")
    kernels["mixed"].launch(
        1, 1, 1, stream(),
        (0, *described(x), bias.data_ptr(), *described(dy), out.data_ptr(), 80, 0.25, *described(slab),
         *described(vector)),
    )  # fmt: skip
    exact = (x.double() @ dy.double() + slab[0].double() + vector.double()) * 0.25 + bias.double()
    assert torch.equal(out[:, :64].double(), exact)
    assert out[:, 64:].eq(0).all()


def test_tuples_of_descriptors_whose_edges_lie_outside(kernels: dict[str, _cuda.Kernel]) -> None:
    x = [integers(50, 40, dtype=torch.float16) for _ in range(2)]
    dy = [integers(40, 56, dtype=torch.float16) for _ in range(2)]
    out = torch.zeros(50, 56, device="cuda")
    values = (*described(x[0]), *described(dy[0]), *described(x[1]), *described(dy[1]), *described(out), 0)
    for _ in range(3):
        kernels["pairs"].launch(1, 1, 1, stream(), values)
    assert torch.equal(out.double(), x[0].double() @ dy[0].double() + x[1].double() @ dy[1].double())
