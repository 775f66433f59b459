"""Chrome trace files (for Perfetto or chrome://tracing) of what really ran.

One process per rank, one thread each for compute, sends and receives, and an arrow per message. The ranges carry
torch.distributed.pipelining's names (``PP:2F0``), so tools that know them read these files too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from pipex.errors import InputError
from pipex.observe.events import Event

_THREADS = ("compute", "send", "receive")
_COLORS = {"F": "thread_state_running", "I": "rail_response", "W": "good", "B": "rail_animation"}


def write_trace(path: str | os.PathLike[str], ranks: Sequence[Iterable[Event]]) -> None:
    """Writes the events of all ranks to ``path``.

    Raises:
        InputError: the file cannot be written.
    """
    rows: list[dict[str, Any]] = []
    for rank, events in enumerate(ranks):
        rows.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for thread, name in enumerate(_THREADS):
            rows.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": thread, "args": {"name": name}})
        for event in events:
            rows.extend(_rows(rank, event))
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": rows, "displayTimeUnit": "ms"}, file)
    except OSError as error:
        raise InputError(
            f"cannot write the trace {os.fspath(path)}", got=error.strerror, fix="choose another file"
        ) from error


def _rows(rank: int, event: Event) -> list[dict[str, Any]]:
    thread = 1 if event.kind.startswith("SEND") else 2 if event.kind.startswith("RECV") else 0
    row: dict[str, Any] = {
        "ph": "X", "name": f"PP:{event.name}", "cat": event.kind, "pid": rank, "tid": thread,
        "ts": event.begin / 1e3, "dur": (event.end - event.begin) / 1e3,
        "args": {"step": event.step, "stage": event.stage, "microbatch": event.microbatch},
    }  # fmt: skip
    if event.kind in _COLORS:
        row["cname"] = _COLORS[event.kind]
    if thread == 0:
        return [row]
    # Both ends of a message know its source stage, direction and micro-batch: that is the arrow's id.
    source = event.stage if thread == 1 else event.stage + (-1 if event.kind == "RECV_F" else 1)
    arrow = {
        "name": "message", "cat": "message", "pid": rank, "tid": thread,
        "id": f"{event.step}/{source}{event.kind[-1]}{event.microbatch}",
    }  # fmt: skip
    if thread == 1:
        return [row, {"ph": "s", "ts": event.begin / 1e3, **arrow}]
    return [row, {"ph": "f", "bp": "e", "ts": event.end / 1e3, **arrow}]
