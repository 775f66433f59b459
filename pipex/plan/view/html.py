"""A simulated plan as one page for a browser. It holds its script, its style and its data, and asks no network.

The page draws what can be seen of its data as SVG. Where actions are too narrow to be told apart it draws the share of
each kind per column, so that 100,000 actions stay quick to zoom. Its style is ``page.css``; its script is ``data.js``
(what is shown, and of what time), ``elements.js`` (what stands round the timeline), ``drawing.js`` and ``pointing.js``
(mouse and keyboard), in this order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from pipex.errors import InputError
from pipex.events import Event
from pipex.plan.costs import Costs
from pipex.plan.critical_path import critical_path
from pipex.plan.measured import MeasuredStep, typical_step
from pipex.plan.messages import messages
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, TimedAction, simulate
from pipex.plan.view.course import memory_curve, waits
from pipex.plan.view.text import simulation_view


def html_page(
    plan: Plan,
    costs: Costs,
    *,
    bound: tuple[float, str] | None = None,
    limit: Sequence[float] | None = None,
    trace: Sequence[Iterable[Event]] | None = None,
) -> str:
    """The page as text.

    Args:
        bound: what the makespan of no plan can be below, and why.
        limit: per rank the memory that it may hold, in the unit of the costs.
        trace: per rank the events of a measured run of this plan (``pipex.observe.read_trace``), to be drawn beside
            it. The times of ``costs`` are then seconds (``measured_costs``); without it they have any unit.

    Raises:
        InputError: the costs, the limit or the trace do not fit the plan.
        DeadlockError: the ranks wait for each other for ever.
    """
    ranks = plan.placement.ranks
    if limit is not None and len(limit) != ranks:
        raise InputError("wrong number of memory limits", got=len(limit), needed=f"{ranks}, one per rank")
    simulation = simulate(plan, costs)
    measured = None if trace is None else typical_step(plan, trace)
    data = {
        "stages": [plan.placement.stages_of(rank) for rank in range(ranks)],
        "seconds": measured is not None,
        "bound": None if bound is None else _short(bound[0]),
        "limit": None if limit is None else list(map(_short, limit)),
        "peak": list(map(_short, simulation.peak_memory)),
        "memory": [_memory(plan, costs, simulation, rank) for rank in range(ranks)],
        "planned": list(map(_row, simulation.timeline)),
        "measured": None if measured is None else list(map(_row, measured.timeline)),
        "waits": _waits(plan, costs, simulation),
        "critical": critical_path(plan, costs, simulation),
    }
    sizes = [
        _count(ranks, "rank"),
        _count(plan.placement.chunks, "chunk") + f" per rank (placement {plan.placement.name})",
        _count(plan.microbatches, "micro-batch", "es"),
    ]
    # No text can end the element that holds the data: "<" stands in it only as its escape.
    return _PAGE.format(
        title=escape(f"{plan.family}, {sizes[0]}, {sizes[2]}"),
        family=escape(plan.family),
        sizes=escape(" · ".join(sizes)),
        figures=_figures(simulation, bound, limit, measured),
        text=escape(simulation_view(simulation)),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        style=_file("page.css"),
        script="\n".join(map(_file, ("data.js", "elements.js", "drawing.js", "pointing.js"))),
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{family}</h1>
<p>{sizes}</p>
{figures}
</header>
<noscript><p>The timeline needs scripts; this is its text form.</p><pre>{text}</pre></noscript>
<main id="view"></main>
<script type="application/json" id="data">{data}</script>
<script type="module">
{script}</script>
</body>
</html>
"""  # noqa: E501 - a policy is one attribute


def _file(name: str) -> str:
    from importlib.resources import files  # slow to import, and who only plans needs no page

    return files("pipex.plan.view").joinpath(name).read_text(encoding="utf-8")


def _short(number: float) -> float:
    """Nine digits: more than a page can show, in half the bytes."""
    return float(f"{number:.9g}")


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"{number} {name}{'' if number == 1 else plural}"


