"""The text view: literal pictures, and lines that fit."""

from __future__ import annotations

import pytest

from pipex.plan.actions import parse_action
from pipex.plan.costs import Costs
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import simulate
from pipex.plan.validator import validate
from pipex.plan.versions import Update
from pipex.plan.view.text import plan_view, simulation_view


def test_a_plan_is_drawn_with_unit_times() -> None:
    assert plan_view(build("zb-h1", 2, 2)).splitlines() == [
        "rank 0 |F0 F1 ...I0 W0 I1 W1 ",
        "rank 1 |...F0 I0 F1 I1 W0 W1 ",
        "makespan 7; bubble 14.3% of the makespan, 14.3% of the span; peak memory 2 on rank 0",
    ]


def test_a_simulation_is_drawn_to_scale() -> None:
    plan = build("1f1b", 2, 1)
    costs = Costs.uniform(plan, forward=10, input_gradient=15, weight_gradient=5, hop=10)
    assert simulation_view(simulate(plan, costs)).splitlines() == [
        "rank 0 |F0 ...............B0--- ",
        "rank 1 |......F0 B0--- .........",
        "makespan 80; bubble 62.5% of the makespan, 62.5% of the span; peak memory 1 on rank 0",
    ]


def test_a_rank_with_several_stages_names_them() -> None:
    order = build("naive", 1, 1).orders[0]
    both = (order[0], order[0]._replace(stage=1), order[1]._replace(stage=1), order[1])
    plan = Plan("by-hand", Placement("loop", 1, 2), 1, (both,), (2,))
    assert plan_view(plan).splitlines()[0] == "rank 0 |0F0 1F0 1B0---- 0B0---- "


def test_labels_shrink_to_the_kind_where_there_is_no_room() -> None:
    lines = plan_view(build("1f1b", 2, 3), width=20).splitlines()
    assert lines[:2] == ["rank 0 |FF..B0FB1.B2", "rank 1 |.FB0FB1FB2.."]
    two_columns = plan_view(build("naive", 1, 11), width=8 + 2 * 33).splitlines()[0]
    assert two_columns.endswith("F9B9- F B10 ")  # not F1, which is another micro-batch


def by_hand(placement: Placement, *rows: str, microbatches: int, update: Update = "step") -> Plan:
    orders = tuple(tuple(map(parse_action, row.split(","))) for row in rows)
    plan = Plan("by-hand", placement, microbatches, orders, (9,) * len(rows), update)
    validate(plan)
    return plan


def test_a_fused_pair_shows_its_parts() -> None:
    plan = by_hand(
        Placement("bidirectional", 2, 2),
        "0F0,0F1,3F2,3B2,(3F3;0B0)OVERLAP_F_B,3B3,0B1",
        "2F2,2F3,1F0,1B0,(1F1;2B2)OVERLAP_F_B,1B1,2B3",
        microbatches=4,
    )
    assert plan_view(plan).splitlines()[:2] == [
        "rank 0 |0F0---- 0F1---- 3F2---- 3B2------------ 3F3+0B0---------------- 3B3------------ 0B1------------ ",
        "rank 1 |2F2---- 2F3---- 1F0---- 1B0------------ 1F1+2B2---------------- 1B1------------ 2B3------------ ",
    ]
    assert plan_view(plan, width=24).splitlines()[0] == "rank 0 |FFFB FB B B "


def test_forwards_alone_on_two_chunks() -> None:
    plan = by_hand(Placement("loop", 2, 2), "0F0,0F1,2F0,2F1", "1F0,1F1,3F0,3F1", microbatches=2, update="never")
    assert plan_view(plan).splitlines()[:2] == [
        "rank 0 |0F0 0F1 2F0 2F1 ....",
        "rank 1 |....1F0 1F1 3F0 3F1 ",
    ]


def test_a_wave_passes_a_rank_twice_in_a_row() -> None:
    plan = by_hand(Placement("wave", 2, 2), "0F0,3F0,3B0,0B0", "1F0,2F0,2B0,1B0", microbatches=1)
    assert plan_view(plan).splitlines()[:2] == [
        "rank 0 |0F0 ........3F0 3B0---- ................0B0---- ",
        "rank 1 |....1F0 2F0 ............2B0---- 1B0---- ........",
    ]


@pytest.mark.parametrize(
    ("family", "ranks", "microbatches"),
    [*((family, 4, 16) for family in FAMILIES), ("1f1b", 1, 1), ("gpipe", 11, 40), ("zb-h1", 32, 64)],
)
def test_lines_fit_the_width_and_are_equally_long(family: str, ranks: int, microbatches: int) -> None:
    plan = build(family, ranks, microbatches)
    for width in (40, 120):
        *lines, figures = plan_view(plan, width).splitlines()
        assert len(lines) == ranks
        assert len({len(line) for line in lines}) == 1
        assert len(lines[0]) <= width
        assert figures.startswith("makespan ")


def test_a_step_that_takes_no_time_is_drawn_empty() -> None:
    plan = build("gpipe", 2, 2)
    nothing = Costs.uniform(plan, 0, 0, 0)
    assert simulation_view(simulate(plan, nothing)).splitlines()[:2] == ["rank 0 |", "rank 1 |"]
