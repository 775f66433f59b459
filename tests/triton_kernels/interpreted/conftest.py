"""What the tests under the interpreter share; without it (TRITON_INTERPRET=1) they are not collected."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    from pipex.triton_kernels import input_gradient, weight_gradient
else:
    collect_ignore_glob = ["test_*.py"]

# Of NumPy, through which the interpreter computes: 3.6 indexes with arrays, and an exponential may be infinite.
NUMPY_WARNINGS = ("ignore:Conversion of an array:DeprecationWarning", "ignore:overflow encountered:RuntimeWarning")

Compare = Callable[[Tensor, Tensor, Tensor], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in NUMPY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture
def assert_as_good() -> Compare:
    """(ours, torch's, float64's): our error is at most twice that of torch in this dtype; rounding is to nearest."""

    def compare(ours: Tensor, torch_s: Tensor, exact: Tensor) -> None:
        assert ours.shape == exact.shape
        ours_error, allowed = (ours.double() - exact).abs(), 2 * (torch_s.double() - exact).abs().max() + 1e-6
        worst = int(ours_error.argmax()) if ours_error.numel() else 0
        assert (ours_error <= allowed).all(), (
            f"at {worst} of {tuple(exact.shape)}: ours {ours.flatten()[worst]}, exact {exact.flatten()[worst]}, "
            f"error {ours_error.flatten()[worst]}, allowed {allowed}"
        )
        if ours.dtype is not torch.float32 and ours.numel() > 1000:
            # A float32 result rounded once is nearly always the exact one rounded once; truncated, half of the time.
            assert (ours == exact.to(ours.dtype)).double().mean() > 0.95

    return compare


@pytest.fixture(params=["hopper", "ampere"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With descriptors where the operands allow it, and with pointers."""
    if request.param == "ampere":
        for module in (input_gradient, weight_gradient):
            monkeypatch.setattr(module, "capability", lambda _: (8, 0))
    return str(request.param)
