"""Families that go down the ranks and back up: zbv, v-half, v-min, dualpipev, hanayo.

Their orders against literal tables and torch's own, their times against published figures and closed forms.
"""

from __future__ import annotations

from functools import partial

import pytest
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

from pipex.errors import PlanError
from pipex.plan.actions import Kind
from pipex.plan.communication import unfused
from pipex.plan.costs import RankCosts
from pipex.plan.families import build
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, simulate
from pipex.plan.validator import validate

TABLES = {
    ("zbv", 3, 2, 2): """
        0F0 0F1 5F0 5I0 5W0 5F1 5I1 5W1 0I0 0W0 0I1 0W1
        1F0 1F1 4F0 4F1 4I0 4W0 4I1 4W1 1I0 1W0 1I1 1W1
        2F0 3F0 2F1 3F1 3I0 3W0 2I0 2W0 3I1 3W1 2I1 2W1
    """,
    ("v-half", 3, 4, 2): """
        0F0 0F1 0F2 5F0 5I0 5W0 5F1 5I1 5W1 0F3 0I0 0W0 5F2 5I2 5W2 0I1 0W1 5F3 5I3 0I2 5W3 0W2 0I3 0W3
        1F0 1F1 4F0 4F1 4I0 4W0 1F2 1I0 4I1 1W0 4F2 4W1 1F3 1I1 4I2 1W1 4F3 4W2 1I2 4I3 1W2 4W3 1I3 1W3
        2F0 3F0 2F1 3F1 3I0 3W0 2I0 2W0 2F2 3F2 3I1 2I1 3W1 2F3 2W1 3F3 3I2 2I2 3W2 2W2 3I3 2I3 3W3 2W3
    """,
    ("v-min", 4, 3, 2): """
        0F0 0F1 0F2 7F0 7I0 7W0 7F1 7I1 7W1 0I0 0W0 7F2 7I2 0I1 7W2 0W1 0I2 0W2
        1F0 1F1 6F0 6F1 6I0 6W0 1F2 6I1 6W1 1I0 1W0 6F2 1I1 6I2 1W1 6W2 1I2 1W2
        2F0 2F1 5F0 5F1 5I0 5W0 2F2 2I0 5I1 2W0 5W1 5F2 2I1 2W1 5I2 5W2 2I2 2W2
        3F0 4F0 3F1 4F1 4I0 3I0 4W0 3F2 3W0 4F2 4I1 3I1 4W1 3W1 4I2 3I2 4W2 3W2
    """,
    ("dualpipev", 2, 5, 2): """
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3+3B1 3F2+0B0 0F4+3B2 3F3+0B1 3B3 3F4+0B2 3B4 0I3 0W3 0I4 0W4
        1F0 2F0 1F1 2F1 1F2 2B0 2F2+1B0 1F3+2B1 2F3+1B1 1F4+2B2 2F4+1B2 2B3 1B3 2I4 1I4 2W4 1W4
    """,
    ("hanayo", 3, 3, 2): """
        0F0 0F1 0F2 5F0 5B0 5F1 5B1 5F2 5B2 0B0 0B1 0B2
        1F0 1F1 1F2 4F0 4F1 4B0 4F2 4B1 1B0 4B2 1B1 1B2
        2F0 3F0 2F1 3F1 2F2 3F2 3B0 2B0 3B1 2B1 3B2 2B2
    """,
    ("hanayo", 2, 3, 4): """
        0F0 0F1 0F2 3F0 4F0 3F1 4F1 7F0 7B0 7F1 7B1 4B0 3B0 4B1 3B1 0B0 0B1 3F2 4F2 7F2 7B2 4B2 3B2 0B2
        1F0 2F0 1F1 2F1 5F0 6F0 5F1 6F1 6B0 5B0 6B1 5B1 2B0 1B0 2B1 1B1 1F2 2F2 5F2 6F2 6B2 5B2 2B2 1B2
    """,
}


