"""The proof of a plan: what is wrong is refused, what is right passes. Mutants: ``test_mutants``."""

from __future__ import annotations

from typing import Any

import pytest

from pipex.errors import DeadlockError, PlanError
from pipex.plan.actions import parse_action
from pipex.plan.communication import slots_needed
from pipex.plan.families import build
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan
from pipex.plan.validator import validate


def plan_of(*orders: str, placement: Placement | None = None, microbatches: int = 1, peak: int = 99) -> Plan:
    rows = tuple(tuple(parse_action(cell) for cell in order.split()) for order in orders)
    placement = placement or Placement("loop", len(rows))
    return Plan("by-hand", placement, microbatches, rows, (peak,) * len(rows))


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (plan_of("0F0 0SEND_F0 0B0"), r"rank 0 at position 1 \(0SEND_F0\) is no compute action"),
        (plan_of("0F0 1F0 0B0"), r"rank 0 at position 1 \(1F0\) names a stage that is not there; got 1; needed 0 to 0"),
        (plan_of("0F0 0F1 0B0"), r"rank 0 at position 1 \(0F1\) names a micro-batch that is not there; got 1"),
        (
            plan_of("0F0 0B0", "0F0 1B0"),
            r"rank 1 at position 0 \(0F0\) is on the wrong rank; got rank 1; needed rank 0",
        ),
        (plan_of("0F0 0B0 0F0"), r"rank 0 at position 2 \(0F0\) was done before, at position 0"),
        (plan_of("0F0 0B0", "1B0"), r"rank 1 never runs 1F0"),
        (plan_of("0F0 0B0", "1F0"), r"rank 1 lacks a backward of stage 1, micro-batch 0; got none"),
        (plan_of("0F0 0W0"), r"rank 0 lacks a backward of stage 0, micro-batch 0; got W; needed B, or I and W"),
        (plan_of("0F0 0I0"), r"rank 0 lacks a backward of stage 0, micro-batch 0; got I; needed B, or I and W"),
        (plan_of("0F0 0I0 0B0 0W0"), r"rank 0 at position 2 \(0B0\) computes a gradient that I or W computes too"),
        (plan_of("0B0 0F0"), r"rank 0 at position 0 \(0B0\) comes before what it needs, 0F0 at position 1"),
        (plan_of("0F0 0W0 0I0"), r"rank 0 at position 1 \(0W0\) comes before what it needs, 0I0 at position 2"),
        (
            plan_of("1F0 0F0 1B0 0B0", placement=Placement("loop", 1, 2)),
            r"rank 0 at position 0 \(1F0\) comes before what it needs, 0F0 at position 1",
        ),
        (
            plan_of("0F0 1F0 0B0 1B0", placement=Placement("loop", 1, 2)),
            r"rank 0 at position 2 \(0B0\) comes before what it needs, 1B0 at position 3",
        ),
        (
            plan_of("0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1", microbatches=2),
            r"rank 1 at position 0 \(1F1\) is out of order on the activation edge 0→1; got the message of",
        ),
        (
            plan_of("0F0 0F1 0B1 0B0", "1F0 1F1 1B0 1B1", microbatches=2),
            r"rank 0 at position 2 \(0B1\) is out of order on the gradient edge 1→0; got the message of micro-batch 0",
        ),
        (plan_of("0F0 0F1 0B0 0B1", microbatches=2, peak=1), "rank 0 holds more activations than promised; got 2"),
    ],
)
def test_an_error_names_rank_position_and_action(plan: Plan, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        validate(plan)


def test_b_and_split_backwards_may_be_mixed_between_microbatches() -> None:
    validate(plan_of("0F0 0F1 0B0 0I1 0W1", microbatches=2))


def test_a_deadlock_names_the_cycle_of_waits() -> None:
    """Each rank wants the other's second chunk first."""
    plan = plan_of("0F0 2F0 2B0 0B0", "3F0 1F0 3B0 1B0", placement=Placement("loop", 2, 2))
    with pytest.raises(DeadlockError) as caught:
        validate(plan)
    assert str(caught.value).startswith(
        "ranks wait for each other for ever: rank 0 at position 2 (2RECV_F0) waits for rank 1; "
        "rank 1 at position 0 (3RECV_F0) waits for rank 0"
    )


def test_a_rank_outside_the_cycle_is_not_blamed() -> None:
    """Rank 0 waits for rank 1 only because ranks 1 and 2 wait for each other."""
    orders = ["0F0 3F0 3B0 0B0", "1F0 1B0 4F0 4B0", "2F0 5F0 5B0 2B0"]
    with pytest.raises(DeadlockError) as caught:
        validate(plan_of(*orders, placement=Placement("loop", 3, 2)))
    assert str(caught.value).startswith(
        "ranks wait for each other for ever: rank 1 at position 3 (1RECV_B0) waits for rank 2; "
        "rank 2 at position 3 (5RECV_F0) waits for rank 1; "
    )
    assert "rank 0" not in str(caught.value)


BREADTH_FIRST = plan_of(
    "0F0 0F1 0F2 0F3 2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3 0B0 0B1 0B2 0B3",
    "1F0 1F1 1F2 1F3 3F0 3F1 3F2 3F3 3B0 3B1 3B2 3B3 1B0 1B1 1B2 1B3",
    placement=Placement("loop", 2, 2),
    microbatches=4,
)


def test_one_slot_fewer_can_block_a_send_for_ever() -> None:
    """With one slot on 1→2, rank 1 sends 1F0 and waits with 1F1 until rank 0 takes 1F0, which it does after all its
    F of stage 0. Rank 1 has taken two of these, so the other two need a slot each."""
    enough = slots_needed(BREADTH_FIRST) | {Edge(1, 2, "activation"): 1, Edge(0, 1, "activation"): 2}
    validate(BREADTH_FIRST, enough)
    with pytest.raises(DeadlockError) as caught:
        validate(BREADTH_FIRST, enough | {Edge(0, 1, "activation"): 1})
    assert str(caught.value) == (
        "ranks wait for each other for ever: rank 0 at position 7 (0SEND_F3) waits for rank 1; "
        "rank 1 at position 5 (1SEND_F1) waits for rank 0; "
        "give more slots to activation edge 0→1, activation edge 1→2"
    )


def test_an_edge_without_slots_blocks_its_first_send() -> None:
    with pytest.raises(DeadlockError, match=r"rank 0 at position 1 \(0SEND_F0\) waits for rank 1"):
        validate(build("gpipe", 2, 2), {Edge(0, 1, "activation"): 0, Edge(1, 0, "gradient"): 1})


def test_every_edge_needs_a_number_of_slots() -> None:
    with pytest.raises(PlanError, match="no slots given for the gradient edge 1→0"):
        validate(build("gpipe", 2, 2), {Edge(0, 1, "activation"): 1})


@pytest.mark.parametrize("spare", [0, 1, 2, 3])
def test_deadlocks_of_arbitrary_plans_are_those_of_all_interleavings(
    spare: int, random_plans: list[Plan], explore: Any
) -> None:
    verdicts = set()
    for plan in [*random_plans, BREADTH_FIRST]:
        slots = {edge: max(1, needed - spare) for edge, needed in slots_needed(plan).items()}
        expected = explore(plan, slots).deadlock
        verdicts.add(expected)
        assert deadlocks(plan, slots) == expected, plan.to_text()
    assert verdicts == ({False, True} if spare else {False})


def deadlocks(plan: Plan, slots: dict[Edge, int]) -> bool:
    try:
        validate(plan, slots)
    except DeadlockError:
        return True
    return False


def test_a_text_that_promises_much_and_holds_little_is_refused_at_once() -> None:
    with pytest.raises(PlanError, match="rank 0 never runs 0F1"):
        validate(plan_of("0F0 0B0", microbatches=999_999_999))
