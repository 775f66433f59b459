"""v-half: down the ranks and back up, with a building block that holds half as much as 1f1b.

    rank 0 |0F0 0F1 0F2 ........5F0 5I0 5W0 5F1 5I1 5W1 0I0 0W0 ........5F2 5I2 0I1 5W2 0W1 ....0I2 0W2
    rank 1 |....1F0 1F1 ....4F0 ....4F1 4I0 4W0 1F2 1I0 4I1 1W0 4W1 4F2 ....1I1 4I2 1W1 4W2 1I2 1W2 ....
    rank 2 |........2F0 3F0 2F1 3F1 ........3I0 2I0 3W0 2F2 2W0 3F2 3I1 2I1 3W1 2W1 3I2 2I2 3W2 2W2 ....

Time        M(F+I+W) + (3P-7)F/2 for even P >= 4, + (3P-4)F/2 for odd P >= 3, at F = I = W, no hop cost and
            M >= P/2+2: about half the bubble of 1f1b. Otherwise: simulate.
Memory      P/2+1 micro-batches, rounded down (M if that is less), on the fullest rank.
Constraints two chunks per rank.
Source      Pipeline Parallelism with Controllable Memory (arXiv 2405.15362), V-Half.
"""

from __future__ import annotations

from pipex.plan.families.building_block import repeated
from pipex.plan.plan import Plan


def v_half(ranks: int, microbatches: int) -> Plan:
    """Two slots from rank to rank on the way down and one on the way up, and so for I; at the turn on rank 0 as many as
    keep the slots of the repeated block apart."""
    turn = 4 if ranks % 2 == 0 else 1
    block = [(2 * r, 3 * ranks - 2 - r, 3 * ranks - 2 + turn + 2 * r, 6 * ranks - 3 + turn - r) for r in range(ranks)]
    return repeated("v-half", block, microbatches)
