"""Updates as actions of the order: which weights a micro-batch uses, how many versions that takes, and what is refused.

``replayed`` is the reference: it hands a list of numbers around as weights and looks at what every action finds.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise, product

import pytest

from pipex.errors import InputError, PlanError, PlanSyntaxError
from pipex.observe import Event, measure
from pipex.plan.actions import NONE, Action, Kind, parse_action
from pipex.plan.communication import alive, slots_needed
from pipex.plan.costs import Costs
from pipex.plan.families import FAMILIES, build
from pipex.plan.interop.torch_csv import from_torch_csv, to_torch_csv
from pipex.plan.list_scheduler import pack
from pipex.plan.measured import measured_costs, typical_step
from pipex.plan.messages import messages
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.search.units import Units
from pipex.plan.simulator import simulate
from pipex.plan.validator import validate
from pipex.plan.versions import Update
from pipex.plan.view.chrome import chrome_trace
from pipex.plan.view.course import memory_curve
from pipex.plan.view.text import plan_view

PIPEDREAM = [(p, m) for p in (1, 2, 3, 4, 8) for m in (1, 2, 3, p, 2 * p, 5 * p + 1)]
TWO_BW = [(p, each, k) for p in (1, 2, 3, 4, 8) for each in (p, p + 1, 2 * p, 3 * p + 1) for k in (1, 2, 5)]


def plan_of(*orders: str, update: Update, microbatches: int, placement: Placement | None = None) -> Plan:
    rows = tuple(tuple(parse_action(cell) for cell in order.split()) for order in orders)
    return Plan("by-hand", placement or Placement("loop", len(rows)), microbatches, rows, (99,) * len(rows), update)


def replayed(plan: Plan, stage: int) -> tuple[dict[int, int], int]:
    """Micro-batch -> the version that it uses on a stage, and the most versions kept at once: the newest, for "delayed"
    the one before it, and what a backward to come uses."""
    order = [a for row in plan.orders for action in row for a in action.each if a.stage == stage]
    lasts = [a.microbatch for a in order if a.kind is Kind.UPDATE]
    there, kept, uses = [-1, 0], 0, {}
    for at, action in enumerate(order):
        if action.kind is Kind.UPDATE:
            there.append(there[-1] + 1)
        elif action.kind is Kind.F and plan.update == "microbatch":
            uses[action.microbatch] = there[-1]
        elif action.kind is Kind.F:
            uses[action.microbatch] = bisect_left(lasts, action.microbatch) - 1
            assert uses[action.microbatch] in there[-2:]
        to_come = [a.microbatch for a in order[at + 1 :] if a.kind in (Kind.B, Kind.W)]
        newest = there[-2:] if plan.update == "delayed" else there[-1:]
        kept = max(kept, len({*newest, *(uses[m] for m in to_come if m in uses)}))
    return uses, kept


@pytest.mark.parametrize(("ranks", "microbatches"), PIPEDREAM)
def test_pipedream_uses_weights_that_lack_one_update_per_stage_to_come(ranks: int, microbatches: int) -> None:
    plan = build("pipedream", ranks, microbatches)
    validate(plan)
    assert plan.versions == {
        (rank, m): max(0, m - (ranks - 1 - rank)) for rank in range(ranks) for m in range(microbatches)
    }
    for rank, order in enumerate(plan.orders):
        assert [a.microbatch for a in order if a.kind is Kind.UPDATE] == list(range(microbatches))
        updated = [before for before, a in pairwise(order) if a.kind is Kind.UPDATE]
        assert {a.kind for a in updated} == {Kind.B}
        uses, kept = replayed(plan, rank)
        assert uses == {m: plan.versions[rank, m] for m in range(microbatches)}
        assert kept == plan.weight_versions[rank]
        if microbatches >= 2 * (ranks - 1 - rank):
            assert kept == min(ranks - rank, microbatches)
        assert kept <= plan.peak_activations[rank]


@pytest.mark.parametrize(("ranks", "each", "updates"), TWO_BW)
def test_pipedream_2bw_uses_the_version_before_its_group_s(ranks: int, each: int, updates: int) -> None:
    plan = build("pipedream-2bw", ranks, each * updates, updates=updates)
    validate(plan)
    assert plan.versions == {(rank, m): m // each - 1 for rank in range(ranks) for m in range(each * updates)}
    assert plan.weight_versions == (2,) * ranks
    for rank, order in enumerate(plan.orders):
        assert [a.microbatch for a in order if a.kind is Kind.UPDATE] == list(range(each - 1, each * updates, each))
        assert replayed(plan, rank) == ({m: m // each - 1 for m in range(each * updates)}, 2)


@pytest.mark.parametrize("family", ["pipedream", "pipedream-2bw"])
def test_updates_take_no_time_and_no_memory_and_move_nothing(family: str) -> None:
    plan, plain = build(family, 4, 8), build("1f1b", 4, 8)
    costs = Costs.uniform(plan, 3, 2, 1, hop=0.5)
    ours, theirs = simulate(plan, costs), simulate(plain, costs)
    assert ours.makespan == theirs.makespan
    assert ours.peak_memory == theirs.peak_memory
    assert ours.slots_used == theirs.slots_used
    for row, plain_row in zip(ours.timeline, theirs.timeline, strict=True):
        assert tuple(timed for timed in row if timed.action.kind is not Kind.UPDATE) == plain_row
        assert all(start == end for action, start, end in row if action.kind is Kind.UPDATE)


@pytest.mark.parametrize("family", ["pipedream", "pipedream-2bw"])
def test_the_rest_of_pipex_sees_the_plan_that_it_would_be_without_updates(family: str) -> None:
    plan, plain = build(family, 3, 6), build("1f1b", 3, 6)
    costs = Costs.uniform(plan, 3, 2, 1, hop=0.5)
    ours, theirs = simulate(plan, costs), simulate(plain, costs)
    assert plan_view(plan) == plan_view(plain)
    assert alive(plan) == alive(plain)
    assert slots_needed(plan) == slots_needed(plain)
    assert [m[:2] + m[4:] for m in messages(plan, costs, ours)] == [
        m[:2] + m[4:] for m in messages(plain, costs, theirs)
    ]
    for rank in range(plan.placement.ranks):
        assert memory_curve(plan, costs, ours, rank) == memory_curve(plain, costs, theirs, rank)
    problem = Units.of({plan.placement: costs}, 6, None).problem(plan.placement, 6, costs, None)
    assert pack(problem, plan.orders) == pack(problem, plain.orders)
    slices = [row for row in chrome_trace(plan, costs)["traceEvents"] if row.get("cat") == "UPDATE"]
    assert [(row["name"], row["dur"]) for row in slices[-1:]] == [("PP:2UPDATE5", 0)]
    with pytest.raises(PlanError, match="torch's runtime changes the weights after all micro-batches"):
        to_torch_csv(plan)
    with pytest.raises(PlanError, match=r"rank 0 at position 2 \(0UPDATE0\) is an action that torch does not have"):
        from_torch_csv("0F0,0B0,0UPDATE0\r\n")
    assert Plan.from_text(plan.to_text()) == plan


def test_a_run_is_measured_with_its_updates() -> None:
    plan = build("pipedream", 1, 1)
    events = [
        Event(1, kind, 0, 0, begin, begin + 10**9) for kind, begin in (("F", 0), ("B", 10**9), ("UPDATE", 2 * 10**9))
    ]
    found = typical_step(plan, [events])
    assert [timed.action for timed in found.timeline[0]] == list(plan.orders[0])
    assert (found.makespan, found.bubble_makespan) == (3, 0)
    with pytest.raises(InputError, match="the trace is of another plan"):
        typical_step(plan, [events[:2]])
    figures = measure([events], plan.placement)
    assert (figures.makespan, figures.bubble_makespan, figures.after_actions) == (3, 0, 0)
    costs = measured_costs(plan, figures.action, hop=0)
    assert (costs.forward, costs.input_gradient) == ([1], [1])


@pytest.mark.parametrize("updates", [2, 3, 6])
def test_further_updates_of_2bw_follow_without_a_bubble(updates: int) -> None:
    one, several = build("pipedream-2bw", 4, 4), build("pipedream-2bw", 4, 4 * updates, updates=updates)
    spans = [simulate(plan, Costs.uniform(plan, 3, 2, 1)).makespan for plan in (one, several)]
    assert spans[1] - spans[0] == (updates - 1) * 4 * (3 + 2 + 1)


def test_only_plans_that_change_the_weights_in_between_have_updates() -> None:
    for family, microbatches in product(FAMILIES, (4, 8)):
        plan = build(family, 2, microbatches)
        kinds = {action.kind for order in plan.orders for action in order}
        assert (Kind.UPDATE in kinds) == (plan.update in ("microbatch", "delayed"))
        if Kind.UPDATE not in kinds:
            assert plan.weight_versions == (1, 1)
            assert set(plan.versions.values()) == {0}


def test_a_split_backward_is_in_an_update_by_its_w_and_stages_of_a_rank_are_apart() -> None:
    plan = plan_of(
        "0F0 1F0 1I0 1W0 1UPDATE0 0F1 0I0 0W0 0UPDATE0 1F1 1B1 1UPDATE1 0B1 0UPDATE1",
        update="microbatch", microbatches=2, placement=Placement("loop", 1, 2),
    )  # fmt: skip
    validate(plan)
    assert plan.versions == {(0, 0): 0, (1, 0): 0, (0, 1): 0, (1, 1): 1}
    assert plan.weight_versions == (2,)  # of stage 0, while micro-batch 1 is under way; stage 1 needs one


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (
            plan_of("0F0 0B0 0UPDATE0", update="step", microbatches=1),
            r"rank 0 at position 2 \(0UPDATE0\) is in a plan without updates of its own; got update=step",
        ),
        (
            plan_of("0F0 0UPDATE0", update="never", microbatches=1),
            r"rank 0 at position 1 \(0UPDATE0\) is in a plan without updates of its own; got update=never",
        ),
        (
            plan_of("0F0 0B0 0F1 0B1 0UPDATE1", update="microbatch", microbatches=2),
            "rank 0 never runs 0UPDATE0; needed an update after every micro-batch",
        ),
        (
            plan_of("0F0 0B0 0UPDATE0 0F1 0B1", update="delayed", microbatches=2),
            "rank 0 never runs 0UPDATE1; needed the same updates on all stages, and one after the last micro-batch",
        ),
        (
            plan_of(
                "0F0 0F1 0B0 0B1 0UPDATE1", "1F0 1B0 1UPDATE0 1F1 1B1 1UPDATE1", update="delayed", microbatches=2
            ),
            "rank 0 never runs 0UPDATE0; needed the same updates on all stages",
        ),
        (
            plan_of("0F0 0B0 0UPDATE0 0UPDATE0", update="microbatch", microbatches=1),
            r"rank 0 at position 3 \(0UPDATE0\) was done before, at position 2",
        ),
        (
            plan_of("0F0 0B0 0UPDATE1", update="delayed", microbatches=1),
            r"rank 0 at position 2 \(0UPDATE1\) names a micro-batch that is not there",
        ),
        (
            plan_of("0F0 0B0 0UPDATE0", "1F0 1B0 0UPDATE0", update="delayed", microbatches=1),
            r"rank 1 at position 2 \(0UPDATE0\) is on the wrong rank; got rank 1; needed rank 0",
        ),
        (
            plan_of("0F0 0UPDATE0 0B0", update="delayed", microbatches=1),
            r"rank 0 at position 1 \(0UPDATE0\) comes before what it needs, 0B0 at position 2",
        ),
        (
            plan_of("0F0 0F1 0I0 0B1 0UPDATE1 0W0", update="delayed", microbatches=2),
            r"rank 0 at position 4 \(0UPDATE1\) comes before what it needs, 0W0 at position 5",
        ),
        (
            plan_of("0F0 0F1 0B0 0B1 0UPDATE0 0UPDATE1", update="microbatch", microbatches=2),
            r"rank 0 at position 4 \(0UPDATE0\) comes after 0B1 at position 3; needed all backwards of later",
        ),
        (
            plan_of("0F0 0F1 0B0 0I1 0UPDATE0 0W1 0UPDATE1", update="microbatch", microbatches=2),
            r"rank 0 at position 4 \(0UPDATE0\) comes after 0I1 at position 3; needed all backwards of later",
        ),
        (
            plan_of("0F0 0F1 0B0 0B1 0UPDATE1 0UPDATE0", update="microbatch", microbatches=2),
            r"rank 0 at position 5 \(0UPDATE0\) comes after 0B1 at position 3; needed all backwards of later",
        ),
        (
            plan_of("0F0 0F1 0F2 0B0 0UPDATE0 0B1 0UPDATE1 0B2 0UPDATE2", update="delayed", microbatches=3),
            r"rank 0 at position 2 \(0F2\) uses weights that are not made yet; got 0 updates of stage 0 before it; "
            "needed 1",
        ),
        (
            plan_of(
                "0F0 3F1 3B1 3UPDATE1 0B0 0UPDATE0", "2F1 1F0 1B0 1UPDATE0 2B1 2UPDATE1", update="microbatch",
                microbatches=2, placement=Placement("bidirectional", 2, 2),
            ),
            "two copies of a model cannot change apart .* got update=microbatch on placement bidirectional",
        ),
    ],
)  # fmt: skip
def test_a_plan_whose_updates_are_wrong_is_refused_where_they_are(plan: Plan, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        validate(plan)


def test_an_update_is_joined_with_nothing() -> None:
    with pytest.raises(PlanSyntaxError, match="one of F, I, W and B inside OVERLAP_F_B"):
        parse_action("(0F1;0UPDATE0)OVERLAP_F_B")
    parts = tuple(map(parse_action, ("0F1", "0B0", "0UPDATE0")))
    orders = (
        (parse_action("0F0"), Action(NONE, Kind.OVERLAP_F_B, NONE, parts), *map(parse_action, ("0B1", "0UPDATE1"))),
    )
    with pytest.raises(PlanError, match=r"position 1 .* does not join a forward with a backward"):
        validate(Plan("by-hand", Placement("loop", 1), 2, orders, (2,), "microbatch"))


@pytest.mark.parametrize(
    ("microbatches", "updates", "problem"),
    [
        (4, 0, "too few updates for pipedream-2bw; got 0; needed at least 1"),
        (9, 2, "2 updates of pipedream-2bw cannot share .*; got 9; needed a multiple of 2, such as 8 or 10"),
        (2, 3, "3 updates of pipedream-2bw cannot share .*; got 2; needed a multiple of 3, such as 3"),
        (6, 2, "too few micro-batches per update for pipedream-2bw with 4 ranks; got 3; needed at least 4"),
        (8, "2", "bad option updates; got '2'; needed a whole number"),
    ],
)
def test_updates_that_do_not_fit_are_refused(microbatches: int, updates: object, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        build("pipedream-2bw", 4, microbatches, updates=updates)
