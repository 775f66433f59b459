"""What a step holds in memory at most, of plans that keep, recompute or offload: printed as JSON.

In a process of its own, since what an allocator has done before decides what it gives back. The device is the CPU, and
so is the host: copies in host memory are kept compressed here, so that only the device's memory counts.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex
from pipex.plan.memory import with_promise
from pipex.runtime import saved

MICROBATCHES, LAYERS, WIDTH, ROWS = 5, 3, 64, 160 * 1024
TENSOR = ROWS * WIDTH * 4 / 2**20
"""MiB: so large that glibc gives it back when it is freed."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Compressed(saved._Memory):
    def copy_out(self) -> None:
        assert self.device is not None
        self.packed = zlib.compress(self.device.numpy().tobytes(), 1)
        self.host = torch.empty(self.device.shape, dtype=torch.uint8, device="meta")

    def copy_back(self) -> None:
        assert self.device is not None
        data = bytearray(zlib.decompress(self.packed))
        self.device.copy_(torch.frombuffer(data, dtype=torch.uint8))


def peak() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def grown(how: str) -> tuple[float, str]:
    """MiB, and the step's loss."""
    saved._Memory = Compressed  # type: ignore[misc]
    torch.manual_seed(0)
    plan = pipex.build("gpipe", 1, MICROBATCHES)
    if how != "kept":
        plan = with_promise(dataclasses.replace(plan, **{how: (0,)}))
    model = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    pipeline = pipex.Pipeline([model], plan, F.mse_loss, optimizer=torch.optim.SGD)
    x = torch.zeros(MICROBATCHES * ROWS, WIDTH)
    x[:, 0] = 1
    pipeline.step(x[: MICROBATCHES * 8], x[: MICROBATCHES * 8])  # imports, buffers
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    loss = pipeline.step(x, x)
    pipeline.close()
    return peak() - before, loss.hex()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({how: grown(how) for how in ("kept", "recomputed", "offloaded")}))
