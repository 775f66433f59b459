"""Sends and receives between the compute actions, and the buffers that they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pipex.plan.actions import parse_action
from pipex.plan.communication import alive, communicate, slots_needed
from pipex.plan.families import build
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan


def rows(*orders: str) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(parse_action(cell) for cell in order.split()) for order in orders)


def test_messages_stand_next_to_their_producer_and_their_user() -> None:
    assert communicate(build("zb-h1", 3, 1)) == rows(
        "0F0 0SEND_F0 0RECV_B0 0I0 0W0",
        "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1I0 1SEND_B0 1W0",
        "2RECV_F0 2F0 2I0 2SEND_B0 2W0",
    )
    assert communicate(build("1f1b", 2, 2)) == rows(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
    )


def test_stages_on_one_rank_exchange_no_messages() -> None:
    assert communicate(build("gpipe", 1, 2)) == build("gpipe", 1, 2).orders
    order = rows("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0")
    plan = Plan("v-by-hand", Placement("v", 2, 2), 1, order, (2, 2))
    assert communicate(plan) == rows(
        "0F0 0SEND_F0 3RECV_F0 3F0 3B0 3SEND_B0 0RECV_B0 0B0",
        "1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2B0 1B0 1SEND_B0",
    )


@pytest.mark.parametrize(
    ("family", "slots"),
    [("naive", [1, 1, 1, 1]), ("gpipe", [8, 8, 8, 8]), ("1f1b", [4, 2, 4, 2]), ("zb-h1", [4, 2, 4, 2])],
)
def test_slots_of_the_families(family: str, slots: list[int]) -> None:
    """4 ranks, 8 micro-batches. In 1f1b and zb-h1 rank s runs 4-s forwards before it waits for rank s+1, and at the
    end rank s+1 may be 4-s backwards ahead."""
    edges = [Edge(0, 1, "activation"), Edge(2, 3, "activation"), Edge(1, 0, "gradient"), Edge(3, 2, "gradient")]
    needed = slots_needed(build(family, 4, 8))
    assert [needed[edge] for edge in edges] == slots


def test_slots_of_the_families_equal_the_most_under_way_in_any_interleaving(
    small_plans: list[Plan], explore: Any
) -> None:
    for plan in small_plans:
        unused = dict.fromkeys(plan.edges, 0)  # those of gradients where there is no backward
        assert slots_needed(plan) == {**unused, **explore(plan).under_way}, plan.to_text()


def test_slots_of_arbitrary_plans_equal_the_most_under_way_in_any_interleaving(
    random_plans: list[Plan], explore: Any
) -> None:
    for plan in random_plans:
        assert slots_needed(plan) == explore(plan).under_way, plan.to_text()


@pytest.mark.parametrize(
    ("family", "activations", "gradients"), [("naive", 1, 1), ("gpipe", 8, 1), ("1f1b", 3, 1), ("zb-h1", 4, 2)]
)
def test_messages_in_use_at_the_second_of_four_ranks(family: str, activations: int, gradients: int) -> None:
    """zb-h1's rank 1 runs F0 F1 F2 I0 F3 I1 W0 ...: four activations before the first W, two gradients."""
    in_use = alive(build(family, 4, 8))
    assert in_use[Edge(0, 1, "activation")] == activations
    assert in_use[Edge(2, 1, "gradient")] == gradients


def test_messages_in_use_equal_a_count_over_the_orders(random_plans: list[Plan]) -> None:
    for plan in random_plans:
        expected = {}
        for edge in plan.edges:
            stage, begins = edge.destination, "F" if edge.kind == "activation" else "IB"
            order = [a for a in plan.orders[plan.placement.rank_of(stage)] if a.stage == stage]
            last = {a.microbatch: p for p, a in enumerate(order) if a.kind.value in "WB"}
            first = {a.microbatch: p for p, a in enumerate(order) if a.kind.value in begins}
            expected[edge] = max(sum(first[m] <= p <= last[m] for m in last) for p in range(len(order)))
        assert alive(plan) == expected, plan.to_text()


def test_the_order_in_which_a_plan_names_its_ranks_actions_is_kept() -> None:
    plan = build("zb-h1", 3, 4)
    bare = tuple(tuple(a for a in order if "_" not in a.kind.value) for order in communicate(plan))
    assert bare == plan.orders
    assert communicate(dataclasses.replace(plan, family="renamed")) == communicate(plan)
