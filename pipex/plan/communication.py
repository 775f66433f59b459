"""Messages between stages on different ranks: where they are sent and received, and how many buffers they need."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from pipex.plan.actions import Action, Kind
from pipex.plan.causality import RECEIVES, SENDS, causal_order
from pipex.plan.placement import Edge
from pipex.plan.plan import Orders, Plan

_RECEIVE = {Kind.F: Kind.RECV_F, Kind.I: Kind.RECV_B, Kind.B: Kind.RECV_B}
_SEND = {Kind.F: Kind.SEND_F, Kind.I: Kind.SEND_B, Kind.B: Kind.SEND_B}


def communicate(plan: Plan) -> Orders:
    """The plan's orders with sends and receives: a receive right before the action that needs the message, a send
    right after the one that made it. Stages on one rank hand tensors over without either. An OVERLAP_F_B has all its
    receives before it and all its sends after it."""
    ends = plan.placement.ends

    def messages(of: Action, kinds: dict[Kind, Kind]) -> Iterator[Action]:
        for stage, kind, microbatch, _ in of.each:
            if kind in kinds and (stage, kinds[kind]) in ends:
                yield Action(stage, kinds[kind], microbatch)

    def around(action: Action) -> list[Action]:
        return [*messages(action, _RECEIVE), action, *messages(action, _SEND)]

    return tuple(tuple(a for action in order for a in around(action)) for order in plan.orders)


def unfused(plan: Plan) -> Plan:
    """The same plan with every OVERLAP_F_B taken apart: its parts one after another."""
    return replace(plan, orders=tuple(tuple(part for action in order for part in action.each) for order in plan.orders))


def slots_needed(plan: Plan) -> dict[Edge, int]:
    """Per edge the largest number of messages that can be sent but not received, over all timings: with so many
    slots a send never waits, and with fewer some timing makes one wait.

    Message k is sent with the fewest others received when the receiver is as slow as it can be: when it has done
    only what the send itself depends on. Vector clocks (Fidge, Mattern 1988) say what that is.

    Raises:
        DeadlockError: the ranks wait for each other even with any number of slots.
    """
    orders = communicate(plan)
    ends, rank_of = plan.placement.ends, plan.placement.rank_of
    receives: dict[Edge, list[int]] = {edge: [] for edge in plan.edges}
    for order in orders:
        for position, action in enumerate(order):
            if action.kind in RECEIVES:
                receives[ends[action.stage, action.kind]].append(position)
    # clock[r][q]: the actions of rank q that must come before the present one of rank r; in_flight: the clocks sent.
    clock = [[0] * len(orders) for _ in orders]
    in_flight: dict[Edge, list[list[int]]] = defaultdict(list)
    arrived: dict[Edge, int] = defaultdict(int)
    slots = dict.fromkeys(plan.edges, 0)
    for rank, position, action in causal_order(orders, plan.placement):
        if action.kind in RECEIVES:
            edge = ends[action.stage, action.kind]
            clock[rank] = list(map(max, clock[rank], in_flight[edge][arrived[edge]]))
            arrived[edge] += 1
        elif action.kind in SENDS:
            edge = ends[action.stage, action.kind]
            received = bisect_left(receives[edge], clock[rank][rank_of(edge.destination)])
            slots[edge] = max(slots[edge], len(in_flight[edge]) + 1 - received)
            clock[rank][rank] = position + 1
            in_flight[edge].append(clock[rank].copy())
    return slots


def alive(plan: Plan) -> dict[Edge, int]:
    """Per edge the largest number of received messages in use at once at the consumer: each from its receive to the
    end of the micro-batch's B or W, which needs both the activation and the gradient (without a backward: of its F).
    The same for all timings."""
    last_users = {Kind.F} if plan.update == "never" else {Kind.W, Kind.B}
    ends = plan.placement.ends
    held = dict.fromkeys(plan.edges, 0)
    peak = dict(held)
    for order in communicate(plan):
        for action in (part for outer in order for part in outer.each):
            if action.kind in RECEIVES:
                edge = ends[action.stage, action.kind]
                held[edge] += 1
                peak[edge] = max(peak[edge], held[edge])
            elif action.kind in last_users:
                for received in (Kind.RECV_F, Kind.RECV_B):
                    if (action.stage, received) in ends:
                        held[ends[action.stage, received]] -= 1
    return peak
