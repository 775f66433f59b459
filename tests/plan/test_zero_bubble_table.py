"""The Zero Bubble paper's table, all of it, and the plans that are made for a memory limit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest

from pipex.errors import InputError, PlanError
from pipex.plan.actions import Kind
from pipex.plan.costs import Costs, RankCosts
from pipex.plan.families.one_f_one_b import one_f_one_b
from pipex.plan.families.zb_auto import _Draft, _Ways, zb_auto
from pipex.plan.families.zb_h1 import zb_h1
from pipex.plan.families.zb_h2 import zb_h2
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, simulate
from pipex.plan.validator import validate

# arXiv 2401.10241, table 3: ranks, attention heads and hidden size; the sequence is 1024 long.
MODELS = {"1.5B": (8, 24, 2304), "6.2B": (8, 32, 4096), "14.6B": (16, 40, 5120), "28.3B": (32, 48, 6144)}

# Profiled times in ms (table 9) and bubble rates (table 5, of the span).
# model, micro-batches; F, I, W, hop; 1F1B, ZB-H1, ZB-H2, ZB-1p, ZB-2p
TABLE = [
    ("1.5B", 24, (18.522, 18.086, 9.337, 0.601), (0.2431, 0.1585, 0.1083, 0.1585, 0.0433)),
    ("1.5B", 32, (18.513, 18.086, 9.331, 0.626), (0.1985, 0.1242, 0.0837, 0.1242, 0.0039)),
    ("1.5B", 64, (18.546, 18.097, 9.321, 0.762), (0.1240, 0.0674, 0.0444, 0.0674, 0.0026)),
    ("6.2B", 24, (29.718, 29.444, 19.927, 0.527), (0.2347, 0.1323, 0.0698, 0.1323, 0.0029)),
    ("6.2B", 32, (29.802, 29.428, 19.530, 0.577), (0.1898, 0.1045, 0.0559, 0.1045, 0.0022)),
    ("6.2B", 64, (29.935, 29.621, 19.388, 0.535), (0.1091, 0.0554, 0.0294, 0.0554, 0.0010)),
    ("14.6B", 48, (11.347, 11.248, 8.132, 0.377), (0.2552, 0.1397, 0.0672, 0.1397, 0.0066)),
    ("14.6B", 64, (11.307, 11.254, 8.101, 0.379), (0.2082, 0.1088, 0.0516, 0.1088, 0.0054)),
    ("14.6B", 128, (11.325, 11.308, 8.109, 0.378), (0.1251, 0.0576, 0.0266, 0.0576, 0.0028)),
    ("28.3B", 96, (10.419, 10.207, 7.715, 0.408), (0.2646, 0.1421, 0.0641, 0.1421, 0.0038)),
    ("28.3B", 128, (10.408, 10.204, 7.703, 0.408), (0.2168, 0.1106, 0.0490, 0.1106, 0.0029)),
    ("28.3B", 256, (10.402, 10.248, 7.698, 0.460), (0.1352, 0.0594, 0.0257, 0.0594, 0.0018)),
]


def costs_of(model: str, times: tuple[float, float, float, float]) -> RankCosts:
    """Memory in bytes per token and layer (table 1): 34h + 5as from F to I, 32h from I to W."""
    ranks, heads, hidden = MODELS[model]
    return RankCosts.of(ranks, *times, activation=34 * hidden + 5 * heads * 1024, deferred=32 * hidden)


def simulated(plan: Plan, costs: RankCosts) -> Simulation:
    return simulate(plan, costs.on(plan.placement))


@pytest.mark.parametrize("column", ["1F1B", "ZB-H1", "ZB-H2", "ZB-1p", "ZB-2p"])
@pytest.mark.parametrize(("model", "m", "times", "rates"), TABLE)
def test_bubbles_are_those_of_the_paper(
    column: str, model: str, m: int, times: tuple[float, float, float, float], rates: tuple[float, ...]
) -> None:
    costs = costs_of(model, times)
    ranks, activation = MODELS[model][0], costs.activation[0]
    plan = {
        "1F1B": lambda: one_f_one_b(ranks, m),
        "ZB-H1": lambda: zb_h1(ranks, m),
        "ZB-H2": lambda: zb_h2(ranks, m),
        "ZB-1p": lambda: zb_auto(ranks, m, costs=costs, memory=ranks * activation),
        "ZB-2p": lambda: zb_auto(ranks, m, costs=costs, memory=2 * ranks * activation),
    }[column]()
    rate = rates[["1F1B", "ZB-H1", "ZB-H2", "ZB-1p", "ZB-2p"].index(column)]
    assert simulated(plan, costs).bubble_span == pytest.approx(rate, abs=0.5001e-4)


@pytest.mark.parametrize(
    ("ranks", "m", "zb_1p", "zb_2p_makespan", "zb_2p_span"),
    [(4, 8, 0.1683, 0.1261, 0.0690), (8, 32, 0.1056, 0.0777, 0.0033), (16, 64, 0.1123, 0.0827, 0.0035)],
)
def test_bubbles_at_realistic_times_are_those_that_another_simulator_found(
    ranks: int, m: int, zb_1p: float, zb_2p_makespan: float, zb_2p_span: float
) -> None:
    """The authors' scheduler, replayed. Its makespan at P = 16 is .0829: it looks at the span alone."""
    costs = RankCosts.of(ranks, 100, 100, 65, 2, activation=1, deferred=0.5)
    one = simulated(zb_auto(ranks, m, costs=costs), costs)
    two = simulated(zb_auto(ranks, m, costs=costs, memory=2 * ranks), costs)
    assert one.bubble_makespan == pytest.approx(zb_1p, abs=0.5001e-4)
    assert one.bubble_span == pytest.approx(zb_1p, abs=0.5001e-4)
    assert two.bubble_makespan == pytest.approx(zb_2p_makespan, abs=0.5001e-4)
    assert two.bubble_span == pytest.approx(zb_2p_span, abs=0.5001e-4)


