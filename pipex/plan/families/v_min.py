"""v-min: down the ranks and back up, with the building block that holds least, a third of 1f1b.

    rank 0 |0F0 0F1 0F2 ........5F0 5I0 5W0 5F1 5I1 5W1 0I0 0W0 ........5F2 5I2 0I1 5W2 0W1 ....0I2 0W2
    rank 1 |....1F0 1F1 ....4F0 ....4F1 4I0 4W0 1F2 1I0 4I1 1W0 4W1 4F2 ....1I1 4I2 1W1 4W2 1I2 1W2 ....
    rank 2 |........2F0 3F0 2F1 3F1 ........3I0 2I0 3W0 2F2 2W0 3F2 3I1 2I1 3W1 2W1 3I2 2I2 3W2 2W2 ....

Time        M(F+I+W) + (2P-5/2)F, + (2P-7/2)F where 3 divides P, at F = I = W, no hop cost and M >= P >= 2: about two
            thirds of the bubble of 1f1b. Otherwise: simulate; every micro-batch adds to the bubble when they differ.
Memory      (P+4)/3 micro-batches, rounded down (M if that is less), on the fullest rank.
Constraints two chunks per rank.
Source      Pipeline Parallelism with Controllable Memory (arXiv 2405.15362), V-Min.
"""

from __future__ import annotations

from pipex.plan.families.building_block import repeated
from pipex.plan.plan import Plan


def v_min(ranks: int, microbatches: int) -> Plan:
    """One slot from stage to stage, there and back; at the turn on rank 0 as many as keep the slots of the repeated
    block apart."""
    turn = 3 if ranks % 3 == 0 else 1
    block = [(r, 2 * ranks - 1 - r, 2 * ranks - 1 + turn + r, 4 * ranks - 2 + turn - r) for r in range(ranks)]
    return repeated("v-min", block, microbatches)
