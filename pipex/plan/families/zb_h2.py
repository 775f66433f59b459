"""zb-h2: zb-h1 with twice the warm-up, so that no rank is idle between its first and its last action.

    rank 0 |F0 F1 F2 F3 F4 I0 W0 F5 I1 W1 I2 W2 I3 W3 I4 W4 I5 W5 ......
    rank 1 |...F0 F1 F2 I0 F3 I1 F4 I2 W0 F5 I3 W1 I4 W2 I5 W3 W4 W5 ...
    rank 2 |......F0 I0 F1 I1 F2 I2 F3 I3 F4 I4 W0 F5 I5 W1 W2 W3 W4 W5

Time        span M(F+I+W) + (P-1)(F+I-2W), so no bubble at F = I = W; makespan M(F+I+W) + (P-1) max(F, F+I-2W), there
            that of zb-h1: ranks start and end (P-1)F apart, for which a barrier after the step makes them wait. Both
            at no hop cost, M >= 2P-1 and W no longer than F and I.
Memory      2P-1 micro-batches on every rank (M if that is less). Of these rank r holds 2(P-r)-1 whole and of the other
            2r only what W needs.
Constraints none.
Source      Zero Bubble (arXiv 2401.10241), second handcrafted schedule, table 2.
"""

from __future__ import annotations

from pipex.plan.families.zb_h1 import in_turns
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan


def zb_h2(ranks: int, microbatches: int) -> Plan:
    """A rank runs ahead by two forwards for each rank after it, and keeps two weight gradients back for each before."""
    peaks = (min(2 * ranks - 1, microbatches),) * ranks
    return Plan("zb-h2", Placement("loop", ranks), microbatches, in_turns(ranks, microbatches, 2), peaks)
