"""Times on a GPU, its ceilings, and what it is.

A sample is the GPU's own time between two CUDA events around one call. Before it a buffer larger than the L2 cache is
written, so that operands come from memory, as they do in a training step; and the GPU is held back until everything is
enqueued, so that the host's time is not in it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from time import perf_counter

import torch

from pipex.bench.driver import Rounds, quantiles
from pipex.errors import NativeUnavailable
from pipex.torch_internals import gpu_sleep

HOLD_CYCLES = 1_000_000  # about half a millisecond: longer than the host needs to enqueue any of the calls

# Large enough that neither launch nor last wave is seen in them.
CEILING_SIDE = 8192
CEILING_BYTES = 1 << 30

QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


def require_gpu(command: str, fix: str | None = None) -> torch.device:
    """The current GPU.

    Raises:
        NativeUnavailable: torch finds none.
    """
    check_gpu(command, fix)
    return torch.device("cuda", torch.cuda.current_device())


def check_gpu(command: str, fix: str | None = None) -> None:
    """Looks for a GPU, without a context on it.

    Raises:
        NativeUnavailable: torch finds none.
    """
    if not torch.cuda.is_available():
        raise NativeUnavailable(
            f"{command} measures on a GPU and there is none",
            got=f"torch {torch.__version__} without a usable CUDA device",
            needed="a GPU, its driver and a torch that was built for CUDA",
            fix=fix,
        )


def chosen(device: str, command: str) -> tuple[torch.device, dict[str, str]]:
    """What the command's ``--device`` names, and what a report says of that.

    Raises:
        NativeUnavailable: a GPU, and torch finds none.
    """
    if device == "cpu":
        return torch.device("cpu"), {}
    found = require_gpu(f"{command} --device {device}")
    return found, describe_gpu(found)


class Clock:
    """Measures calls on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(max(size, 1 << 28), dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object]) -> float:
        """Microseconds of the GPU."""
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._flushed.zero_()
        gpu_sleep(HOLD_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end))

    def host_us(self, call: Callable[[], object], times: int = 10) -> float:
        """Microseconds of the host to enqueue one call, on a GPU that does not hold it up."""
        torch.cuda.synchronize(self.device)
        taken = []
        for _ in range(times):
            begin = perf_counter()
            call()
            taken.append(1e6 * (perf_counter() - begin))
            torch.cuda.synchronize(self.device)
        return quantiles(taken).p50

    def ceilings(self, dtype: torch.dtype, rounds: Rounds) -> tuple[float, float]:
        """What this GPU reaches in this run: TFLOP/s of one large product in this dtype, GB/s of one large copy."""
        a, b = (torch.randn(CEILING_SIDE, CEILING_SIDE, device=self.device).to(dtype) for _ in range(2))
        source = torch.empty(CEILING_BYTES, dtype=torch.uint8, device=self.device).random_()
        product, copy = torch.empty_like(a), torch.empty_like(source)
        samples = rounds.interleave(
            {
                "product": lambda: self.sample(lambda: torch.mm(a, b, out=product)),
                "copy": lambda: self.sample(lambda: copy.copy_(source)),
            }
        )
        times = {name: quantiles(taken).p50 for name, taken in samples.items()}
        return 2 * CEILING_SIDE**3 / times["product"] / 1e6, 2 * CEILING_BYTES / times["copy"] / 1e3


def describe_gpu(device: torch.device) -> dict[str, str]:
    """Name, driver, clocks and versions."""
    properties = torch.cuda.get_device_properties(device)
    facts = {"gpu": properties.name, "cuda": str(torch.version.cuda)}
    command = ["nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        facts |= dict(zip(QUERY, (value.strip() for value in said.split(",")), strict=True))
    except (OSError, ValueError, subprocess.SubprocessError):
        facts["driver_version"] = "unknown: nvidia-smi does not answer"
    return facts
