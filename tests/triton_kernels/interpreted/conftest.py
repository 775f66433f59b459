"""What the tests under the interpreter share; without it (TRITON_INTERPRET=1) they are not collected."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from pipex.triton_kernels import input_gradient, weight_gradient
else:
    collect_ignore_glob = ["test_*.py"]

# Of NumPy, through which the interpreter computes: 3.6 indexes with arrays, and an exponential may be infinite.
NUMPY_WARNINGS = ("ignore:Conversion of an array:DeprecationWarning", "ignore:overflow encountered:RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = f"{Path(__file__).parent}/"
    for item in items:
        if str(item.path).startswith(here):
            for warning in NUMPY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(params=["hopper", "ampere"])
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With descriptors where the operands allow it, and with pointers."""
    if request.param == "ampere":
        for module in (input_gradient, weight_gradient):
            monkeypatch.setattr(module, "capability", lambda _: (8, 0))
    return str(request.param)