@pytest.mark.parametrize(("family", "ranks", "microbatches", "chunks"), TABLES)
def test_orders_equal_the_table(family: str, ranks: int, microbatches: int, chunks: int) -> None:
    expected = [row.split() for row in TABLES[family, ranks, microbatches, chunks].strip().splitlines()]
    plan = build(family, ranks, microbatches, chunks=chunks)
    assert [["+".join(map(str, action.each)) for action in order] for order in plan.orders] == expected


@pytest.mark.parametrize(("family", "torch_class"), [("zbv", ScheduleZBVZeroBubble), ("dualpipev", ScheduleDualPipeV)])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_orders_equal_those_of_torch(family: str, torch_class: type, ranks: int) -> None:
    for microbatches in range(2 * ranks if family == "dualpipev" else 1, 25):
        schedule = object.__new__(torch_class)  # the orders need none of what __init__ wants: modules, process groups
        schedule.pp_group_size, schedule.num_stages, schedule._n_microbatches = ranks, 2 * ranks, microbatches
        theirs = [filter(None, schedule._calculate_single_rank_operations(rank)) for rank in range(ranks)]
        plan = build(family, ranks, microbatches)
        assert [list(map(str, order)) for order in plan.orders] == [list(map(str, order)) for order in theirs]


EQUAL = {"forward": 1.0, "input_gradient": 1.0, "weight_gradient": 1.0}
REAL = {"forward": 100.0, "input_gradient": 100.0, "weight_gradient": 65.0, "hop": 2.0}


def simulated(plan: Plan, **costs: float) -> Simulation:
    return simulate(plan, RankCosts.of(plan.placement.ranks, **costs).on(plan.placement))


# (P, M): bubble of the makespan and of the span at F = I = W = 1, peak in micro-batches, then makespan (and span) at F,
# I, W, hop = 100, 100, 65, 2. Made with an independent simulator on the orders of torch and of the papers' authors.
SCOREBOARD = {
    ("zbv", 4, 8): (".0588", ".0000", 4, ".0767", ".0607"),
    ("zbv", 8, 32): (".0352", ".0000", 8, ".0468", ".0369"),
    ("zbv", 16, 64): (".0376", ".0000", 16, ".0502", ".0397"),
    ("dualpipev", 4, 8): (".0588", ".0588", 4.5, ".0965", ".0965"),
    ("dualpipev", 8, 32): (".0352", ".0352", 8.5, ".0587", ".0587"),
    ("dualpipev", 16, 64): (".0376", ".0376", 16.5, ".0631", ".0631"),
    ("v-half", 4, 8): (".0943", ".0943", 3, ".1525", ".1525"),
    ("v-half", 8, 32): (".0813", ".0813", 5, ".1151", ".1151"),
    ("v-half", 16, 64): (".0965", ".0965", 9, ".1314", ".1314"),
    ("v-min", 4, 8): (".1864", ".1864", 2, ".2963", ".2963"),
    ("v-min", 8, 32): (".1233", ".1233", 4, ".2501", ".2501"),
    ("v-min", 16, 64): (".1332", ".1332", 6, ".2612", ".2612"),
}


@pytest.mark.parametrize(("family", "ranks", "microbatches"), SCOREBOARD)
def test_bubbles_and_memory_are_those_of_the_scoreboard(family: str, ranks: int, microbatches: int) -> None:
    plan = unfused(build(family, ranks, microbatches))
    equal, real = simulated(plan, **EQUAL), simulated(plan, **REAL)
    bubbles = [equal.bubble_makespan, equal.bubble_span, real.bubble_makespan, real.bubble_span]
    shown = [f"{abs(bubble):.4f}"[1:] for bubble in bubbles]
    makespan, span, peak, real_makespan, real_span = SCOREBOARD[family, ranks, microbatches]
    assert shown == [makespan, span, real_makespan, real_span]
    assert max(equal.peak_memory) == peak


