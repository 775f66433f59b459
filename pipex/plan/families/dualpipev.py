"""dualpipev: dualpipe cut in half: one copy of the model, down the ranks and back up.

    rank 0 |0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3+3B1---- ....3F2+0B0---- 3B2---- ....3F3+0B1---- 3B3---- 0I2 0W2 0I3 0W3
    rank 1 |....1F0 2F0 1F1 2F1 1F2 2B0---- 2F2+1B0---- 1F3+2B1---- 2F3+1B1---- 2B2---- 1B2---- ....2I3 1I3 2W3 1W3

Time        beside its work the idlest rank waits (P-1)(F&B + I - 2W)/2, F&B being the time of a fused pair of whole
            ranks, at F = I and no hop cost; less where I is longer than F. With pairs run apart: M(F+I+W) + (P-1)F/2
            at F = I = W.
Memory      P + 1/2 micro-batches on every rank (2P+1 chunks).
Constraints two chunks per rank; M at least 2P; pairs as in dualpipe.
Source      github.com/deepseek-ai/DualPipe, DualPipeV; the orders are equal to those of torch's ScheduleDualPipeV.
"""

from __future__ import annotations

from pipex.errors import PlanError
from pipex.plan.families.dualpipe import eight_steps
from pipex.plan.families.phases import in_phases
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def dualpipev(ranks: int, microbatches: int) -> Plan:
    """Every rank runs the eight steps of dualpipe, stage 0 being the one on the way down.

    Raises:
        PlanError: ``microbatches`` is below twice the ranks.
    """
    if microbatches < 2 * ranks:
        needed = f"at least {2 * ranks}, twice the ranks"
        raise PlanError("too few micro-batches for dualpipev", got=microbatches, needed=needed)
    placement = Placement("v", ranks, 2)
    orders = tuple(
        in_phases(eight_steps(ranks, rank, microbatches), (rank, placement.stages - 1 - rank)) for rank in range(ranks)
    )
    return Plan("dualpipev", placement, microbatches, orders, peak_activations=(2 * ranks + 1,) * ranks)
