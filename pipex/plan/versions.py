"""Which version of a stage's weights an action uses, and how many versions that makes. The order alone decides it.

A version is the number of updates that the weights have had since the step began. F, I, W and B of a micro-batch use
the same one:

    step, never   0: the weights do not change before the step ends
    microbatch    the newest at its F
    delayed       the number of its group less 1, a group being the micro-batches of one update, counted from 0; so -1
                  in the first group, the version before the one with which the step began: W(t+1) = W(t) - lr g(W(t-1))
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from pipex.plan.actions import Action, Kind

Update = Literal["step", "microbatch", "delayed", "never"]
"""When the weights change:

step        after all micro-batches. Every synchronous schedule.
microbatch  after every backward; a micro-batch keeps the version it began with (PipeDream's weight stashing).
delayed     after every group of micro-batches, which have used the version before the newest (PipeDream-2BW).
never       there is no backward; an activation is held for its F only.
"""


def versions_used(order: Sequence[Action], update: Update) -> dict[tuple[int, int], int]:
    """(stage, micro-batch) -> version, of all that a rank runs in this order."""
    parts = [part for action in order for part in action.each if part.kind in (Kind.F, Kind.UPDATE)]
    updates: defaultdict[int, list[int]] = defaultdict(list)  # per stage the last micro-batches of its groups
    used: dict[tuple[int, int], int] = {}
    for stage, kind, microbatch, _ in parts:
        if kind is Kind.UPDATE:
            updates[stage].append(microbatch)
        else:
            used[stage, microbatch] = len(updates[stage])
    if update == "delayed":
        groups = {stage: sorted(lasts) for stage, lasts in updates.items()}
        return {(stage, m): bisect_left(groups.get(stage, ()), m) - 1 for stage, m in used}
    return used


def versions_held(order: Sequence[Action], update: Update) -> int:
    """The most versions that a rank must hold of one of its stages at once: the newest, and those that micro-batches
    under way need for their backward. For "delayed" that is two, since a step begins with a group that uses the version
    before the newest; the two are held between its micro-batches, too."""
    if update in ("step", "never"):
        return 1
    used = versions_used(order, update)
    updates: Counter[int] = Counter()
    under_way: defaultdict[int, Counter[int]] = defaultdict(Counter)  # per stage: version -> micro-batches
    most = 1
    for stage, kind, microbatch, _ in (part for action in order for part in action.each):
        needed = under_way[stage]
        if kind is Kind.F:
            needed[used[stage, microbatch]] += 1
        elif kind in (Kind.B, Kind.W):
            needed[used[stage, microbatch]] -= 1
        elif kind is Kind.UPDATE:
            updates[stage] += 1
        under_way[stage] = +needed
        most = max(most, len({updates[stage], *under_way[stage]}))
    return most
