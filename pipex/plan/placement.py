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

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipex.errors import PlanError

PlacementName = Literal["loop", "v", "wave", "bidirectional"]


class Edge(NamedTuple):
    """One directed link between two stages on different ranks."""

    source: int
    destination: int
    kind: Literal["activation", "gradient"]

    def __str__(self) -> str:
        return f"{self.kind} edge {self.source}→{self.destination}"


@dataclass(frozen=True, slots=True)
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

    @property
    def edges(self) -> tuple[Edge, ...]:
        """All edges: neighbouring stages on different ranks, activations first, then gradients."""
        neighbours = [(s, s + 1) for pipe in self.pipes for s in pipe[:-1] if self.rank_of(s) != self.rank_of(s + 1)]
        return (
            *(Edge(s, t, "activation") for s, t in neighbours),
            *(Edge(t, s, "gradient") for s, t in neighbours),
        )

    def rank_of(self, stage: int) -> int:
        """The rank that holds ``stage`` (0 … stages-1)."""
        chunk, position = divmod(stage, self.ranks)
        turned = self.name != "loop" and chunk % 2 == 1
        return self.ranks - 1 - position if turned else position

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, rising."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)
