"""Random numbers of a model's forward that do not depend on the cut.

Each call, and the code ahead of it, draws from numbers of its own: behind a call everything is seeded anew, by a seed
that is ``STRIDE`` further on than the one before. So a checkpoint that runs several calls again, from the numbers that
it has put back, only has to go on in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two layers, modulo 2⁶⁴: that of SplitMix64, whose multiples are far from each other."""

_MASK = 0xFFFFFFFFFFFFFFFF


def generators(device: torch.device) -> list[torch.Generator]:
    """What torch's random operations draw from in a stage on ``device``. On a GPU too some ask the CPU (whether a layer
    is to be dropped)."""
    if device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]
    return [torch.default_generator]


def seeds_from(base: int, device: torch.device) -> Callable[[int], None]:
    """A function that seeds what comes next, by its number. (torch.manual_seed takes a hundred times as long.)"""
    sources = generators(device)

    def seed(number: int) -> None:
        value = base + number * STRIDE & _MASK
        for generator in sources:
            generator.manual_seed(value)

    return seed


def advance(device: torch.device) -> None:
    """Seeds by the number that follows the last one."""
    for generator in generators(device):
        generator.manual_seed(generator.initial_seed() + STRIDE & _MASK)
