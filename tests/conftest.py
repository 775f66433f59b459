"""Shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import simulated_cuda as simulator
import torch
from torch import Tensor

# One thread, before anything else runs: an OpenMP pool in this process would make forked ranks hang, and the bits of
# a matrix product depend on the number of threads.
torch.set_num_threads(1)

# Nor threads that are never seen again: ranks would not be forked beside them.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
if importlib.util.find_spec("tqdm"):  # inductor shows its progress by it, where it is installed
    importlib.import_module("tqdm").tqdm.monitor_interval = 0

# A schedule of torch 2.11 begins with a message between all neighbours, for NCCL's sake. In a V two of these are the
# same rank, and Gloo refuses to send to that.
if torch.__version__.startswith("2.11."):
    from torch.distributed.pipelining.stage import _PipelineStageBase

    _PipelineStageBase._get_init_p2p_neighbors_ops = lambda self: []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword is also the name of a folder
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_collection_finish() -> None:
    if torch.cuda.is_available():  # autograd cannot compute in what is forked after it has computed on a GPU
        importlib.import_module("persistent").ranks.start(4)


def pytest_report_header() -> str:
    return f"samples: PIPEX_TEST_SEED={cases.SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"The same samples again: PIPEX_TEST_SEED={cases.SEED}")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def simulated_cuda() -> Path:
    """The library that stands in for libcuda where there is no GPU."""
    return simulator.build()


Compare = Callable[[Tensor, Tensor, Tensor], None]


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