@pytest.mark.parametrize("ranks", range(1, 11))
def test_zbv_has_no_bubble_in_the_span_from_2p_minus_1_micro_batches_on(ranks: int) -> None:
    for microbatches in range(2 * ranks - 1, 2 * ranks + 4):
        result = simulated(build("zbv", ranks, microbatches), **EQUAL)
        assert result.makespan == 3 * microbatches + (ranks - 1) / 2
        assert result.bubble_span == pytest.approx(0, abs=1e-12)


def test_a_plan_without_the_last_micro_batches_of_zbv_is_still_zbv() -> None:
    """With M < 2P-1: the orders of 2P-1 micro-batches, as far as these are there."""
    full, short = build("zbv", 4, 7), build("zbv", 4, 3)
    for order, shorter in zip(full.orders, short.orders, strict=True):
        assert [action for action in order if action.microbatch < 3] == list(shorter)


def test_zbv_planned_with_real_costs_beats_the_published_order_in_as_much_memory() -> None:
    assert simulated(planned_zbv(8, 32), **REAL).bubble_makespan < 0.0443
    for ranks, microbatches in [(3, 2), (4, 8), (5, 9)]:
        published, planned = (simulated(p(ranks, microbatches), **REAL) for p in (partial(build, "zbv"), planned_zbv))
        assert planned.makespan <= published.makespan
        assert max(planned.peak_memory) <= max(published.peak_memory)


def test_zbv_keeps_a_limit_that_the_published_order_does_not() -> None:
    plan = planned_zbv(8, 32, memory=6)
    validate(plan)
    assert max(simulated(plan, **REAL).peak_memory) <= 6 < max(simulated(build("zbv", 8, 32), **REAL).peak_memory)


def planned_zbv(ranks: int, microbatches: int, memory: float | None = None) -> Plan:
    return build("zbv", ranks, microbatches, costs=RankCosts.of(ranks, **REAL), memory=memory)


@pytest.mark.parametrize("ranks", range(3, 13))
def test_v_half_and_v_min_take_the_times_of_their_closed_forms(ranks: int) -> None:
    half = (3 * ranks - 7) / 2 if ranks % 2 == 0 else (3 * ranks - 4) / 2
    least = 2 * ranks - 3.5 if ranks % 3 == 0 else 2 * ranks - 2.5
    for microbatches in (ranks, ranks + 1, 2 * ranks + 3):
        assert simulated(build("v-half", ranks, microbatches), **EQUAL).makespan == 3 * microbatches + half
        assert simulated(build("v-min", ranks, microbatches), **EQUAL).makespan == 3 * microbatches + least


# When the stages of a micro-batch in the middle of a long step start F, stage 0 first, then I, last stage first, in
# units of one F, counted from its first; by the offsets of arXiv 2405.15362 for 4 ranks, and for 3.
BLOCKS = {
    ("v-half", 4): ([0, 2, 4, 6, 7, 8, 9, 10], [14, 16, 18, 20, 22, 23, 24, 25]),
    ("v-half", 3): ([0, 2, 4, 5, 6, 7], [8, 10, 12, 14, 15, 16]),
    ("v-min", 4): ([0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]),
    ("v-min", 3): ([0, 1, 2, 3, 4, 5], [8, 9, 10, 11, 12, 13]),
}


@pytest.mark.parametrize(("family", "ranks"), BLOCKS)
def test_the_middle_of_a_long_step_is_the_papers_building_block(family: str, ranks: int) -> None:
    plan = build(family, ranks, 30)
    rows = simulated(plan, forward=2, input_gradient=2, weight_gradient=2).timeline
    start = {timed.action[:3]: timed.start for row in rows for timed in row}
    forwards, input_gradients = BLOCKS[family, ranks]
    stages = range(2 * ranks)
    for m in (14, 15):
        entry = start[0, Kind.F, m]
        assert [start[s, Kind.F, m] - entry for s in stages] == forwards
        assert [start[s, Kind.I, m] - entry for s in reversed(stages)] == input_gradients
        assert start[0, Kind.F, m + 1] - entry == 6  # F, I and W of two stages


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("overlap", [1, 0.9, 5 / 6])
def test_fused_dualpipev_waits_as_dualpipe_with_twice_the_ranks(ranks: int, overlap: float) -> None:
    """(PP/2-1)(F&B + B - 3W) of the DualPipe table, PP = 2P stages; here F = I = W = 1 for a stage, B = 2."""
    result = simulated(
        build("dualpipev", ranks, 4 * ranks), forward=2, input_gradient=2, weight_gradient=2, overlap=overlap
    )
    idle = [result.makespan - sum(end - start for _, start, end in row) for row in result.timeline]
    assert max(idle) == pytest.approx((ranks - 1) * (3 * overlap + 2 - 3))


