"""What the views read off a simulated step: literal cases, and the simulator's own figures from another side."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipex.plan.actions import parse_action
from pipex.plan.communication import communicate, unfused
from pipex.plan.costs import Costs
from pipex.plan.families import FAMILIES, build
from pipex.plan.messages import Message, messages
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import simulate
from pipex.plan.view.course import memory_curve, under_way_curve, waits


def fused(pair: str) -> Plan:
    rows = (f"0F0,0F1,3F2,3B2,{pair},3B3,0B1", "2F2,2F3,1F0,1B0,(1F1;2B2)OVERLAP_F_B,1B1,2B3")
    orders = tuple(tuple(map(parse_action, row.split(","))) for row in rows)
    return Plan("by-hand", Placement("bidirectional", 2, 2), 4, orders, (9, 9))


FUSED = fused("(3F3;0B0)OVERLAP_F_B")


def test_every_message_with_its_ends_and_times() -> None:
    plan = build("1f1b", 2, 2)
    costs = Costs.uniform(plan, hop=0.5)
    up, down = Edge(0, 1, "activation"), Edge(1, 0, "gradient")
    # rank 0: F0 0-1, F1 1-2, B0 5-7, B1 8-10; rank 1: F0 1.5-2.5, B0 2.5-4.5, F1 4.5-5.5, B1 5.5-7.5
    assert messages(plan, costs, simulate(plan, costs)) == [
        Message(down, 0, (1, 1), (0, 2), 4.5, 5.0, 5.0),
        Message(down, 1, (1, 3), (0, 3), 7.5, 8.0, 8.0),
        Message(up, 0, (0, 0), (1, 0), 1.0, 1.5, 1.5),
        Message(up, 1, (0, 1), (1, 2), 2.0, 2.5, 4.5),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_as_many_messages_as_sends(family: str) -> None:
    plan = build(family, 4, 8)
    costs = Costs.uniform(plan, hop=0.25)
    sends = sum(action.kind.value.startswith("SEND") for order in communicate(plan) for action in order)
    found = messages(plan, costs, simulate(plan, costs))
    assert len(found) == sends
    assert all(message.sent + 0.25 == message.arrived <= message.taken for message in found)


def test_waiting_names_the_message_that_came_last() -> None:
    plan = build("1f1b", 2, 2)
    costs = Costs.uniform(plan, hop=0.5)
    simulation = simulate(plan, costs)
    found = waits(simulation, messages(plan, costs, simulation))
    assert {place: message.producer for place, message in found.items()} == {
        (1, 0): (0, 0),  # rank 1 begins idle
        (0, 2): (1, 1),
        (0, 3): (1, 3),
    }


@pytest.mark.parametrize("pair", ["(3F3;0B0)OVERLAP_F_B", "(0B0;3F3)OVERLAP_F_B"])
def test_of_two_messages_the_later_is_waited_for(pair: str) -> None:
    plan = fused(pair)
    costs = Costs.uniform(plan)
    slow = replace(costs, hop={**costs.hop, Edge(1, 0, "gradient"): 30.0})
    simulation = simulate(plan, slow)
    assert simulation.timeline[0][4].start == 35
    assert waits(simulation, messages(plan, slow, simulation))[0, 4].producer == (1, 3)  # 1B0, not 2F3
    simulation = simulate(plan, costs)
    assert (0, 4) not in waits(simulation, messages(plan, costs, simulation))  # both are there in time


def test_memory_rises_with_f_and_falls_with_i_and_w() -> None:
    plan = build("zb-h1", 1, 1)
    costs = Costs.uniform(plan, activation=5.0, deferred=2.0)
    assert memory_curve(plan, costs, simulate(plan, costs), 0) == [(0, 0), (0, 5), (2, 2), (3, 0)]


def test_a_fused_pair_holds_its_forward_beside_what_its_backward_frees() -> None:
    costs = Costs.uniform(FUSED)
    # F at 0, 1 and 2, 3B2 ends at 5, the pair runs from 5 to 8, then two backwards
    assert memory_curve(FUSED, costs, simulate(FUSED, costs), 0) == [
        (0, 0), (0, 1), (1, 2), (2, 3), (5, 2), (5, 3), (8, 2), (10, 1), (12, 0),
    ]  # fmt: skip


def test_a_fused_pair_frees_nothing_before_its_end() -> None:
    plan = fused("(0B0;3F3)OVERLAP_F_B")
    costs = replace(Costs.uniform(plan), activation=[5.0, 1.0, 1.0, 1.0])
    assert memory_curve(plan, costs, simulate(plan, costs), 0) == [
        (0, 0), (0, 5), (1, 10), (2, 11), (5, 10), (5, 11), (8, 6), (10, 5), (12, 0),
    ]  # fmt: skip


def test_a_forward_alone_holds_for_its_own_time() -> None:
    plan = build("forward-only", 1, 2)
    costs = Costs.uniform(plan)
    assert memory_curve(plan, costs, simulate(plan, costs), 0) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_curves_peak_where_the_simulator_says(random_plans: list[Plan]) -> None:
    plans = [*random_plans, FUSED, *(build(family, 4, 8) for family in FAMILIES)]
    for plan in plans:
        stages = range(plan.placement.stages)
        costs = Costs.uniform(plan, 3.0, 5.0, 2.0, hop=1.0)
        costs = replace(costs, activation=[2.0 + s % 3 for s in stages], deferred=[1.0] * len(stages))
        simulation = simulate(plan, costs)
        found = messages(plan, costs, simulation)
        for rank in range(plan.placement.ranks):
            curve = memory_curve(plan, costs, simulation, rank)
            assert max(held for _, held in curve) == simulation.peak_memory[rank]
            assert curve[-1][1] == 0
            assert [time for time, _ in curve] == sorted(time for time, _ in curve)
        if unfused(plan) == plan:  # a pair takes its first message earlier than it starts
            for edge, most in simulation.slots_used.items():
                assert max(n for _, n in under_way_curve(m for m in found if m.edge == edge)) == most


def test_messages_under_way_are_counted_from_sent_to_taken() -> None:
    plan = build("1f1b", 2, 2)
    costs = Costs.uniform(plan, hop=0.5)
    to_last = [m for m in messages(plan, costs, simulate(plan, costs)) if m.consumer[0] == 1]
    assert under_way_curve(to_last) == [(0, 0), (1, 1), (1.5, 0), (2, 1), (4.5, 0)]


def test_a_message_that_is_taken_at_once_is_never_under_way() -> None:
    plan = build("1f1b", 2, 2)
    costs = Costs.uniform(plan)
    to_last = [m for m in messages(plan, costs, simulate(plan, costs)) if m.consumer[0] == 1]
    assert under_way_curve(to_last) == [(0, 0), (2, 1), (4, 0)]  # F0 is taken at 1, F1 waits for B0