# Longest spans that a separate replica of the authors' scheduler finds, in cells where each of its rules decides.
# ranks, micro-batches; F, I, W, hop; deferred memory, limit; span
SCHEDULER = [
    (3, 5, (14, 11, 11, 0), (0.5, 4), 191),
    (3, 6, (7, 6, 8, 2), (1, 4), 140),
    (3, 8, (13, 9, 9, 0), (0.75, 4), 257),
    (4, 14, (15, 12, 6, 0), (0.5, 9), 471),
    (5, 12, (13, 8, 9, 2), (0.5, 7), 392),
    (6, 15, (6, 7, 6, 2), (0.5, 13), 298),
    (6, 15, (11, 11, 9, 1), (0.75, 8), 511),
    (6, 22, (6, 9, 5, 1), (0.5, 12), 459),
    (3, 5, ([13, 6, 13], [11, 12, 11], [12, 9, 8], 2), (0.5, 3), 208),
    (4, 8, ([13, 9, 15, 11], [12, 8, 13, 9], [9, 3, 4, 11], 2), (0.5, 8), 295),
]


@pytest.mark.parametrize(("ranks", "m", "times", "memory", "span"), SCHEDULER)
def test_odd_cells_come_out_as_from_the_authors_scheduler(
    ranks: int, m: int, times: tuple[Any, Any, Any, float], memory: tuple[float, float], span: float
) -> None:
    deferred, limit = memory
    costs = RankCosts.of(ranks, *times, deferred=deferred)
    course = simulated(zb_auto(ranks, m, costs=costs, memory=limit), costs)
    assert max(row[-1].end - row[0].start for row in course.timeline) == span


