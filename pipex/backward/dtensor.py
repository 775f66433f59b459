"""Operations on DTensors: stages under tensor, sequence and loss parallelism.

Autograd takes a DTensor for one tensor. It differentiates operations on the whole, and only what each of them calls is
brought to the parts that the ranks have, with the exchanges between ranks that their placements ask for:

    autograd   addmm(b, x, Wᵀ) of DTensors      dW = dyᵀ x of DTensors
    parts      [exchange] addmm of parts        [exchange] mm of parts ─► dW in shards, or parts to be summed

So what is recorded of plain tensors is recorded of these: an alias of the weight, x and dy, all of them DTensors. W
calls what autograd would have called, operand for operand, and what comes of it is the same: products of parts, bits,
exchanges, and the placement of the gradient. The exchanges of weight gradients happen in W with them, so the ranks of
a mesh must come to their W's in one order, as to everything else that exchanges; with one plan on all of them they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pipex.backward import recording
from pipex.backward.recording import Recorder
from pipex.backward.torch_internals import dtensor_class, part_of
from pipex.backward.uses import Packed, Sums, Use
from pipex.backward.weights import Layer, Target, Weight
from pipex.torch_internals import version


def is_dtensor(x: object) -> bool:
    """Whether it is a DTensor, and of no class that is derived from that."""
    return type(x) is dtensor_class()


def has_same_part(a: Tensor, b: Tensor) -> bool:
    """Whether two DTensors are in the same memory, and parts of the same whole."""
    return part_of(a).is_set_to(part_of(b)) and _form(a) == _form(b)


def _form(x: Any) -> tuple[object, ...]:
    return x.device_mesh, x.placements, x.shape, x.stride(), x.dtype


def tape_for_dtensors(*operands: object) -> Recorder | None:
    """The tape that may record an operation on these; None where they are not all DTensors (None counts for one), so
    that torch makes of the others what it does (it refuses them, or takes them for replicated), or where the general
    path makes the gradient."""
    tape = recording.tape_for(_PLAIN)
    if tape is None or not all(operand is None or is_dtensor(operand) for operand in operands):
        return None
    return _OfDTensors(tape)


_PLAIN = torch.empty(0)


class _OfDTensors:
    """A tape, for operations on DTensors."""

    __slots__ = ("_tape", "first_node", "layers", "replays")

    def __init__(self, tape: Any) -> None:
        self._tape = tape
        self.first_node = tape.first_node
        self.replays = tape.replays
        self.layers: dict[int, Layer] = {}  # none is known: whether it is as it was takes longer than what it spares

    def replay(self) -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = self._tape.replay()
        return found

    def weight(self, tensor: Tensor | None, lower: bool = False) -> Weight | None:
        found: Weight | None = self._tape.weight(tensor, lower, of_dtensors=True)
        return found

    def shared_weight(self, tensor: Tensor) -> Weight | None:
        return None  # those of compiled calls do not wait

    def is_constant(self, tensor: Tensor) -> bool:
        return bool(self._tape.is_constant(tensor))

    def cast(self, x: Tensor) -> Tensor:
        found: Tensor = self._tape.cast(x)
        return found

    def fuses(self, x: Tensor) -> bool:
        return False  # kernels read memory, of which a DTensor has none

    def product(self, use: Use, run: Callable[..., Tensor], *operands: Any) -> Tensor:
        found: Tensor = self._tape.product(use, run, *operands)
        return found

    def hand_over(self, y: Tensor, use: Use) -> None:
        self._tape.hand_over(y, use)

    def captured(self, use: Use, dy: Tensor) -> None:
        self._tape.captured(_PartsUse(use, dy), dy)


class _PartsUse(Use):
    """A use of DTensors, which also sees changes of this rank's part that were not made through the DTensor: of the
    gradient that somebody handed to ``to_local``'s backward, say. Autograd is done with both when I is; W is not."""

    __slots__ = ("_parts", "_use")

    def __init__(self, use: Use, dy: Tensor) -> None:
        x = use.x
        self._use = use
        whole = [dy] if isinstance(x, Packed) else [x, dy]
        self._parts = [(part, version(part)) for part in map(part_of, filter(is_dtensor, whole))]

    @property
    def held(self) -> list[Tensor]:
        return [part_of(x) if is_dtensor(x) else x for x in self._use.held]

    @property
    def targets(self) -> Sequence[Target] | None:
        return self._use.targets

    def add_to(self, sums: Sums, dy: Tensor) -> None:
        for part, its_version in self._parts:
            if version(part) != its_version:
                raise RuntimeError(
                    f"this rank's part of a DTensor was modified in place before the weight gradient that needs it was "
                    f"made; got version {version(part)} of a tensor of shape {tuple(part.shape)}, needed version "
                    f"{its_version}; use an out-of-place operation there"
                )
        self._use.add_to(sums, dy)
