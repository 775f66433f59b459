"""Trace files: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipex.errors import InputError
from pipex.observe import Event, read_trace, write_trace
from pipex.plan import Placement

# Clocks count from the start of the machine: three months of nanoseconds still come back to the last one.
ZERO = 90 * 24 * 3600 * 10**9 + 123_456_789
RANKS = [
    [
        Event(3, "F", 0, 0, ZERO, ZERO + 1001),
        Event(3, "SEND_F", 0, 0, ZERO + 1002, ZERO + 1003),
        Event(3, "RECV_B", 0, 0, ZERO + 1010, ZERO + 3000),
        Event(3, "B", 0, 0, ZERO + 3000, ZERO + 5001),
        Event(3, "optimizer", -1, -1, ZERO + 5007, ZERO + 5007),
    ],
    [
        Event(3, "RECV_F", 1, 0, ZERO, ZERO + 1100),
        Event(3, "F", 1, 0, ZERO + 1100, ZERO + 2000),
        Event(3, "B", 1, 0, ZERO + 2000, ZERO + 2900),
        Event(3, "SEND_B", 1, 0, ZERO + 2900, ZERO + 2950),
    ],
]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", RANKS, Placement("loop", 2))
    assert read_trace(tmp_path / "trace.json") == RANKS


def test_what_was_computed_at_once_is_on_another_track(tmp_path: Path) -> None:
    """Slices of one track of such a file must lie within each other or apart."""
    kinds = [("F", 0, 10, 100), ("F", 1, 100, 300), ("B", 0, 150, 400), ("F", 2, 400, 600), ("B", 1, 400, 500)]
    events = [Event(1, kind, 0, microbatch, begin * 1000, end * 1000) for kind, microbatch, begin, end in kinds]
    write_trace(tmp_path / "trace.json", [events], Placement("loop", 1))
    assert read_trace(tmp_path / "trace.json") == [events]
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(row["name"], row["tid"]) for row in rows if row["ph"] == "X"] == [
        ("PP:0F0", 0), ("PP:0F1", 0), ("PP:0B0", 3), ("PP:0F2", 0), ("PP:0B1", 3)
    ]  # fmt: skip
    assert any(row["name"] == "thread_name" and row["tid"] == 3 for row in rows)


def whole_nanoseconds(microseconds: float) -> int:
    return int(microseconds * 1000)  # cut off, as viewers do


@pytest.mark.parametrize("read", [float, whole_nanoseconds])
def test_both_ends_of_every_arrow_lie_in_a_slice_of_their_track(read: Callable[[float], float], tmp_path: Path) -> None:
    chance = random.Random(1)
    ranks: list[list[Event]] = [[], []]
    at = ZERO
    for microbatch in range(500):
        for rank, (sends, receives) in enumerate((("SEND_F", "RECV_B"), ("SEND_B", "RECV_F"))):
            for kind in (receives, sends):
                duration = chance.choice((0, 1, 2, 3, 4, 5, chance.randrange(10**7)))
                ranks[rank].append(Event(1, kind, rank, microbatch, at, at + duration))
                at += duration + chance.randrange(10**4)
    write_trace(tmp_path / "trace.json", ranks, Placement("loop", 2))
    assert read_trace(tmp_path / "trace.json") == ranks
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = {(row["pid"], row["tid"], row["args"]["microbatch"]): row for row in rows if row["ph"] == "X"}
    arrows = [row for row in rows if row["ph"] in "sf"]
    assert len(arrows) == 2000
    for row in arrows:
        microbatch = int(row["id"].rpartition("F" if "F" in row["id"] else "B")[2])
        around = slices[row["pid"], row["tid"], microbatch]
        begin = read(around["ts"])
        assert begin <= read(row["ts"]) <= begin + read(around["dur"]), row


SLICE = {
    "ph": "X", "name": "PP:0F0", "cat": "F", "pid": 0, "tid": 0, "ts": 1.5, "dur": 2.5,
    "args": {"step": 1, "stage": 0, "microbatch": 0},
}  # fmt: skip


def test_reads_this_slice(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [SLICE]}))
    assert read_trace(tmp_path / "trace.json") == [[Event(1, "F", 0, 0, 1500, 4000)]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ph": "B"}, r"traceEvents\[0\] is no row of such a file"),
        ({"name": "PP:0F1"}, r"name 'PP:0F1' in traceEvents\[0\], whose cat and args say 'PP:0F0'"),
        ({"name": None}, "name None"),
        ({"cat": 7}, "no cat or args"),
        ({"args": []}, "no cat or args"),
        ({"args": {"step": 0, "stage": 0, "microbatch": 0}}, "step 0"),
        ({"args": {"step": True, "stage": 0, "microbatch": 0}}, "step True"),
        ({"args": {"step": 1, "stage": -2, "microbatch": 0}}, "stage -2"),
        (
            {"args": {"step": 1, "stage": -1, "microbatch": -1}, "name": "PP:F"},
            r"cat 'F' with stage -1 in traceEvents\[0\]",
        ),
        ({"cat": "SENDX", "name": "PP:0SENDX0"}, r"cat 'SENDX' with stage 0 in traceEvents\[0\]"),
        ({"cat": "reduce", "name": "PP:0reduce0"}, "cat 'reduce' with stage 0"),
        ({"args": {"step": 1, "stage": 0}}, "microbatch None"),
        ({"args": {"step": 1, "stage": 0.0, "microbatch": 0}}, "stage 0.0"),
        ({"pid": 1}, r"events of the processes \[1\] only, not of every rank from 0 on"),
        ({"pid": -1}, "pid -1"),
        ({"pid": "0"}, "pid '0'"),
        ({"ts": -1}, "ts -1"),
        ({"ts": "1.5"}, "ts '1.5'"),
        ({"ts": True}, "ts True"),
        ({"dur": -0.5}, "dur -0.5"),
        ({"dur": 10**400}, r"dur 10{56}\.\.\. in"),
        ({"dur": None}, "dur None"),
    ],
)
def test_a_slice_that_is_none_of_ours_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [{**SLICE, **change}]}))
    with pytest.raises(InputError, match=message) as caught:
        read_trace(tmp_path / "trace.json")
    assert "needed a file made by pipex train --trace" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"traceEvents": {}}', b'{"traceEvents": [1]}', b"\xff\xfe", b"[" * 100_000,
     json.dumps({"traceEvents": [SLICE]}).replace("2.5", "NaN").encode(),
     json.dumps({"traceEvents": [SLICE]}).replace("2.5", "1e999").encode()],
)  # fmt: skip
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot read the trace .*trace\.json; got "):
        read_trace(tmp_path / "trace.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the trace .*none\.json; got No such file"):
        read_trace(tmp_path / "none.json")
