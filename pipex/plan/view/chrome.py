"""A simulated plan as a Chrome trace, for Perfetto or chrome://tracing.

One process per rank with its actions, its copies to host memory and back, an arrow per message, and two counters: what
the rank holds, and how many messages for it are sent but not taken. Ranges are named as in a measured trace
(``PP:2F0``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipex.plan.costs import Costs
from pipex.plan.messages import Message, messages
from pipex.plan.offload import TimedCopy
from pipex.plan.plan import Plan
from pipex.plan.simulator import TimedAction, simulate
from pipex.plan.view.course import memory_curve, under_way_curve

_TICK = 0.125  # µs


def chrome_trace(plan: Plan, costs: Costs) -> dict[str, Any]:
    """The trace as the object that ``json.dump`` writes. The times of ``costs`` count as seconds.

    Raises:
        InputError: the costs do not fit the plan.
        DeadlockError: the ranks wait for each other for ever.
    """
    simulation = simulate(plan, costs)
    all_messages = messages(plan, costs, simulation)
    rows: list[dict[str, Any]] = []
    for rank, row in enumerate(simulation.timeline):
        rows += [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}},
            {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}},
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": 0, "args": {"name": "compute"}},
        ]
        rows += [_slice(rank, timed) for timed in row]
        rows += _copies(rank, simulation.copies[rank])
        rows += [
            {"ph": "C", "name": "memory", "pid": rank, "ts": _microseconds(time), "args": {"held": amount}}
            for time, amount in memory_curve(plan, costs, simulation, rank)
        ]
        to_rank = [message for message in all_messages if message.consumer[0] == rank]
        rows += [
            {"ph": "C", "name": "messages under way", "pid": rank, "ts": _microseconds(time), "args": {"messages": n}}
            for time, n in under_way_curve(to_rank)
        ]
    for number, message in enumerate(all_messages):
        rank, position = message.producer
        rows += _arrow(number, message, simulation.timeline[rank][position])
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _microseconds(seconds: float) -> float:
    """Whole multiples of an eighth of a microsecond. Viewers turn these numbers into whole nanoseconds by cutting off,
    start and duration each by itself; an eighth survives that exactly, so no action reaches into the next."""
    return round(seconds * 1e6 / _TICK) * _TICK


def _slice(rank: int, timed: TimedAction) -> dict[str, Any]:
    action, start, end = timed
    stage, _, microbatch, _ = action
    args = {"parts": list(map(str, action.parts))} if action.parts else {"stage": stage, "microbatch": microbatch}
    ts = _microseconds(start)
    return {
        "ph": "X", "name": f"PP:{action}", "cat": action.kind.value, "pid": rank, "tid": 0,
        "ts": ts, "dur": _microseconds(end) - ts, "args": args,
    }  # fmt: skip


def _copies(rank: int, copies: Sequence[TimedCopy]) -> list[dict[str, Any]]:
    """The copy streams, each a thread of its own."""
    rows: list[dict[str, Any]] = []
    for tid, name in enumerate(("copy out", "copy back"), start=1) if copies else ():
        rows.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}})
        for copy in copies:
            start, end = (copy.out_start, copy.out_end) if tid == 1 else (copy.back_start, copy.back_end)
            ts = _microseconds(start)
            rows.append({
                "ph": "X", "name": f"{name} {copy.stage} {copy.microbatch}", "cat": "copy", "pid": rank, "tid": tid,
                "ts": ts, "dur": _microseconds(end) - ts,
                "args": {"stage": copy.stage, "microbatch": copy.microbatch},
            })  # fmt: skip
    return rows


def _arrow(number: int, message: Message, producer: TimedAction) -> list[dict[str, Any]]:
    """Its two ends. A flow belongs to the action that is open at its time, so it leaves just before the end."""
    begin, end = _microseconds(producer.start), _microseconds(producer.end)
    common = {"name": message.edge.kind, "cat": "message", "tid": 0, "id": number}
    return [
        {"ph": "s", "pid": message.producer[0], "ts": max(begin, end - _TICK), **common},
        {"ph": "f", "bp": "e", "pid": message.consumer[0], "ts": _microseconds(message.taken), **common},
    ]
