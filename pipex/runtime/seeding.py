"""Random numbers that do not depend on how a model is cut.

A layer that draws random numbers in training (dropout, stochastic depth, ...) is seeded by (seed, step, micro-batch,
layer) for its forward, and the device's generator is put back afterwards: the user's own random numbers are the same
on every rank, whichever layers it holds.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


def generator(device: torch.device) -> torch.Generator:
    """The generator that torch's random operations use on ``device``."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def mix(seed: int, step: int, microbatch: int, layer: int) -> int:
    """A 63-bit seed; unrelated for any two different arguments."""
    packed = struct.pack("<4q", seed, step, microbatch, layer)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def of_layers(
    device: torch.device, seed: int, step: int, microbatch: int, first_layer: int
) -> Callable[[int], AbstractContextManager[None]]:
    """For ``Stage.run``: the seed of each layer of a stage, whose first one is ``first_layer`` of the model."""
    return lambda position: seeded(device, mix(seed, step, microbatch, first_layer + position))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Runs its body on ``seed`` and puts the generator back as it was."""
    source = generator(device)
    state = source.get_state()
    source.manual_seed(seed)
    try:
        yield
    finally:
        source.set_state(state)
