"""The gradients of a rank's stages, from the last backward to the update: tied ones added up, divided, clipped."""

from __future__ import annotations

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
        rank, rank_of, own = self._world.rank, self._layout.rank_of, self._trainables.accumulators.of
        edges = [(*edge, between) for edge in self._layout.tied_edges if (between := self._between(*edge))]
        for source, destination, between in edges:
            if rank_of(source) == rank:
                tensors = [tied.packed(own(source, p), p) for _, p in between]
                links.senders[source, destination, "tied"].send(step, 0, tensors)
        received: dict[tuple[str, int], Tensor | None] = {}
        for source, destination, between in edges:
            if rank_of(destination) == rank:
                incoming = links.receivers[source, destination, "tied"].receive(step, 0)
                received.update({(tie.name, source): tied.unpacked(t, p)
                                 for (tie, p), t in zip(between, incoming, strict=True)})  # fmt: skip
        for tie, p in self._trainables.tied:
            p.grad = tied.total([own(s, p) if rank_of(s) == rank else received[tie.name, s] for s in tie.stages])

    def _between(self, source: int, destination: int) -> list[tuple[Tie, nn.Parameter]]:
        return [held for held in self._trainables.tied if {source, destination} <= set(held[0].stages)]

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


def _encode(norm: Tensor) -> tuple[str, float]:
    return str(norm.dtype).removeprefix("torch."), norm.item()


def _decode(value: tuple[str, float]) -> Tensor:
    return torch.tensor(value[1], dtype=getattr(torch, value[0]))