@pytest.mark.parametrize("ranks", range(1, 9))
def test_at_equal_times_p_activations_give_zb_h1_and_2p_minus_1_no_bubble(ranks: int) -> None:
    costs = RankCosts.of(ranks)
    for m in range(1, 17):
        ours, paper = simulated(zb_auto(ranks, m), costs), simulated(zb_h1(ranks, m), costs)
        assert (ours.bubble_span, ours.makespan) == (paper.bubble_span, paper.makespan)
        if m >= 2 * ranks - 1:
            assert simulated(zb_auto(ranks, m, memory=2 * ranks - 1), costs).bubble_span == 0
            assert ranks == 1 or simulated(zb_auto(ranks, m, memory=2 * ranks - 2), costs).bubble_span > 0


def test_no_more_microbatches_than_ranks_take_the_closed_form_of_the_paper() -> None:
    """Appendix H: (M+P-1)(F+I) + W, where 1F1B takes (M+P-1)(F+I+W)."""
    for ranks, (f, i, w) in product(range(1, 9), [(1, 1, 1), (3, 2, 2), (7, 11, 5), (100, 100, 65)]):
        costs = RankCosts.of(ranks, f, i, w)
        for m in range(1, ranks + 1):
            assert simulated(zb_auto(ranks, m, costs=costs), costs).makespan == (m + ranks - 1) * (f + i) + w


def held_at_most(plan: Plan, activation: Sequence[float], deferred: Sequence[float]) -> list[float]:
    """Per rank, recounted after every action from the sets of what has run."""
    peaks = []
    for rank, order in enumerate(plan.orders):
        sums = []
        for end in range(1, len(order) + 1):
            run = {kind: {a.microbatch for a in order[:end] if a.kind is kind} for kind in (Kind.F, Kind.I, Kind.W)}
            whole, waiting = run[Kind.F] - run[Kind.I], run[Kind.I] - run[Kind.W]
            sums.append(len(whole) * activation[rank] + len(waiting) * deferred[rank])
        peaks.append(max(sums))
    return peaks


def test_every_limit_per_rank_is_kept_with_every_rank_s_own_times() -> None:
    rng = random.Random(0)
    for _ in range(200):
        ranks, m = rng.randint(1, 7), rng.randint(1, 12)

        def each(low: int, high: int, ranks: int = ranks) -> list[float]:
            return [float(rng.randint(low, high)) for _ in range(ranks)]

        activation = each(1, 9)
        deferred = [a * rng.choice([0, 0.5, 1, 2, 3]) for a in activation]
        costs = RankCosts.of(ranks, each(0, 12), each(0, 12), each(0, 12), rng.randint(0, 5), activation, deferred)
        least = list(map(max, activation, deferred))
        limits = [needed * rng.choice([1, 1.5, 2, 2.5, ranks, 2 * ranks]) for needed in least]
        plan = zb_auto(ranks, m, costs=costs, memory=limits)
        validate(plan)
        held = held_at_most(plan, activation, deferred)
        assert all(h <= limit for h, limit in zip(held, limits, strict=True)), plan.to_text()
        ones = [1.0] * ranks
        assert list(plan.peak_activations) == held_at_most(plan, ones, ones)
        rises = all(
            [a.microbatch for a in order if a.kind is kind] == list(range(m))
            for order in plan.orders
            for kind in (Kind.F, Kind.I, Kind.W)
        )
        assert rises, plan.to_text()


def test_the_bubble_shrinks_as_the_limit_grows_from_p_to_2p() -> None:
    costs = costs_of("6.2B", (29.718, 29.444, 19.927, 0.527))
    plans = [zb_auto(8, 24, costs=costs, memory=limit * costs.activation[0]) for limit in range(8, 17)]
    bubbles = [simulated(plan, costs).bubble_span for plan in plans]
    assert all(more < less for less, more in pairwise(bubbles[:-1]))
    assert bubbles[-1] <= bubbles[-2]


def test_without_a_limit_every_rank_may_hold_p_microbatches() -> None:
    uneven = RankCosts.of(4, 3, 2, 2, activation=[1, 2, 3, 4], deferred=[2, 2, 2, 2])
    assert zb_auto(4, 9, costs=uneven) == zb_auto(4, 9, costs=uneven, memory=[8, 8, 12, 16])
    assert max(zb_auto(4, 9).peak_activations) == 4
    assert max(zb_auto(4, 40, costs=RankCosts.of(4, 1, 9, 9), memory=math.inf).peak_activations) > 8


