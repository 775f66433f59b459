"""Runs orders without a clock: what must come before what, and who would wait for whom for ever.

A rank runs its actions in order. Its k-th receive on an edge waits for the k-th send on it. A send waits while the
edge's ring is full. Which of several possible actions goes first changes nothing: each waits for fixed others, so
either all orders of events come to the end or none does.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pipex.errors import DeadlockError, PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Orders

SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})


class Event(NamedTuple):
    """One action where it stands: ``orders[rank][position]``."""

    rank: int
    position: int
    action: Action

    def __str__(self) -> str:
        return f"rank {self.rank} at position {self.position} ({self.action})"


def causal_order(orders: Orders, placement: Placement, slots: Mapping[Edge, int] | None = None) -> Iterator[Event]:
    """All events, each after everything that it waits for.

    Args:
        orders: with sends and receives, as ``communicate`` makes them.
        slots: per edge the messages that may be sent but not received; None: any number.

    Raises:
        DeadlockError: at the end, when ranks wait for each other for ever.
        PlanError: at the end, when a rank waits for a message that is never sent.
    """
    ends = placement.ends
    cursor = [0] * len(orders)
    blocked: dict[int, Edge] = {}
    sent: Counter[Edge] = Counter()
    received: Counter[Edge] = Counter()
    runnable = deque(range(len(orders)))
    while runnable:
        rank = runnable.popleft()
        for position in range(cursor[rank], len(orders[rank])):
            action = orders[rank][position]
            if action.kind in SENDS or action.kind in RECEIVES:
                edge = ends[action.stage, action.kind]
                waiting = sent[edge] - received[edge]
                if action.kind in SENDS:
                    possible, done, peer = slots is None or waiting < slots[edge], sent, edge.destination
                else:
                    possible, done, peer = waiting > 0, received, edge.source
                if not possible:
                    blocked[rank] = edge
                    break
                done[edge] += 1
                if blocked.get(peer_rank := placement.rank_of(peer)) == edge:
                    del blocked[peer_rank]
                    runnable.append(peer_rank)
            cursor[rank] = position + 1
            yield Event(rank, position, action)
    if blocked:
        stuck = {rank: Event(rank, cursor[rank], orders[rank][cursor[rank]]) for rank in blocked}
        raise _stuck_error(stuck, blocked, placement)


def _stuck_error(stuck: dict[int, Event], blocked: dict[int, Edge], placement: Placement) -> PlanError:
    """Follows who waits for whom until a rank comes up again, or one that has ended. ``blocked``: per rank of ``stuck``
    the edge on which it waits."""
    rank = min(stuck)
    path: list[int] = []
    while rank in stuck and rank not in path:
        path.append(rank)
        edge = blocked[rank]
        sends = stuck[rank].action.kind in SENDS
        rank = placement.rank_of(edge.destination if sends else edge.source)
    if rank not in stuck:
        return PlanError(f"{stuck[path[-1]]} waits for rank {rank}, which has ended")
    cycle = path[path.index(rank) :]
    waits = [f"{stuck[a]} waits for rank {b}" for a, b in zip(cycle, [*cycle[1:], rank], strict=True)]
    full = [blocked[a] for a in cycle if stuck[a].action.kind in SENDS]
    fix = f"give more slots to {', '.join(map(str, full))}" if full else "reorder the actions of one of these ranks"
    return DeadlockError(f"ranks wait for each other for ever: {'; '.join(waits)}", fix=fix)
