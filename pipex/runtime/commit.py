"""The end of a step: gradients become an update, on all ranks or on none.

One exchange carries the losses and the gradient norms. It returns only when every rank has finished its actions, so a
fault before it leaves all parameters at the last step boundary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipex.runtime import tied
from pipex.runtime.agreement import share
from pipex.runtime.trainable import Trainables
from pipex.torch_internals import foreach_norm
from pipex.transport.interface import EdgeSpec, Links, World


class Gradients:
    """This rank's share of the model's gradients.

    Args:
        world: the ranks.
        rank_of: rank of each stage.
        trainables: this rank's parameters.
    """

    def __init__(self, world: World, rank_of: Sequence[int], trainables: Trainables) -> None:
        self._world = world
        self._rank_of = rank_of
        self._trainables = trainables

    def edges(self) -> list[EdgeSpec]:
        """The edges over which tied accumulators travel: from every holder to every holder on another rank."""
        together = set()
        for tie in self._trainables.ties:
            for source in tie.stages:
                for destination in tie.stages:
                    if self._rank_of[source] != self._rank_of[destination]:
                        together.add((source, destination))
        return [
            EdgeSpec(s, d, "tied", self._rank_of[s], self._rank_of[d], slots=1, alive=1) for s, d in sorted(together)
        ]

    def reduce_ties(self, step: int, links: Links) -> None:
        """Replaces each tied parameter's gradient by the sum of all stages' accumulators, on every holder."""
        rank, rank_of, own = self._world.rank, self._rank_of, self._trainables.accumulators.of
        edges = [edge for edge in self.edges() if self._between(edge.source, edge.destination)]
        for edge in edges:
            if edge.source_rank == rank:
                tensors = [own(edge.source, p) for _, p in self._between(edge.source, edge.destination)]
                links.senders[edge.source, edge.destination, "tied"].send(step, 0, tensors)
        received: dict[tuple[str, int], Tensor] = {}
        for edge in edges:
            if edge.destination_rank == rank:
                incoming = links.receivers[edge.source, edge.destination, "tied"].receive(step, 0)
                between = self._between(edge.source, edge.destination)
                received.update({(tie.name, edge.source): t for (tie, _), t in zip(between, incoming, strict=True)})
        for tie, p in self._trainables.tied:
            if any(rank_of[s] == rank for s in tie.stages):
                p.grad = tied.total([own(s, p) if rank_of[s] == rank else received[tie.name, s] for s in tie.stages])

    def _between(self, source: int, destination: int) -> list[tuple[tied.Tie, nn.Parameter]]:
        return [held for held in self._trainables.tied if {source, destination} <= set(held[0].stages)]

    def exchange(self, loss: float | None, clip_norm: float | None) -> float:
        """Collective. Shares the loss of the rank that has one, and clips all gradients to ``clip_norm`` if given."""
        norms = {}
        if clip_norm is not None:
            for stage, parameters in self._trainables.owned.items():
                gradients = [p.grad for p in parameters if p.grad is not None]
                norms[stage] = [_encode(norm) for norm in foreach_norm(gradients)] if gradients else []
        shared = share(self._world, "the end of a step", {"loss": loss, "norms": norms})
        if clip_norm is not None:
            # In model order, whatever the placement: the bits of the total do not depend on the cut.
            by_stage = {int(stage): values for rank in shared for stage, values in rank["norms"].items()}
            every = [_decode(value) for stage in sorted(by_stage) for value in by_stage[stage]]
            if every:
                total = torch.linalg.vector_norm(torch.stack(every))
                nn.utils.clip_grads_with_norm_(self._trainables.trained, clip_norm, total)
        return float(next(rank["loss"] for rank in shared if rank["loss"] is not None))

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in self._trainables.every:
            parameter.grad = None
        self._trainables.accumulators.clear()


def _encode(norm: Tensor) -> tuple[str, float]:
    return str(norm.dtype).removeprefix("torch."), norm.item()


def _decode(value: tuple[str, float]) -> Tensor:
    return torch.tensor(value[1], dtype=getattr(torch, value[0]))