def test_every_rank_s_own_times_and_every_edge_s_hop_are_planned_with() -> None:
    """What each of the heuristic's ways expects of its order is what the simulator says of it."""
    rng = random.Random(1)
    for _ in range(40):
        ranks, m = rng.randint(1, 6), rng.randint(1, 12)
        placement = Placement("loop", ranks)
        f, i, w = ([rng.randint(1, 12) for _ in range(ranks)] for _ in range(3))
        hop = {edge: rng.randint(0, 9) for edge in placement.edges}
        costs = Costs(f, i, w, hop, [1] * ranks, [1] * ranks)
        limits = [float(rng.randint(1, 2 * ranks)) for _ in range(ranks)]
        for ways in product((False, True), repeat=3):
            draft = _Draft(costs, limits, m, _Ways(*ways))
            orders = tuple(rank.actions() for rank in draft.ranks)
            course = simulate(Plan("draft", placement, m, orders, (m,) * ranks), costs)
            assert draft.makespan == course.makespan
            assert draft.span == max(row[-1].end - row[0].start for row in course.timeline)


def test_the_shortest_span_of_all_ways_is_taken_and_of_these_the_shortest_makespan() -> None:
    rng = random.Random(2)
    winners = set()
    for _ in range(60):
        ranks, m = rng.randint(2, 8), rng.randint(1, 24)
        f, i, w = ([rng.randint(3, 12) for _ in range(ranks)] for _ in range(3))
        costs = RankCosts.of(ranks, f, i, w, 1)
        course = simulated(zb_auto(ranks, m, costs=costs, memory=1.5 * ranks), costs)
        on, limits = costs.on(Placement("loop", ranks)), [1.5 * ranks] * ranks
        drafts = {ways: _Draft(on, limits, m, _Ways(*ways)) for ways in product((False, True), repeat=3)}
        span = max(row[-1].end - row[0].start for row in course.timeline)
        assert (span, course.makespan) == min((draft.span, draft.makespan) for draft in drafts.values())
        winners.add(tuple(ways for ways, draft in drafts.items() if draft.span == span))
    for way in range(3):  # none of the three is idle: without either answer some span would be longer
        assert any(all(ways[way] for ways in won) for won in winners)
        assert any(not any(ways[way] for ways in won) for won in winners)


def test_the_smallest_feasible_limit_is_enough_and_less_is_refused_with_it() -> None:
    costs = RankCosts.of(3, activation=[1, 4, 2], deferred=[3, 1, 2])
    smallest = [3, 4, 2]
    plan = zb_auto(3, 6, costs=costs, memory=smallest)
    validate(plan)
    assert held_at_most(plan, costs.activation, costs.deferred) == smallest
    problem = (
        "memory limit of rank 1 too small for zb-auto; got 3.9; needed at least 4.0, one micro-batch; a limit of 4.0 "
    )
    with pytest.raises(PlanError, match=problem + "is feasible on every rank"):
        zb_auto(3, 6, costs=costs, memory=[3, 3.9, 2])
    validate(zb_auto(3, 6, costs=costs, memory=4))
    for limit in (2.5, -1, math.nan):
        with pytest.raises(PlanError, match=f"memory limit of rank 0 too small for zb-auto; got {limit}; needed at le"):
            zb_auto(3, 6, costs=costs, memory=limit)


def test_limits_and_costs_of_another_number_of_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match="wrong number of memory limits; got 2; needed 1 or 3, one per rank"):
        zb_auto(3, 6, memory=[4, 4])
    with pytest.raises(InputError, match="the costs are of another number of ranks; got 4; needed 3"):
        zb_auto(3, 6, costs=RankCosts.of(4))
    with pytest.raises(InputError, match=f"no hop cost for the {Edge(0, 1, 'activation')}"):
        zb_auto(2, 6, costs=Costs([1, 1], [1, 1], [1, 1], {}, [1, 1], [1, 1]))
