"""Random numbers that do not depend on how a model is cut.

A layer that may draw random numbers (dropout, stochastic depth, any module that is not torch's own) is seeded by
(seed, step, micro-batch, layer) before each of its forwards, and so is the loss, as one layer more. A step and an
evaluation run on random numbers of their own, so that the user's are the same on every rank, whichever layers it holds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def generators(device: torch.device) -> list[torch.Generator]:
    """What torch's random operations draw from in a stage on ``device``. On a GPU too some ask the CPU (whether a layer
    is to be dropped)."""
    if device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]
    return [torch.default_generator]


def mix(seed: int, step: int, microbatch: int) -> int:
    """64 bits; unrelated for any two different arguments."""
    packed = struct.pack("<3q", seed, step, microbatch)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two layers, modulo 2⁶⁴: that of SplitMix64, whose multiples are far from each other."""


class Seeds:
    """Seeds layers, on one device: layer l by ``mix`` + l × ``STRIDE``, modulo 2⁶⁴."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._seed = seed
        self._generators = generators(device)

    def of(self, step: int, microbatch: int) -> Callable[[int], None]:
        """A function that seeds a layer of the model, by its number, for one forward."""
        base, sources = mix(self._seed, step, microbatch), self._generators

        def seed(layer: int) -> None:
            value = base + layer * STRIDE & 0xFFFFFFFFFFFFFFFF
            for generator in sources:
                generator.manual_seed(value)

        return seed

    @contextmanager
    def apart(self, step: int, rank: int) -> Iterator[None]:
        """Around a step or an evaluation: puts the generators back as they were. What draws in here outside of all
        layers (a gradient hook) has numbers of its own in every step and on every rank."""
        before = [generator.get_state() for generator in self._generators]
        self.of(step, -1)(rank)
        try:
            yield
        finally:
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)
