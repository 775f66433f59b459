"""What a rank holds at its fullest moment. Its order alone decides that; timing does not."""

from __future__ import annotations

from collections.abc import Sequence

from pipex.plan.actions import Kind
from pipex.plan.plan import Plan


def peak_memory(plan: Plan, activation: Sequence[float], deferred: Sequence[float]) -> tuple[float, ...]:
    """Per rank the largest sum of what it holds at once. The F of an OVERLAP_F_B is held beside what its B frees.

    Args:
        activation: per stage, what one micro-batch holds from the start of its F to the end of its I or B.
        deferred: per stage, what one micro-batch holds from the end of its I to the end of its W. Any unit; the
            result has the same.
    """
    peaks = []
    for order in plan.orders:
        held = peak = 0.0
        for stage, kind, _, _ in (part for action in order for part in action.each):
            if kind is Kind.F:
                held += activation[stage]
                peak = max(peak, held)
                if plan.update == "never":
                    held -= activation[stage]
            elif kind is Kind.I:
                held += deferred[stage] - activation[stage]
            elif kind is Kind.B:
                held -= activation[stage]
            elif kind is Kind.W:
                held -= deferred[stage]
            peak = max(peak, held)
        peaks.append(peak)
    return tuple(peaks)
