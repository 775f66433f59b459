"""The edges of a pipeline."""

from __future__ import annotations

import pipex.plan as plans
from pipex.layout import Layout
from pipex.plan import Orders, Plan
from pipex.transport.interface import EdgeSpec, Links, World
from pipex.transport.local import LocalEdge


def connect(world: World, layout: Layout, plan: Plan, orders: Orders) -> Links:
    """Collective: opens all edges, in one global order; those between two stages of this rank are among the links.

    Args:
        world: the ranks.
        layout: of the plan that all ranks were given.
        plan: the plan as it runs.
        orders: its orders, sends and receives included.
    """
    digest, rank_of = plan.digest, layout.rank_of
    specs = [EdgeSpec(s, d, "tied", rank_of(s), rank_of(d), slots=1, alive=1) for s, d in layout.tied_edges]
    specs += _edges(plan)
    orders = tuple(tuple(p for action in order for p in action.each) for order in orders)  # a part names its rank
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
