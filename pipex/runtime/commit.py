"""The gradients of a rank's stages, from the last backward to the update: tied ones added up, divided, clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipex.layout import Layout, Tie
from pipex.runtime import tied
from pipex.runtime.agreement import share
from pipex.runtime.trainable import Trainables
from pipex.torch_internals import foreach_norm
from pipex.transport.interface import Links, World


class Gradients:
    """This rank's share of the model's gradients.

    Args:
        world: the ranks.
        layout: of the model.
        trainables: this rank's parameters.
    """

    def __init__(self, world: World, layout: Layout, trainables: Trainables) -> None:
        self._world, self._layout, self._trainables = world, layout, trainables
        self._rounds = _rounds(layout)

    @property
    def trained(self) -> list[nn.Parameter]:
        """This rank's parameters that are not frozen."""
        return self._trainables.trained

    @property
    def cross_ranks(self) -> bool:
        """Whether a tied parameter's gradients go from rank to rank, here or elsewhere."""
        return bool(self._layout.tied_edges)

    def reduce_ties(self, step: int, links: Links) -> None:
        """Replaces each tied parameter's gradient by the sum of all stages' accumulators, on every holder; by None
        where none of them has one."""
        parameters = dict(self._trainables.tied)
        for number, together in enumerate(self._rounds):
            self._reduce(step, number, [(tie, parameters[tie]) for tie in together if tie in parameters], links)

    def _reduce(self, step: int, number: int, held: Sequence[tuple[Tie, nn.Parameter]], links: Links) -> None:
        """One round of ``reduce_ties``: all send first, so that none waits for a rank that waits for it."""
        rank, rank_of, own = self._world.rank, self._layout.rank_of, self._trainables.accumulators.of
        edges = [
            (source, destination, between) for source, destination in self._layout.tied_edges
            if (between := [(tie, p) for tie, p in held if source in tie.stages and destination in tie.stages])
        ]  # fmt: skip
        for source, destination, between in edges:
            if rank_of(source) == rank:
                tensors = [tied.packed(own(source, p), p) for _, p in between]
                links.senders[source, destination, "tied"].send(step, number, tensors)
        received: dict[tuple[str, int], Tensor | None] = {}
        for source, destination, between in edges:
            if rank_of(destination) == rank:
                incoming = links.receivers[source, destination, "tied"].receive(step, number)
                received.update({(tie.name, source): tied.unpacked(t, p)
                                 for (tie, p), t in zip(between, incoming, strict=True)})  # fmt: skip
        for tie, p in held:
            p.grad = tied.total([own(s, p) if rank_of(s) == rank else received[tie.name, s] for s in tie.stages])

    def divide(self, count: float) -> None:
        """Divides all gradients: they were those of a sum."""
        for parameter in self._trainables.every:  # frozen since the backward too: the optimizer goes by gradients
            if parameter.grad is not None:
                parameter.grad.div_(count)

    def norm(self) -> Tensor | None:
        """Collective. The 2-norm of all gradients of the model together; None if there are none."""
        norms = {}
        for stage, parameters in self._trainables.owned.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms[stage] = [_encode(norm) for norm in foreach_norm(gradients)] if gradients else []
        # In model order, whatever the placement: the bits of the total do not depend on the cut.
        by_stage = {int(stage): values for rank in share(self._world, "the gradient norm", norms)
                    for stage, values in rank.items()}  # fmt: skip
        every = [_decode(value) for stage in sorted(by_stage) for value in by_stage[stage]]
        return torch.linalg.vector_norm(torch.stack(every)) if every else None

    def clip(self, clip_norm: float, norm: Tensor) -> None:
        """Scales all gradients so that their ``norm`` is at most ``clip_norm``."""
        nn.utils.clip_grads_with_norm_(self._trainables.every, clip_norm, norm)

    def without(self) -> list[nn.Parameter]:
        """Trainable parameters of this rank that have no gradient; call it after ``reduce_ties``, which gives tied ones
        that of other stages."""
        return [p for p in self._trainables.trained if p.grad is None]

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in self._trainables.every:
            parameter.grad = None
        self._trainables.forget()


_ROUND = 32 << 20
"""Bytes of gradients that are exchanged at once, and so are held by two ranks: a rank would otherwise need as much once
more as its part of the model takes."""
_MESSAGE = 1024
"""Tensors of one message, which has room for some thousands."""


def _rounds(layout: Layout) -> list[list[Tie]]:
    """The ties in their order, by what is exchanged at once; the same on every rank, whatever is trained."""
    nbytes = {held.name: held.nbytes for held in layout.blueprint.tensors}
    rounds: list[list[Tie]] = []
    room = 0
    for tie in layout.ties:
        if nbytes[tie.name] > room or len(rounds[-1]) == _MESSAGE:
            rounds.append([])
            room = max(_ROUND, nbytes[tie.name])
        rounds[-1].append(tie)
        room -= nbytes[tie.name]
    return rounds


def _encode(norm: Tensor) -> tuple[str, float]:
    return str(norm.dtype).removeprefix("torch."), norm.item()


def _decode(value: tuple[str, float]) -> Tensor:
    return torch.tensor(value[1], dtype=getattr(torch, value[0]))
