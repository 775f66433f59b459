"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch

# One thread, before anything else runs: an OpenMP pool in this process would make forked ranks hang, and the bits of
# a matrix product depend on the number of threads.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
