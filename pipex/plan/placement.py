"""Which rank holds which stage.

With 3 ranks and 2 chunks per rank (4 for ``wave``), the stages of each rank are:

            loop     v       wave
    rank 0  0 3      0 5     0 5 6 11
    rank 1  1 4      1 4     1 4 7 10
    rank 2  2 5      2 3     2 3 8 9

``loop``: stage mod ranks (Megatron-LM's interleaving, arXiv 2104.04473). ``v``: down and back up (ZBV, arXiv
2405.15362). ``wave``: down and up again and again (Hanayo, arXiv 2308.15762); one wave is a ``v``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipex.errors import PlanError

PlacementName = Literal["loop", "v", "wave"]


@dataclass(frozen=True, slots=True)
class Placement:
    """A map from stages to ranks.

    Attributes:
        name: the shape of the map.
        ranks: number of ranks P, at least 1.
        chunks: stages per rank V, at least 1; exactly 2 for ``v``, even for ``wave``.

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
        if self.name == "v" and self.chunks != 2:
            raise PlanError("wrong number of chunks for placement v", got=self.chunks, needed="exactly 2")
        if self.name == "wave" and self.chunks % 2:
            raise PlanError("wrong number of chunks for placement wave", got=self.chunks, needed="an even number")

    @property
    def stages(self) -> int:
        """Number of stages, ranks × chunks."""
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        """The rank that holds ``stage`` (0 … stages-1)."""
        chunk, position = divmod(stage, self.ranks)
        turned = self.name != "loop" and chunk % 2 == 1
        return self.ranks - 1 - position if turned else position

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that ``rank`` holds, rising."""
        return tuple(stage for stage in range(self.stages) if self.rank_of(stage) == rank)