def _row(row: Sequence[TimedAction]) -> dict[str, Any]:
    """One rank: its actions in the plan's own text form, and their times."""
    return {
        "actions": ",".join(str(timed.action) for timed in row),
        "start": [_short(timed.start) for timed in row],
        "end": [_short(timed.end) for timed in row],
    }


def _memory(plan: Plan, costs: Costs, simulation: Simulation, rank: int) -> dict[str, Any]:
    curve = memory_curve(plan, costs, simulation, rank)
    return {"time": [_short(time) for time, _ in curve], "held": [_short(held) for _, held in curve]}


def _waits(plan: Plan, costs: Costs, simulation: Simulation) -> list[dict[int, tuple[int, int]]]:
    """Per rank, by position, the producer of the message that an action waited for."""
    found: list[dict[int, tuple[int, int]]] = [{} for _ in simulation.timeline]
    for (rank, position), message in waits(simulation, messages(plan, costs, simulation)).items():
        found[rank][position] = message.producer
    return found


_Show = Callable[[float], str]
_MEANINGS = (
    ("makespan", "From the first start to the last end over all ranks."),
    ("span", "From a rank's own first start to its own last end; the longest."),
    (
        "bubble of the makespan",
        "Idle share of all ranks over the makespan: what a step pays that ends with all ranks waiting for each other.",
    ),
    (
        "bubble of the span",
        "Idle share of a rank over its own span, the largest: what a step pays when each rank begins the next one as "
        "soon as it is done.",
    ),
)


def _figures(
    simulation: Simulation,
    bound: tuple[float, str] | None,
    limit: Sequence[float] | None,
    measured: MeasuredStep | None,
) -> str:
    """The head's table: each figure, what was measured, and one sentence that says what it means."""
    time = _milliseconds if measured else _number
    shows: tuple[_Show, ...] = (time, time, _percent, _percent)
    lines = []
    for (name, meaning), show, planned, ran in zip(
        _MEANINGS, shows, _times(simulation), _times(measured or simulation), strict=True
    ):
        beside = (show(ran), _difference(planned, ran, show)) if measured else ()
        lines.append(((show(planned), *beside), name, meaning))
    nothing = ("", "") if measured else ()
    if simulation.recomputation:
        meaning = "Share of all ranks' time over the makespan in which they make again what they have made."
        lines.append(((_percent(simulation.recomputation), *nothing), "recomputation", meaning))
        meaning = "Bubble of the makespan and recomputation together: all that is no useful F, I or W."
        lines.append(((_percent(simulation.lost), *nothing), "lost", meaning))
    peak = max(simulation.peak_memory)
    rank = simulation.peak_memory.index(peak)
    allowed = "" if limit is None else f" (limit there {_number(limit[rank])})"
    meaning = f"The most that a rank holds at once: rank {rank}{allowed}."
    lines.append(((_number(peak), *nothing), "peak memory", meaning))
    if bound is not None:
        value, reason = bound
        above = f"{simulation.makespan / value - 1:.2%} above" if value else "none"
        lines.append(((above, *nothing), "distance to the bound", f"Lower bound {time(value)}: {reason}"))
    columns = ("", "planned", "measured", "difference", "")
    head = "<tr>" + "".join(f'<th scope="col">{name}</th>' for name in columns) + "</tr>" if measured else ""
    body = "\n".join(
        f'<tr><th scope="row">{name}</th>{_cells(values)}{_cells([meaning])}</tr>' for values, name, meaning in lines
    )
    table = f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    if measured is None:
        return table
    which = f"step {measured.number}, the one with the median makespan of {_count(measured.of, 'step')}"
    return f"{table}\n<p>Measured: {which}.</p>"


def _times(step: Simulation | MeasuredStep) -> tuple[float, float, float, float]:
    return step.makespan, step.span, step.bubble_makespan, step.bubble_span


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _number(value: float) -> str:
    return f"{value:.6g}"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.4g} ms"


def _percent(value: float) -> str:
    return f"{value:.2%}"


def _difference(planned: float, ran: float, show: _Show) -> str:
    """Shares differ in points, times in percent of the planned one."""
    if show is _percent:
        return f"{100 * (ran - planned):+.2f} points"
    return f"{ran / planned - 1:+.1%}" if planned else ""
