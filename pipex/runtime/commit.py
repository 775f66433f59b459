"""The gradients of a rank's stages, from the last backward to the update: tied ones added up, divided, clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipex.runtime import tied
from pipex.runtime.agreement import share
from pipex.torch_internals import foreach_norm
from pipex.transport.interface import EdgeSpec, Links, TensorForm, World, form_of


class Gradients:
    """This rank's share of the model's gradients.

    Args:
        world: the ranks.
        rank_of: rank of each stage.
        parameters: per local stage, in stage order, its trainable parameters in layer order.
        ties: the model's tied parameters, the same list on every rank.
    """

    def __init__(
        self, world: World, rank_of: Sequence[int], parameters: dict[int, list[nn.Parameter]], ties: Sequence[tied.Tie]
    ) -> None:
        self._world = world
        self._rank_of = rank_of
        self._ties = ties
        self._all = [p for stage in parameters.values() for p in stage]
        replicas = {id(p) for tie in ties for p in tie.replicas[1:]}
        self._owned = {s: [p for p in own if id(p) not in replicas] for s, own in parameters.items()}
        # Replicas on a rank share memory, so its optimizer gets the first of them only.
        copies = {id(r) for tie in ties for r in self._local_replicas(tie)[1:]}
        self.optimized = [p for p in self._all if id(p) not in copies]

    def edges(self) -> list[EdgeSpec]:
        """The edges over which tied accumulators travel: from every holder to every holder on another rank."""
        together: dict[tuple[int, int], list[TensorForm]] = {}
        for tie in self._ties:
            for source in tie.stages:
                for destination in tie.stages:
                    if self._rank_of[source] != self._rank_of[destination]:
                        form = form_of([tied.accumulator(tie.replicas[0])])
                        together.setdefault((source, destination), []).extend(form)
        return [
            EdgeSpec(s, d, "tied", self._rank_of[s], self._rank_of[d], slots=1, alive=1, form=tuple(forms))
            for (s, d), forms in sorted(together.items(), key=lambda one: one[0])
        ]

    def reduce_ties(self, step: int, links: Links) -> None:
        """Replaces each tied parameter's gradient by the sum of all stages' accumulators, on every holder."""
        if not self._ties:
            return
        gradient = {(tie.name, s): r for tie in self._ties for s, r in zip(tie.stages, tie.replicas, strict=True)}
        edges = self.edges()
        for edge in edges:
            if edge.source_rank == self._world.rank:
                names = self._names_between(edge)
                tensors = [tied.accumulator(gradient[name, edge.source]) for name in names]
                links.senders[edge.source, edge.destination, "tied"].send(step, 0, tensors)
        received: dict[tuple[str, int], Tensor] = {}
        for edge in edges:
            if edge.destination_rank == self._world.rank:
                receiver = links.receivers[edge.source, edge.destination, "tied"]
                incoming = receiver.receive(step, 0, edge.form)
                received.update(
                    {(name, edge.source): t for name, t in zip(self._names_between(edge), incoming, strict=True)}
                )
        for tie in self._ties:
            local = self._local_replicas(tie)
            if local:
                accumulators = [
                    tied.accumulator(replica) if self._rank_of[s] == self._world.rank else received[tie.name, s]
                    for s, replica in zip(tie.stages, tie.replicas, strict=True)
                ]
                for replica in local:
                    replica.grad = None
                local[0].grad = tied.total(accumulators)

    def divide(self, count: float) -> None:
        """Divides all gradients: they were those of a sum."""
        for parameter in self._all:
            if parameter.grad is not None:
                parameter.grad.div_(count)

    def norm(self) -> Tensor | None:
        """Collective. The 2-norm of all gradients of the model together; None if there are none."""
        norms = {}
        for stage, parameters in self._owned.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms[stage] = [_encode(norm) for norm in foreach_norm(gradients)] if gradients else []
        # In model order, whatever the placement: the bits of the total do not depend on the cut.
        by_stage = {int(stage): values for rank in share(self._world, "the gradient norm", norms)
                    for stage, values in rank.items()}  # fmt: skip
        every = [_decode(value) for stage in sorted(by_stage) for value in by_stage[stage]]
        return torch.linalg.vector_norm(torch.stack(every)) if every else None

    def clip(self, clip_norm: float, norm: Tensor) -> None:
        """Scales all gradients so that their ``norm`` is at most ``clip_norm``."""
        nn.utils.clip_grads_with_norm_(self._all, clip_norm, norm)

    def without(self) -> list[nn.Parameter]:
        """Trainable parameters of this rank that have no gradient; call it before ``reduce_ties``. Tied ones are left
        out: another stage may have theirs."""
        tied_ones = {id(p) for tie in self._ties for p in tie.replicas}
        return [p for p in self._all if p.grad is None and p.requires_grad and id(p) not in tied_ones]

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in self._all:
            parameter.grad = None

    def _local_replicas(self, tie: tied.Tie) -> list[nn.Parameter]:
        return [r for s, r in zip(tie.stages, tie.replicas, strict=True) if self._rank_of[s] == self._world.rank]

    def _names_between(self, edge: EdgeSpec) -> list[str]:
        return [tie.name for tie in self._ties if edge.source in tie.stages and edge.destination in tie.stages]


def _encode(norm: Tensor) -> tuple[str, float]:
    return str(norm.dtype).removeprefix("torch."), norm.item()


def _decode(value: tuple[str, float]) -> Tensor:
    return torch.tensor(value[1], dtype=getattr(torch, value[0]))
