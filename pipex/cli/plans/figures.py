"""What a plan costs: one JSON object, and the same for people."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from pipex.plan import CostModel, Costs, Plan, Simulation, bounds, simulate, simulation_view


def figures(
    plan: Plan,
    costs: CostModel,
    *,
    limit: Sequence[float] | None,
    seconds: float,
    plan_file: str | None = None,
) -> tuple[dict[str, Any], Simulation]:
    """The figures of ``plan`` under ``costs``, and the simulation behind them. ``over_limit`` lists the ranks that hold
    more than the limit.

    Args:
        limit: memory per rank, in the unit of the costs; None for any.
        seconds: what it took to find the plan.
        plan_file: where it was written.
    """
    stage_costs = costs.on(plan.placement)
    simulation = simulate(plan, stage_costs)
    slack = bounds.SLACK
    over = [] if limit is None else [r for r, most in enumerate(limit) if simulation.peak_memory[r] > most * slack]
    kept = None if over else limit  # nothing bounds a plan that breaks the limit but what holds without one
    bound = bound_of(plan, stage_costs, kept)
    # A bound is a bound; only the rounding of two different sums can put it above.
    least = simulation.makespan if 0 < bound.value / (simulation.makespan or 1) - 1 < 1e-9 else bound.value
    found = {
        "family": plan.family,
        "chunks": plan.placement.chunks,
        "makespan": simulation.makespan,
        "span": simulation.span,
        "bubble_makespan": simulation.bubble_makespan,
        "bubble_span": simulation.bubble_span,
        "bound_makespan": least,
        "recomputation": simulation.recomputation,
        "lost": simulation.lost,
        "activations": activations(plan),
        "peak_memory": list(simulation.peak_memory),
        "limit": None if limit is None else list(limit),
        "over_limit": over,
        "seconds": seconds,
        "plan_file": plan_file,
    }
    return found, simulation


def bound_of(plan: Plan, costs: Costs, limit: Sequence[float] | None) -> bounds.Bound:
    """What no plan of the same sizes can go below that recomputes and offloads the same stages."""
    spared = costs.spared(plan.recomputed, plan.offloaded)
    return bounds.makespan_bound(plan.placement, plan.microbatches, spared, limit, plan.update)


def activations(plan: Plan) -> list[str]:
    """Per stage what becomes of an activation between F and I."""
    found = ["held"] * plan.placement.stages
    for name, stages in (("recomputed", plan.recomputed), ("offloaded", plan.offloaded)):
        for stage in stages:
            found[stage] = name
    return found


def picture(simulation: Simulation) -> str:
    """The step as wide as the terminal, and a word where that is too narrow to show every action."""
    columns = shutil.get_terminal_size().columns
    text = simulation_view(simulation, columns)
    if max(map(len, simulation.timeline)) > columns:
        text += "\nActions share characters here; a wider terminal, or the page of `pipex view --html`, shows them all."
    return text
