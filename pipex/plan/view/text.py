"""A picture of a plan in text: one line per rank, time to the right, a dot where the rank is idle.

rank 0 |F0 F1 ..................B0----F2 ...
"""

from __future__ import annotations

from pipex.plan.actions import Kind
from pipex.plan.costs import Costs
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, TimedAction, simulate


def plan_view(plan: Plan, width: int = 120) -> str:
    """The plan when F, I and W take one unit each (B two) and hops nothing; see ``simulation_view``."""
    return simulation_view(simulate(plan, Costs.uniform(plan)), width)


def simulation_view(simulation: Simulation, width: int = 120) -> str:
    """A simulated step to scale, in lines of at most ``width`` characters, and a last line with its figures.

    An action shows kind and micro-batch (stage first, where a rank has several), the kind alone where that is too
    long; an OVERLAP_F_B shows its parts, as in ``F3+B0``. Actions narrower than a character hide each other. UPDATEs,
    which take no time, are not shown.
    """
    rows = [tuple(timed for timed in row if timed.action.kind is not Kind.UPDATE) for row in simulation.timeline]
    with_stage = any(len({part.stage for timed in row for part in timed.action.each}) > 1 for row in rows)
    heads = [f"rank {rank:>{len(str(len(rows) - 1))}} |" for rank in range(len(rows))]
    labels = [[_label(timed, with_stage) for timed in row] for row in rows]
    widest = 1 + max(len(label) for row in labels for label in row)
    scale = _scale(simulation, width - len(heads[0]), widest)
    lines = [head + _draw(row, names, scale) for head, row, names in zip(heads, rows, labels, strict=True)]
    total = round(simulation.makespan * scale) + len(heads[0])
    peak = max(simulation.peak_memory)
    fullest = simulation.peak_memory.index(peak)
    again = f"recomputation {simulation.recomputation:.1%}; " if simulation.recomputation else ""
    figures = (
        f"makespan {simulation.makespan:g}; bubble {simulation.bubble_makespan:.1%} of the makespan, "
        f"{simulation.bubble_span:.1%} of the span; {again}peak memory {peak:g} on rank {fullest}"
    )
    return "\n".join([*(line.ljust(total, ".") for line in lines), figures])


def _label(timed: TimedAction, with_stage: bool) -> str:
    each = timed.action.each
    return "+".join(f"{part.stage if with_stage else ''}{part.kind.value}{part.microbatch}" for part in each)


def _scale(simulation: Simulation, columns: int, widest: int) -> float:
    """Characters per unit of time: a whole number of them for the shortest action where there is room, so that equal
    actions look equal, and no more than the widest label needs."""
    durations = [end - start for row in simulation.timeline for _, start, end in row if end > start]
    if not durations:
        return 0.0
    shortest = min(durations)
    whole = int(columns * shortest / simulation.makespan)
    return min(whole, widest) / shortest if whole else columns / simulation.makespan


def _draw(row: tuple[TimedAction, ...], labels: list[str], scale: float) -> str:
    line = ""
    for (action, start, end), label in zip(row, labels, strict=True):
        first, last = round(start * scale), round(end * scale)
        room = last - first
        text = label if len(label) <= room else "".join(part.kind.value for part in action.each)
        line = line.ljust(first, ".") + text.ljust(room - 1, "-").ljust(room)[:room]
    return line
