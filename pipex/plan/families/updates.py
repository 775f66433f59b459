"""Updates between the micro-batches of a step, for the families whose weights change without a flush."""

from __future__ import annotations

from pipex.plan.actions import Action, Kind
from pipex.plan.plan import Orders


def with_updates(orders: Orders, every: int) -> Orders:
    """Adds an UPDATE after the B of every ``every``-th micro-batch. The Bs are in rising order on all ranks."""

    def updated(action: Action) -> tuple[Action, ...]:
        if action.kind is Kind.B and (action.microbatch + 1) % every == 0:
            return action, Action(action.stage, Kind.UPDATE, action.microbatch)
        return (action,)

    return tuple(tuple(done for action in order for done in updated(action)) for order in orders)
