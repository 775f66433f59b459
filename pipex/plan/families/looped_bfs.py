"""looped-bfs: gpipe with several chunks per rank, all micro-batches through one chunk before the next.

    rank 0 |0F0 0F1 0F2 0F3 2F0 2F1 2F2 2F3 ............2B0---- 2B1---- 2B2---- 2B3---- 0B0---- 0B1---- 0B2---- 0B3----
    rank 1 |....1F0 1F1 1F2 1F3 3F0 3F1 3F2 3F3 3B0---- 3B1---- 3B2---- 3B3---- 1B0---- 1B1---- 1B2---- 1B3---- ........

Time        M(F+I+W) + (P-1)(F+I+W)/V + 2(P-1) c, c being a hop, for one chunk, or M F/V >= P(F/V + c) and likewise
            for I+W.
Memory      M micro-batches on every rank.
Constraints none.
Source      Breadth-first pipeline parallelism (arXiv 2211.05953), made for sharded weights: a chunk's are gathered
            once per step and direction. There the backwards run in falling order, here in rising order, so that
            gradients are summed as without a pipeline. Time and memory are the same.
"""

from __future__ import annotations

from pipex.plan.actions import Kind
from pipex.plan.families.interleaved import in_groups
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def looped_bfs(ranks: int, microbatches: int, chunks: int = 2) -> Plan:
    """A rank runs all F of its first chunk, then of its second and so on; then all B of its last chunk and so on.

    Raises:
        PlanError: ``chunks`` is below 1.
    """
    placement = Placement("loop", ranks, chunks)
    orders = []
    for rank in range(ranks):
        forward = in_groups(placement, rank, microbatches, microbatches, Kind.F)
        backward = in_groups(placement, rank, microbatches, microbatches, Kind.B)
        orders.append((*forward, *backward))
    peaks = (microbatches * chunks,) * ranks
    return Plan("looped-bfs", placement, microbatches, tuple(orders), peaks)