@pytest.mark.parametrize(
    ("ranks", "percent"), [(4, {2: "33.3", 4: "21.3", 8: "11.9"}), (8, {2: "36.8", 4: "23.8", 8: "13.5"})]
)
def test_hanayo_has_the_bubble_of_greedy_list_scheduling(ranks: int, percent: dict[int, str]) -> None:
    """At M = P and I + W = 2F; the keys are chunks, two per wave."""
    found = {chunks: simulated(build("hanayo", ranks, ranks, chunks=chunks)).bubble_makespan for chunks in percent}
    assert {chunks: f"{100 * bubble:.1f}" for chunks, bubble in found.items()} == percent


@pytest.mark.parametrize("ranks", range(2, 17))
def test_waves_of_hanayo_divide_the_bubble(ranks: int) -> None:
    one_wave = simulated(build("hanayo", ranks, ranks)).makespan - 3 * ranks
    assert one_wave == 2 * (ranks - 1)
    for waves in (2, 3, 4):
        bubble = simulated(build("hanayo", ranks, ranks, chunks=2 * waves)).makespan - 3 * ranks
        assert one_wave / waves - 1e-9 <= bubble <= 10 / 9 * one_wave / waves + 1e-9


@pytest.mark.parametrize("chunks", [2, 4, 6])
def test_hanayo_gets_through_with_p_micro_batches_of_memory_however_many_there_are(chunks: int) -> None:
    for ranks in range(1, 6):
        for microbatches in (1, ranks, ranks + 1, 4 * ranks):
            plan = build("hanayo", ranks, microbatches, chunks=chunks)
            validate(plan)
            assert max(plan.peak_activations) == chunks * min(ranks, microbatches)


@pytest.mark.parametrize("family", ["zbv", "v-half", "v-min", "dualpipev", "hanayo"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_micro_batches_rise_and_the_promised_memory_is_held(family: str, ranks: int) -> None:
    """W and B, which add to the same gradients, rise together."""
    for microbatches in (2 * ranks, 2 * ranks + 1, 3 * ranks) if family == "dualpipev" else (1, ranks, 2 * ranks + 1):
        plan = build(family, ranks, microbatches)
        validate(plan)
        for order, promised in zip(plan.orders, plan.peak_activations, strict=True):
            last: dict[tuple[int, str], int] = {}
            held = [0]
            for stage, kind, m, _ in (part for action in order for part in action.each):
                held.append(held[-1] + {Kind.F: 1, Kind.I: 0}.get(kind, -1))
                for letter in "IW" if kind is Kind.B else kind.value:
                    assert last.get((stage, letter), -1) < m
                    last[stage, letter] = m
            assert max(held) == promised


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(PlanError, match="few micro-batches for dualpipev; got 7; needed at least 8, twice the ranks"):
        build("dualpipev", 4, 7)
    with pytest.raises(PlanError, match=r"chunks per rank for hanayo; got 3; needed an even .* such as 2 or 4"):
        build("hanayo", 4, 4, chunks=3)
    with pytest.raises(PlanError, match=r"chunks per rank for hanayo; got 1; needed an even .* such as 2$"):
        build("hanayo", 4, 4, chunks=1)
    for family in ("zbv", "v-half", "v-min", "dualpipev"):
        with pytest.raises(PlanError, match=f"wrong number of chunks per rank for {family}; got 3; needed 2"):
            build(family, 4, 8, chunks=3)
