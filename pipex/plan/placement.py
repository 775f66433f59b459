"""Which rank holds which stage.

With 3 ranks and 2 chunks per rank (4 for ``wave``), the stages of each rank are:

            loop     v       wave        bidirectional
    rank 0  0 3      0 5     0 5 6 11    0 5
    rank 1  1 4      1 4     1 4 7 10    1 4
    rank 2  2 5      2 3     2 3 8 9     2 3

``loop``: stage mod ranks (Megatron-LM's interleaving, arXiv 2104.04473). ``v``: down and back up (ZBV, arXiv
2405.15362). ``wave``: down and up again and again (Hanayo, arXiv 2308.15762); one wave is a ``v``. In these the
stages are one pipe, 0 to the last, that every micro-batch passes.

``bidirectional``: two copies of the model (Chimera, arXiv 2107.06925; DualPipe, arXiv 2412.19437). Stages 0 … P-1 are
the pipe down the ranks, stages P … 2P-1 the same layers once more, up the ranks. A micro-batch passes one of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

from pipex.errors import PlanError
from pipex.plan.actions import Kind

PlacementName = Literal["loop", "v", "wave", "bidirectional"]


class Edge(NamedTuple):
    """One directed link between two stages on different ranks."""

    source: int
    destination: int
    kind: Literal["activation", "gradient"]

    def __str__(self) -> str:
        return f"{self.kind} edge {self.source}→{self.destination}"


@dataclass(frozen=True)
class Placement:
    """A map from stages to ranks.

    Attributes:
        name: the shape of the map.
        ranks: number of ranks P, at least 1.
        chunks: stages per rank V, at least 1; exactly 2 for ``v`` and ``bidirectional``, even for ``wave``.

    Raises:
        PlanError: a number does not fit the shape.
    """

    name: PlacementName
    ranks: int
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise PlanError("too few ranks", got=self.ranks, needed="at least 1")
        if self.chunks < 1:
            raise PlanError("too few chunks per rank", got=self.chunks, needed="at least 1")
        if self.name in ("v", "bidirectional") and self.chunks != 2:
            raise PlanError(f"wrong number of chunks for placement {self.name}", got=self.chunks, needed="exactly 2")
        if self.name == "wave" and self.chunks % 2:
            raise PlanError("wrong number of chunks for placement wave", got=self.chunks, needed="an even number")

    @property
    def stages(self) -> int:
        """Number of stages, ranks × chunks."""
        return self.ranks * self.chunks

    @property
    def pipes(self) -> tuple[range, ...]:
        """The chains of neighbouring stages. A micro-batch passes one of them; each holds the whole model."""
        if self.name == "bidirectional":
            return range(self.ranks), range(self.ranks, self.stages)
        return (range(self.stages),)

    def before(self, stage: int) -> int | None:
        """The stage whose output it takes, and which takes its input gradient; None for the first of a pipe."""
        return self._before.get(stage)

    def after(self, stage: int) -> int | None:
        """The stage that takes its output, and whose input gradient it takes; None for the last of a pipe."""
        return self._after.get(stage)

    @property
    def pieces(self) -> int:
        """Into how many pieces the model is cut: the stages of one pipe."""
        return len(self.pipes[0])

    def piece(self, stage: int) -> int:
        """Which piece of the model it holds: how many stages come before it in its pipe."""
        return stage % self.pieces

    def twin_of(self, rank: int) -> int:
        """The rank that holds the other copy of what ``rank`` holds; where there is one copy, the rank itself."""
        return self.ranks - 1 - rank if len(self.pipes) > 1 else rank

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges: neighbouring stages on different ranks, activations first, then gradients."""
        return _both_ways((s, t) for s, t in self._after.items() if self.rank_of(s) != self.rank_of(t))

    @cached_property
    def edges_within_ranks(self) -> tuple[Edge, ...]:
        """The same of neighbouring stages on one rank, between which nothing is sent."""
        return _both_ways((s, t) for s, t in self._after.items() if self.rank_of(s) == self.rank_of(t))

    @cached_property
    def ends(self) -> dict[tuple[int, Kind], Edge]:
        """The edge on which a stage's SEND_F, RECV_F, SEND_B or RECV_B works. None stands here where the pipe ends or
        the neighbour is on the same rank, to which tensors go without a message."""
        return {
            end: edge
            for edge in self.edges
            for end in (
                ((edge.source, Kind.SEND_F), (edge.destination, Kind.RECV_F))
                if edge.kind == "activation"
                else ((edge.source, Kind.SEND_B), (edge.destination, Kind.RECV_B))
            )
        }

    @cached_property
    def _after(self) -> dict[int, int]:
        return {stage: following for pipe in self.pipes for stage, following in pairwise(pipe)}

    @cached_property
    def _before(self) -> dict[int, int]:
        return {following: stage for stage, following in self._after.items()}

    def rank_of(self, stage: int) -> int:
        """The rank that holds ``stage`` (0 … stages-1)."""
        chunk, position = divmod(stage, self.ranks)
        turned = self.name != "loop" and chunk % 2 == 1
        return self.ranks - 1 - position if turned else position

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, rising."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)


def _both_ways(neighbours: Iterable[tuple[int, int]]) -> tuple[Edge, ...]:
    pairs = list(neighbours)
    return (*(Edge(s, t, "activation") for s, t in pairs), *(Edge(t, s, "gradient") for s, t in pairs))
