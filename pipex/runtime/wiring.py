"""The edges of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import pipex.plan as plans
from pipex.plan import Orders, Plan
from pipex.transport.interface import EdgeSpec, Links, World
from pipex.transport.local import LocalEdge


def connect(world: World, digest: bytes, plan: Plan, orders: Orders, tied: Sequence[EdgeSpec]) -> Links:
    """Collective: opens all edges, in one global order; those between two stages of this rank are among the links.

    Args:
        world: the ranks.
        digest: of the plan that all ranks were given.
        plan: the plan as it runs, with nothing fused.
        orders: its orders, sends and receives included.
        tied: the edges of tied parameters.
    """
    specs = [*tied, *_edges(plan)]
    links = world.open([spec for spec in specs if spec.source_rank != spec.destination_rank], digest, orders)
    for spec in specs:
        if spec.source_rank == spec.destination_rank == world.rank:
            edge = spec.source, spec.destination, spec.kind
            links.senders[edge] = links.receivers[edge] = LocalEdge(spec, digest)
    return links


def _edges(plan: Plan) -> list[EdgeSpec]:
    slots, alive = plans.slots_needed(plan), plans.alive(plan)
    rank_of = plan.placement.rank_of
    return [
        EdgeSpec(*edge, rank_of(edge.source), rank_of(edge.destination), slots.get(edge, 1), alive.get(edge, 1))
        for edge in (*plan.edges, *plan.placement.edges_within_ranks)
    ]
