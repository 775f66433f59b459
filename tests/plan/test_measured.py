"""One step of a real run beside its plan."""

from __future__ import annotations

import pytest

from pipex.errors import InputError
from pipex.observe import Event
from pipex.plan.actions import Action, Kind, parse_action
from pipex.plan.costs import Costs
from pipex.plan.families import build
from pipex.plan.measured import measured_costs, typical_step
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import TimedAction, simulate

PLAN = build("1f1b", 2, 1)
SECOND = 10**9


def step(number: int, zero: int, longer: int = 0) -> list[list[Event]]:
    """Rank 0: F 0-1, B 5-7 and more; rank 1: F 2-3, B 3-4; in seconds after ``zero``."""
    times = [[("F", 0, 0, 1), ("B", 0, 5, 7 + longer)], [("RECV_F", 1, 0, 2), ("F", 1, 2, 3), ("B", 1, 3, 4)]]
    return [
        [Event(number, kind, stage, 0, zero + begin * SECOND, zero + end * SECOND) for kind, stage, begin, end in rank]
        for rank in times
    ]


def run(*steps: list[list[Event]]) -> list[list[Event]]:
    return [[event for each in steps for event in each[rank]] for rank in range(2)]


def test_a_step_in_the_terms_of_a_simulation() -> None:
    found = typical_step(PLAN, run(step(5, 1000 * SECOND)))
    f, b = Kind.F, Kind.B
    assert found.timeline == (
        (TimedAction(Action(0, f, 0), 0, 1), TimedAction(Action(0, b, 0), 5, 7)),
        (TimedAction(Action(1, f, 0), 2, 3), TimedAction(Action(1, b, 0), 3, 4)),
    )
    assert (found.number, found.of) == (5, 1)
    assert (found.makespan, found.span) == (7, 7)
    assert found.bubble_span == 1 - 3 / 7
    assert found.bubble_makespan == 1 - 5 / 14


@pytest.mark.parametrize(
    ("longer", "number"), [([0], 1), ([4, 0, 2], 3), ([0, 4, 1, 2], 3), ([9, 9, 9], 1), ([3, 1], 2)]
)
def test_the_median_step_is_chosen(longer: list[int], number: int) -> None:
    steps = [step(k, 100 * k * SECOND, extra) for k, extra in enumerate(longer, start=1)]
    found = typical_step(PLAN, run(*steps))
    assert (found.number, found.of) == (number, len(longer))
    assert found.makespan == 7 + longer[number - 1]


def test_a_fused_pair_is_measured_part_by_part() -> None:
    order = tuple(map(parse_action, ["0F0", "(0F1;0B0)OVERLAP_F_B", "0B1"]))
    plan = Plan("by-hand", Placement("loop", 1), 2, (order,), (2,))
    ran = [("F", 0), ("F", 1), ("B", 0), ("B", 1)]
    events = [Event(1, kind, 0, m, k * SECOND, (k + 1) * SECOND) for k, (kind, m) in enumerate(ran)]
    assert [str(timed.action) for timed in typical_step(plan, [events]).timeline[0]] == ["0F0", "0F1", "0B0", "0B1"]


def test_a_step_that_took_no_time_has_no_bubble() -> None:
    found = typical_step(PLAN, [[event._replace(begin=0, end=0) for event in rank] for rank in step(1, 0)])
    assert (found.makespan, found.bubble_span, found.bubble_makespan) == (0, 0, 0)


def test_a_run_of_another_plan_is_refused() -> None:
    with pytest.raises(InputError, match="of another number of ranks; got 2; needed 3"):
        typical_step(build("1f1b", 3, 1), run(step(1, 0)))
    with pytest.raises(InputError, match="holds no step"):
        typical_step(PLAN, [[], [Event(1, "optimizer", -1, -1, 0, 1)]])
    with pytest.raises(InputError, match="step 2, rank 0 at position 1; got 0B0; needed 0I0"):
        typical_step(build("zb-h1", 2, 1), run(step(2, 0)))
    with pytest.raises(InputError, match="step 2, rank 0; got 2 actions; needed 4"):
        typical_step(build("gpipe", 2, 2), run([[step(2, 0)[0][0], Event(2, "F", 0, 1, 1, 2)], []]))
    short = run(step(1, 0), step(2, 100 * SECOND))
    short[1].pop()
    with pytest.raises(InputError, match="step 2, rank 1; got 1 actions; needed 2"):
        typical_step(PLAN, short)


def test_measured_times_are_the_costs() -> None:
    times = {("F", 0): 1.0, ("B", 0): 2.0, ("F", 1): 3.0, ("B", 1): 4.0}
    costs = measured_costs(PLAN, times, hop=0.5)
    assert simulate(PLAN, costs).timeline == (
        (TimedAction(parse_action("0F0"), 0, 1), TimedAction(parse_action("0B0"), 9, 11)),
        (TimedAction(parse_action("1F0"), 1.5, 4.5), TimedAction(parse_action("1B0"), 4.5, 8.5)),
    )
    split = {("F", 0): 1.0, ("I", 0): 2.0, ("W", 0): 4.0}
    costs = measured_costs(build("zb-h1", 1, 1), split, hop=0.0)
    assert (costs.forward, costs.input_gradient, costs.weight_gradient) == ([1], [2], [4])
    assert (costs.activation, costs.deferred) == (Costs.uniform(PLAN).activation[:1], Costs.uniform(PLAN).deferred[:1])


def test_a_pair_costs_the_measured_share_of_its_parts() -> None:
    plan = build("dualpipev", 1, 2)
    times = {(kind, stage): 2.0 for kind in "FIWB" for stage in (0, 1)}
    apart, at_once = (simulate(plan, measured_costs(plan, times, 0.0, *share)).makespan for share in ((), (0.75,)))
    pairs = sum(bool(action.parts) for action in plan.orders[0])
    assert pairs
    assert apart - at_once == pytest.approx(pairs * (1 - 0.75) * (2 + 4))  # F, and I and W


def test_a_kind_that_was_not_measured_is_named() -> None:
    with pytest.raises(InputError, match="no measured time of B on stage 1"):
        measured_costs(PLAN, {("F", 0): 1.0, ("B", 0): 2.0, ("F", 1): 3.0}, hop=0.0)
