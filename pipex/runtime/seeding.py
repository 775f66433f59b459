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


def mix(seed: int, step: int, microbatch: int, layer: int) -> int:
    """A 63-bit seed; unrelated for any two different arguments."""
    packed = struct.pack("<4q", seed, step, microbatch, layer)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Seeds:
    """Seeds layers, on one device."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._seed = seed
        self._generators = generators(device)

    def of(self, step: int, microbatch: int) -> Callable[[int], None]:
        """A function that seeds a layer of the model, by its number, for one forward."""

        def seed(layer: int) -> None:
            value = mix(self._seed, step, microbatch, layer)
            for generator in self._generators:
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
