"""forward-only: no backward: inference, or an evaluation.

    rank 0 |F0 F1 F2 F3 ......
    rank 1 |...F0 F1 F2 F3 ...
    rank 2 |......F0 F1 F2 F3

Time        M F + (P-1)(F/V + c), c being a hop, for one chunk, or M >= 2P and c up to F/V. No order is faster.
Memory      1 activation of one chunk.
Constraints none.
Source      the forward of GPipe (arXiv 1811.06965); with several chunks that of Megatron-LM (arXiv 2104.04473), in
            groups of 2P or a little more: such a group is long enough to hide the hops around the ranks, and few
            messages wait where the last rank sends to the first.
"""

from __future__ import annotations

from pipex.plan.actions import Kind
from pipex.plan.families.interleaved import in_groups, legal_groups
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def forward_only(ranks: int, microbatches: int, chunks: int = 1) -> Plan:
    """A rank runs a group of micro-batches through its first chunk, then through its second and so on.

    Raises:
        PlanError: ``chunks`` is below 1.
    """
    placement = Placement("loop", ranks, chunks)
    group = legal_groups(2 * ranks, microbatches)[0]
    orders = tuple(tuple(in_groups(placement, rank, microbatches, group, Kind.F)) for rank in range(ranks))
    return Plan("forward-only", placement, microbatches, orders, peak_activations=(1,) * ranks, update="never")
