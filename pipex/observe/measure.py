"""Figures of a run, from the events of all its ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from statistics import median

from pipex.errors import InputError
from pipex.events import Event
from pipex.plan.actions import IN_ORDERS, Kind
from pipex.plan.bubbles import Bubbles, bubbles, busy_times
from pipex.plan.placement import Edge, Placement

ACTION_KINDS = {kind.value for kind in IN_ORDERS}


@dataclass(frozen=True)
class Figures:
    """Medians over the observed steps; times in seconds.

    Attributes:
        makespan, bubble_makespan, bubble_span: as of ``Bubbles``, of a step's actions.
        after_actions: from the last action's end to the end of the step's last event: reductions and the optimizer.
        action: time of one action by (kind, stage).
        overlap: the time of a pair whose parts ran at once, as a share of that of both parts together, each of which
            takes longer than alone; 1 if none did. What ``Costs.overlap`` is to be with these times of actions.
        stage: compute time of a whole step per stage.
        messages: for every message the time from both ends being ready to its tensors being usable.
        shares: per rank, by what it did, the share of the step's wall time; ``waiting`` is time in receives. Of
            what ran at once both count.
    """

    makespan: float
    after_actions: float
    bubble_makespan: float
    bubble_span: float
    action: dict[tuple[str, int], float]
    overlap: float
    stage: dict[int, float]
    messages: list[float]
    shares: list[dict[str, float]]


def measure(ranks: Sequence[Iterable[Event]], placement: Placement) -> Figures:
    """The figures of complete steps; ``ranks[r]`` are the events of rank r, which must share one clock. ``placement``:
    which rank held which stage.

    Raises:
        InputError: there is no complete step.
    """
    steps: dict[int, list[list[Event]]] = defaultdict(lambda: [[] for _ in ranks])
    for number, events in enumerate(ranks):
        for event in events:
            steps[event.step][number].append(event)
    courses: list[Bubbles] = []
    tails: list[float] = []
    actions: dict[tuple[str, int], list[float]] = defaultdict(list)
    stages: dict[int, list[float]] = defaultdict(list)
    overlaps: list[float] = []
    messages: list[float] = []
    shares: list[dict[str, list[float]]] = [defaultdict(list) for _ in ranks]
    for step in steps.values():
        compute = [[e for e in rank if e.kind in ACTION_KINDS] for rank in step]
        if not all(compute):
            continue
        courses.append(bubbles([_busy(rank) for rank in compute]))
        tails.append((max(e.end for rank in step for e in rank) - max(e.end for rank in compute for e in rank)) / 1e9)
        overlaps += chain.from_iterable(map(_overlaps, compute))
        per_stage: dict[int, float] = defaultdict(float)
        for rank in compute:
            for event in rank:
                actions[event.kind, event.stage].append((event.end - event.begin) / 1e9)
                per_stage[event.stage] += (event.end - event.begin) / 1e9
        for stage, seconds in per_stage.items():
            stages[stage].append(seconds)
        messages += chain.from_iterable(_messages(step, placement))
        for collected, rank in zip(shares, step, strict=True):
            for what, share in _shares(rank).items():
                collected[what].append(share)
    if not courses:
        raise InputError(
            "nothing to measure", got=f"{len(steps)} steps, none of them with actions on every rank",
            needed="the events of a whole step", fix="trace a run that trains for one step or more",
        )  # fmt: skip
    return Figures(
        makespan=median(course.makespan for course in courses) / 1e9,
        after_actions=median(tails),
        bubble_makespan=median(course.bubble_makespan for course in courses),
        bubble_span=median(course.bubble_span for course in courses),
        action={key: median(values) for key, values in actions.items()},
        overlap=median(overlaps) if overlaps else 1.0,
        stage={stage: median(values) for stage, values in sorted(stages.items())},
        messages=messages,
        shares=[{what: median(values) for what, values in rank.items()} for rank in shares],
    )


def message_waits(step: Sequence[Sequence[Event]], placement: Placement) -> list[float]:
    """Per rank the seconds of one step in which it waited for messages that their senders had handed over."""
    return [sum(rank) for rank in _messages(step, placement)]


def _messages(step: Sequence[Sequence[Event]], placement: Placement) -> list[list[float]]:
    """Per receiving rank. A message is under way from the later of its two begins (the send's, the receive's) to the
    receive's end."""

    def message(event: Event) -> tuple[Edge | None, int]:
        return placement.ends.get((event.stage, Kind(event.kind))), event.microbatch

    sends = {message(e): e for rank in step for e in rank if e.kind.startswith("SEND")}
    times: list[list[float]] = []
    for rank in step:
        times.append([])
        for event in rank:
            if event.kind in ("RECV_F", "RECV_B"):
                send = sends.get(message(event))
                if send is not None:  # none between stages of one rank
                    times[-1].append((event.end - max(send.begin, event.begin)) / 1e9)
    return times


_CALLED = {
    "RECV_F": "waiting", "RECV_B": "waiting", "SEND_F": "sending", "SEND_B": "sending", "UPDATE": "optimizer",
}  # fmt: skip
"""Kinds of event that count under another name."""


def _busy(events: Iterable[Event]) -> list[tuple[float, float]]:
    return busy_times([(event.begin, event.end) for event in events])


def _overlaps(compute: Sequence[Event]) -> Iterable[float]:
    """``Figures.overlap`` of each pair."""
    for one, other in pairwise(compute):
        if other.begin < one.end:
            wall = max(one.end, other.end) - min(one.begin, other.begin)
            yield wall / (one.end - one.begin + other.end - other.begin)


def _shares(events: Sequence[Event]) -> dict[str, float]:
    whole = max(e.end for e in events) - min(e.begin for e in events)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        what = _CALLED.get(event.kind, event.kind)
        seconds[what] += event.end - event.begin
    seconds["other"] = whole - sum(end - begin for begin, end in _busy(events))
    return {what: value / (whole or 1) for what, value in seconds.items()}
