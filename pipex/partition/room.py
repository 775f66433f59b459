"""Whether a stage's tensors fit into the memory of its rank."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from pipex.errors import StageTooLarge
from pipex.partition.stage import Stage


@contextmanager
def room_for(stage: Stage, device: torch.device) -> Iterator[None]:
    """Around what gives the tensors of a stage memory on a device.

    Raises:
        StageTooLarge: there is too little; says how much there was, and for how many layers.
    """
    free = _free(device)
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        sizes = _sizes(stage.layers)
        fitting = sum(size <= free for size in accumulate(sizes))
        raise StageTooLarge(
            f"stage {stage.index} does not fit into the memory of its rank",
            got=f"{free:,} bytes free on {device}",
            needed=f"{sum(sizes):,} bytes for the parameters and buffers of {len(sizes)} layers",
            fix=f"{fitting or 'none'} of its layers would fit: cut the model into more stages, or give this one fewer "
            "layers (balance=)",
        ) from error


@contextmanager
def room_for_layer(number: int, stage: int, before: Sequence[nn.Module]) -> Iterator[None]:
    """Around what builds a layer of a stage, on the CPU.

    Args:
        before: what this rank holds already.

    Raises:
        StageTooLarge: there is too little memory; says how much the layers before take.
    """
    free = _free(torch.device("cpu"))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _is_out_of_memory(error)):
            raise
        raise StageTooLarge(
            f"layer {number} of stage {stage} does not fit into the memory of its rank", got=f"{free:,} bytes free",
            needed=f"more, for one layer beside the {len(before)} of this rank that are there, of "
            f"{sum(_sizes(before)):,} bytes",
            fix="cut the model into more stages, or give this one fewer layers (balance=)",
        ) from error  # fmt: skip


def _sizes(layers: Sequence[nn.Module] | nn.ModuleList) -> list[int]:
    """Bytes of the parameters and buffers of each layer; what an earlier one holds too is not counted again."""
    seen: set[int] = set()
    sizes = []
    for layer in layers:
        own = {id(t): t for t in (*layer.parameters(), *layer.buffers()) if id(t) not in seen}
        seen |= own.keys()
        sizes.append(sum(t.numel() * t.itemsize for t in own.values() if not nn.parameter.is_lazy(t)))
    return sizes


def _free(device: torch.device) -> int:
    """Bytes that this process may still have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return available
    addressed = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return min(available, max(limit - addressed, 0))


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
