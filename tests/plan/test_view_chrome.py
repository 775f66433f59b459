"""The Chrome trace of a plan: its form, judged by rules of the format and of the viewers, and literal times."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest

from pipex.errors import InputError
from pipex.plan.actions import parse_action
from pipex.plan.communication import communicate
from pipex.plan.costs import Costs
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import simulate
from pipex.plan.view.chrome import chrome_trace

KEYS = {
    "M": {"ph", "name", "pid", "args"},
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"ph", "name", "pid", "ts", "args"},
    "s": {"ph", "name", "cat", "pid", "tid", "ts", "id"},
    "f": {"ph", "bp", "name", "cat", "pid", "tid", "ts", "id"},
}


def rows_of(plan: Plan, costs: Costs) -> list[dict[str, Any]]:
    """What a reader of the file gets."""
    trace = json.loads(json.dumps(chrome_trace(plan, costs), allow_nan=False))
    assert trace.keys() == {"traceEvents", "displayTimeUnit"}
    return trace["traceEvents"]  # type: ignore[no-any-return]


def nanoseconds(microseconds: float) -> int:
    """As Perfetto turns numbers of a file into its own: cut off, not rounded."""
    return int(microseconds * 1000.0)


def check(plan: Plan, costs: Costs) -> None:
    rows = rows_of(plan, costs)
    ranks = plan.placement.ranks
    slices: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    counters: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        extra = {"tid"} if row["name"] == "thread_name" else set()
        assert row.keys() == KEYS[row["ph"]] | extra
        assert 0 <= row["pid"] < ranks
        match row["ph"]:
            case "X":
                begin = nanoseconds(row["ts"])
                slices[row["pid"]].append((begin, begin + nanoseconds(row["dur"]), row["name"]))
            case "C":
                (value,) = row["args"].values()
                counters[row["pid"], row["name"]].append((row["ts"], value))
            case "s" | "f":
                assert row["ph"] not in flows[row["id"]]
                flows[row["id"]][row["ph"]] = row

    for rank, order in enumerate(plan.orders):
        assert [name for _, _, name in slices[rank]] == [f"PP:{action}" for action in order]
        for (begin, end, _), (after, _, _) in zip(slices[rank], slices[rank][1:], strict=False):
            assert begin <= end <= after  # else a viewer nests one in the other, or drops it

    peaks = simulate(plan, costs).peak_memory
    assert counters.keys() == {(rank, name) for rank in range(ranks) for name in ("memory", "messages under way")}
    for (rank, name), values in counters.items():
        times = [time for time, _ in values]
        assert times == sorted(times)
        assert min(value for _, value in values) == 0
        assert values[-1][1] == 0
        if name == "memory":
            assert max(value for _, value in values) == peaks[rank]

    sends = [
        (rank, f"{a.stage}{a.kind.value[-1]}{a.microbatch}")
        for rank, order in enumerate(communicate(plan))
        for a in order
        if a.kind.value.startswith("SEND")
    ]
    assert len(flows) == len(sends)
    ends_at_source = []
    for ends in flows.values():
        start, finish = ends["s"], ends["f"]
        assert start["ts"] <= finish["ts"]
        assert start["name"] == finish["name"] in ("activation", "gradient")
        source = enclosing(slices[start["pid"]], nanoseconds(start["ts"]))
        target = enclosing(slices[finish["pid"]], nanoseconds(finish["ts"]))
        assert nanoseconds(finish["ts"]) == target[0]  # the arrow ends where the action begins
        ends_at_source.append((start["pid"], source[2]))
        parts = [(a.stage, a.microbatch) for name in (source, target) for a in parse_action(name[2][3:]).each]
        step = 1 if start["name"] == "activation" else -1
        assert any((stage + step, microbatch) in parts for stage, microbatch in parts)
    for rank, order in enumerate(plan.orders):
        for action in order:
            if not action.parts:
                letter = "B" if action.kind.value == "I" else action.kind.value
                sent = (rank, f"{action.stage}{letter}{action.microbatch}") in sends
                assert ends_at_source.count((rank, f"PP:{action}")) == sent


def enclosing(slices: list[tuple[int, int, str]], time: int) -> tuple[int, int, str]:
    (found,) = [each for each in slices if each[0] <= time < each[1]]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", [1e-5, 1 / 3])
def test_every_family_gives_a_sound_trace(family: str, unit: float) -> None:
    plan = build(family, 4, 8)
    check(plan, Costs.uniform(plan, unit, 1.3 * unit, 0.7 * unit, hop=unit / 7))


def test_odd_orders_give_a_sound_trace(random_plans: list[Plan]) -> None:
    for plan in random_plans[:100]:
        check(plan, Costs.uniform(plan, 0.1, 0.3, 0.2, hop=0.01))


def test_a_fused_pair_is_one_slice_with_the_messages_of_both_parts() -> None:
    rows = ("0F0,0F1,3F2,3B2,(3F3;0B0)OVERLAP_F_B,3B3,0B1", "2F2,2F3,1F0,1B0,(1F1;2B2)OVERLAP_F_B,1B1,2B3")
    orders = tuple(tuple(map(parse_action, row.split(","))) for row in rows)
    plan = Plan("by-hand", Placement("bidirectional", 2, 2), 4, orders, (9, 9))
    check(plan, Costs.uniform(plan, hop=0.5))
    pair = next(row for row in rows_of(plan, Costs.uniform(plan)) if row.get("cat") == "OVERLAP_F_B")
    assert pair["args"] == {"parts": ["3F3", "0B0"]}


def test_times_are_microseconds_of_costs_in_seconds() -> None:
    plan = build("1f1b", 2, 1)
    rows = rows_of(plan, Costs.uniform(plan, 0.001, 0.002, 0.001, hop=0.0005, activation=7.0))
    assert [row for row in rows if row["ph"] in "Xsf"] == [
        {"ph": "X", "name": "PP:0F0", "cat": "F", "pid": 0, "tid": 0, "ts": 0.0, "dur": 1000.0,
         "args": {"stage": 0, "microbatch": 0}},
        {"ph": "X", "name": "PP:0B0", "cat": "B", "pid": 0, "tid": 0, "ts": 6000.0, "dur": 3000.0,
         "args": {"stage": 0, "microbatch": 0}},
        {"ph": "X", "name": "PP:1F0", "cat": "F", "pid": 1, "tid": 0, "ts": 1500.0, "dur": 1000.0,
         "args": {"stage": 1, "microbatch": 0}},
        {"ph": "X", "name": "PP:1B0", "cat": "B", "pid": 1, "tid": 0, "ts": 2500.0, "dur": 3000.0,
         "args": {"stage": 1, "microbatch": 0}},
        {"ph": "s", "pid": 1, "ts": 5499.875, "name": "gradient", "cat": "message", "tid": 0, "id": 0},
        {"ph": "f", "bp": "e", "pid": 0, "ts": 6000.0, "name": "gradient", "cat": "message", "tid": 0, "id": 0},
        {"ph": "s", "pid": 0, "ts": 999.875, "name": "activation", "cat": "message", "tid": 0, "id": 1},
        {"ph": "f", "bp": "e", "pid": 1, "ts": 1500.0, "name": "activation", "cat": "message", "tid": 0, "id": 1},
    ]  # fmt: skip
    counts = [(row["pid"], row["name"], row["ts"], *row["args"].values()) for row in rows if row["ph"] == "C"]
    assert counts == [
        (0, "memory", 0, 0), (0, "memory", 0, 7), (0, "memory", 9000, 0),
        (0, "messages under way", 0, 0), (0, "messages under way", 5500, 1), (0, "messages under way", 6000, 0),
        (1, "memory", 0, 0), (1, "memory", 1500, 7), (1, "memory", 5500, 0),
        (1, "messages under way", 0, 0), (1, "messages under way", 1000, 1), (1, "messages under way", 1500, 0),
    ]  # fmt: skip
    assert [(row["pid"], row["name"], row["args"]) for row in rows if row["ph"] == "M"][:3] == [
        (0, "process_name", {"name": "rank 0"}),
        (0, "process_sort_index", {"sort_index": 0}),
        (0, "thread_name", {"name": "compute"}),
    ]


def test_costs_of_another_plan_are_refused() -> None:
    with pytest.raises(InputError, match="wrong number of costs forward; got 2; needed 3"):
        chrome_trace(build("1f1b", 3, 1), Costs.uniform(build("1f1b", 2, 1)))
