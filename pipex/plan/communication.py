"""Messages between stages on different ranks: where they are sent and received, and how many buffers they need."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import replace

from pipex.plan.actions import Action, Kind
from pipex.plan.causality import RECEIVES, SENDS, causal_order, edge_of
from pipex.plan.placement import Edge
from pipex.plan.plan import Orders, Plan

_RECEIVE = {Kind.F: Kind.RECV_F, Kind.I: Kind.RECV_B, Kind.B: Kind.RECV_B}
_SEND = {Kind.F: Kind.SEND_F, Kind.I: Kind.SEND_B, Kind.B: Kind.SEND_B}


def communicate(plan: Plan) -> Orders:
    """The plan's orders with sends and receives: a receive right before the action that needs the message, a send
    right after the one that made it. Stages on one rank hand tensors over without either. An OVERLAP_F_B has all its
    receives before it and all its sends after it."""
    edges = set(plan.edges)

    def around(action: Action) -> list[Action]:
        messages = [
            (Action(stage, _RECEIVE[kind], microbatch), Action(stage, _SEND[kind], microbatch))
            for stage, kind, microbatch, _ in action.each
            if kind is not Kind.W
        ]
        before = [receive for receive, _ in messages if edge_of(receive) in edges]
        after = [send for _, send in messages if edge_of(send) in edges]
        return [*before, action, *after]

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
    rank_of = plan.placement.rank_of
    receives = {edge: _positions(orders[rank_of(edge.destination)], edge) for edge in plan.edges}
    # clock[r][q]: the actions of rank q that must come before the present one of rank r; in_flight: the clocks sent.
    clock = [[0] * len(orders) for _ in orders]
    in_flight: dict[Edge, list[list[int]]] = defaultdict(list)
    arrived: dict[Edge, int] = defaultdict(int)
    slots = dict.fromkeys(plan.edges, 0)
    for rank, position, action in causal_order(orders, plan.placement):
        if action.kind in RECEIVES:
            edge = edge_of(action)
            clock[rank] = list(map(max, clock[rank], in_flight[edge][arrived[edge]]))
            arrived[edge] += 1
        elif action.kind in SENDS:
            edge = edge_of(action)
            received = bisect_left(receives[edge], clock[rank][rank_of(edge.destination)])
            slots[edge] = max(slots[edge], len(in_flight[edge]) + 1 - received)
            clock[rank][rank] = position + 1
            in_flight[edge].append(clock[rank].copy())
    return slots


def _positions(order: tuple[Action, ...], edge: Edge) -> list[int]:
    return [p for p, action in enumerate(order) if action.kind in RECEIVES and edge_of(action) == edge]


def alive(plan: Plan) -> dict[Edge, int]:
    """Per edge the largest number of received messages in use at once at the consumer: each from its receive to the
    end of the micro-batch's B or W, which needs both the activation and the gradient (without a backward: of its F).
    The same for all timings."""
    last_users = {Kind.F} if plan.update == "never" else {Kind.W, Kind.B}
    held = dict.fromkeys(plan.edges, 0)
    peak = dict(held)
    for order in communicate(plan):
        for action in (part for outer in order for part in outer.each):
            stage = action.stage
            if action.kind in RECEIVES:
                edge = edge_of(action)
                held[edge] += 1
                peak[edge] = max(peak[edge], held[edge])
            elif action.kind in last_users:
                for edge in (Edge(stage - 1, stage, "activation"), Edge(stage + 1, stage, "gradient")):
                    if edge in held:
                        held[edge] -= 1
    return peak
