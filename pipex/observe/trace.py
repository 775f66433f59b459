"""Chrome trace files (for Perfetto or chrome://tracing) of what really ran.

One process per rank, one thread each for compute, sends, receives and what was computed beside the action before it,
and an arrow per message. The ranges carry torch.distributed.pipelining's names (``PP:2F0``), so tools that know them
read these files too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from pipex.errors import InputError
from pipex.events import Event
from pipex.plan.actions import Kind
from pipex.plan.placement import Placement
from pipex.reading import read_file

_LARGEST = 1 << 28
"""Bytes of a file: a million actions."""
_MOST = 2**53
"""Microseconds, about three centuries: above it a float has no fractions, and a time no meaning."""
_KINDS = {kind.value for kind in Kind}
_THREADS = ("compute", "send", "receive", "compute at once")
_COLORS = {"F": "thread_state_running", "I": "rail_response", "W": "good", "B": "rail_animation"}


def write_trace(path: str | os.PathLike[str], ranks: Sequence[Iterable[Event]], placement: Placement) -> None:
    """Writes the events of all ranks to ``path``. ``placement``: which rank held which stage.

    Raises:
        InputError: the file cannot be written.
    """
    rows: list[dict[str, Any]] = []
    for rank, events in enumerate(ranks):
        rows.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for thread, name in enumerate(_THREADS):
            rows.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}})
        done = 0
        for event in events:
            row, *arrow = _rows(rank, event, placement)
            if row["tid"] == 0:
                row["tid"] = 3 if event.begin < done else 0  # slices of one thread must not overlap
                done = max(done, event.end)
            rows += [row, *arrow]
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": rows, "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise InputError(
            f"cannot write the trace {os.fspath(path)}", got=error.strerror, fix="choose another file"
        ) from error


def read_trace(path: str | os.PathLike[str]) -> list[list[Event]]:
    """Per rank the events of a file that ``write_trace`` made, in the order written. Nothing else is accepted.

    Raises:
        InputError: the file cannot be read, or is another kind of trace; names the place.
    """
    name = os.fspath(path)
    try:
        content = json.loads(read_file(path, _LARGEST).decode())
        if not isinstance(content, dict) or not isinstance(rows := content.get("traceEvents"), list):
            raise ValueError("no list traceEvents")
        return _read_rows(rows)
    except OSError as error:
        raise InputError(f"cannot read the trace {name}", got=error.strerror, fix="name another file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"cannot read the trace {name}", got=str(error), needed="a file made by pipex train --trace"
        ) from error


def _read_rows(rows: list[Any]) -> list[list[Event]]:
    ranks: dict[int, list[Event]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or row.get("ph") not in ("M", "X", "s", "f"):
            raise ValueError(f"traceEvents[{number}] is no row of such a file")
        if row["ph"] == "X":
            rank, event = _read_event(number, row)
            ranks.setdefault(rank, []).append(event)
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(f"events of the processes {_shown(sorted(ranks))} only, not of every rank from 0 on")
    return [ranks[rank] for rank in range(len(ranks))]


def _read_event(number: int, row: dict[str, Any]) -> tuple[int, Event]:
    def whole(values: dict[str, Any], name: str, least: int) -> int:
        value = values.get(name)
        if type(value) is not int or value < least:
            raise ValueError(f"{name} {_shown(value)} in traceEvents[{number}]")
        return value

    def nanoseconds(name: str) -> int:
        value = row.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < _MOST:
            raise ValueError(f"{name} {_shown(value)} in traceEvents[{number}]")
        return round(value * 1e3)

    args = row.get("args")
    kind = row.get("cat")
    if not isinstance(args, dict) or not isinstance(kind, str):
        raise ValueError(f"no cat or args in traceEvents[{number}]")
    begin = nanoseconds("ts")
    event = Event(
        step=whole(args, "step", 1),
        kind=kind,
        stage=whole(args, "stage", -1),
        microbatch=whole(args, "microbatch", -1),
        begin=begin,
        end=begin + nanoseconds("dur"),
    )
    if (event.kind in _KINDS) != (event.stage >= 0):  # a phase, such as the optimizer's, is of no stage
        raise ValueError(f"cat {_shown(kind)} with stage {event.stage} in traceEvents[{number}]")
    name = f"PP:{event.name}"
    if row.get("name") != name:
        got = f"name {_shown(row.get('name'))} in traceEvents[{number}]"
        raise ValueError(f"{got}, whose cat and args say {_shown(name)}")
    return whole(row, "pid", 0), event


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rows(rank: int, event: Event, placement: Placement) -> list[dict[str, Any]]:
    thread = 1 if event.kind.startswith("SEND") else 2 if event.kind.startswith("RECV") else 0
    row: dict[str, Any] = {
        "ph": "X", "name": f"PP:{event.name}", "cat": event.kind, "pid": rank, "tid": thread,
        "ts": event.begin / 1e3, "dur": (event.end - event.begin) / 1e3,
        "args": {"step": event.step, "stage": event.stage, "microbatch": event.microbatch},
    }  # fmt: skip
    if event.kind in _COLORS:
        row["cname"] = _COLORS[event.kind]
    edge = placement.ends.get((event.stage, Kind(event.kind))) if thread else None
    if edge is None:  # no message, or one between stages of one rank
        return [row]
    # Both ends of a message know its source stage, direction and micro-batch: that is the arrow's id.
    arrow = {
        "name": "message", "cat": "message", "pid": rank, "tid": thread,
        "id": f"{event.step}/{edge.source}{event.kind[-1]}{event.microbatch}",
    }  # fmt: skip
    if thread == 1:
        return [row, {"ph": "s", "ts": event.begin / 1e3, **arrow}]
    # Before the end: where begin and duration are added as floats, or cut to whole nanoseconds, as viewers do, the end
    # lies up to two nanoseconds outside of its slice.
    return [row, {"ph": "f", "bp": "e", "ts": max(event.begin, event.end - 3) / 1e3, **arrow}]
