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

from pipex.partition.own_forward.random_numbers import generators, seeds_from


def mix(seed: int, step: int, microbatch: int) -> int:
    """64 bits; unrelated for any two different arguments."""
    packed = struct.pack("<3q", seed, step, microbatch)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


class Seeds:
    """Seeds layers, on one device: layer l by ``mix`` + l × ``STRIDE``, modulo 2⁶⁴."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._seed, self._device = seed, device
        self._generators = generators(device)

    def of(self, step: int, microbatch: int) -> Callable[[int], None]:
        """A function that seeds a layer of the model, by its number, for one forward."""
        return seeds_from(mix(self._seed, step, microbatch), self._device)

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
