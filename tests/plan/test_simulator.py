"""The simulator against published figures, closed forms and a slow solver that shares no code with it."""

from __future__ import annotations

import dataclasses
import random

import pytest

from pipex.errors import DeadlockError, InputError
from pipex.plan.actions import Action, Kind
from pipex.plan.communication import slots_needed
from pipex.plan.costs import Costs
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, simulate

# Zero Bubble paper, arXiv 2401.10241: profiled times in ms (table 9) and bubble rates (table 5, the span metric).
# ranks, micro-batches, F, I, W, hop, 1F1B, ZB-H1
ZERO_BUBBLE_PAPER = [
    (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585),
    (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242),
    (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674),
    (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323),
    (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045),
    (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554),
    (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421),
    (32, 128, 10.408, 10.204, 7.703, 0.408, 0.2168, 0.1106),
    (32, 256, 10.402, 10.248, 7.698, 0.460, 0.1352, 0.0594),
]


def uniform(family: str, ranks: int, microbatches: int, f: float, i: float, w: float, hop: float) -> Simulation:
    plan = build(family, ranks, microbatches)
    return simulate(plan, Costs.uniform(plan, f, i, w, hop))


@pytest.mark.parametrize(("ranks", "m", "f", "i", "w", "hop", "one_f_one_b", "zb_h1"), ZERO_BUBBLE_PAPER)
def test_span_bubbles_are_those_of_the_zero_bubble_paper(
    ranks: int, m: int, f: float, i: float, w: float, hop: float, one_f_one_b: float, zb_h1: float
) -> None:
    assert uniform("1f1b", ranks, m, f, i, w, hop).bubble_span == pytest.approx(one_f_one_b, abs=0.5001e-4)
    assert uniform("zb-h1", ranks, m, f, i, w, hop).bubble_span == pytest.approx(zb_h1, abs=0.5001e-4)


@pytest.mark.parametrize(
    ("family", "hop", "bubble"),
    [
        ("1f1b", 0, 0.0986), ("1f1b", 0.1, 0.1482), ("1f1b", 0.2, 0.1926), ("1f1b", 0.5, 0.3018),
        ("zb-h1", 0, 0.0352), ("zb-h1", 0.1, 0.0486), ("zb-h1", 0.2, 0.0616), ("zb-h1", 0.5, 0.0986),
    ],
)  # fmt: skip
def test_hops_cost_what_another_simulator_found(family: str, hop: float, bubble: float) -> None:
    assert uniform(family, 8, 64, 1, 1, 1, hop).bubble_makespan == pytest.approx(bubble, abs=0.5001e-4)


SIZES = [(1, 1), (1, 5), (2, 2), (2, 6), (3, 3), (4, 4), (4, 12), (5, 10), (8, 24)]
TIMES = [(1, 1, 1), (3, 2, 2), (7, 11, 5), (100, 100, 65)]
HOPS = [0, 2, 50]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_makespans_are_the_closed_forms(p: int, m: int) -> None:
    """All times are whole numbers, so all sums are exact."""
    for f, i, w in TIMES:
        t = f + i + w
        for hop in HOPS:
            assert uniform("naive", p, m, f, i, w, hop).makespan == m * p * t + 2 * m * (p - 1) * hop
            assert uniform("gpipe", p, m, f, i, w, hop).makespan == (m + p - 1) * t + 2 * (p - 1) * hop
            hops = 2 * (p - 1) * m // p + 2 * p - 4 if p > 1 else 0
            assert uniform("1f1b", p, m, f, i, w, hop).makespan == (m + p - 1) * t + hops * hop
        assert uniform("zb-h1", p, m, f, i, w, 0).makespan == m * t + (p - 1) * (f + i - w)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_bubbles_are_the_closed_forms(p: int, m: int) -> None:
    for family in ("gpipe", "1f1b"):
        simulated = uniform(family, p, m, 2, 1, 3, 0)
        assert simulated.bubble_makespan == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert simulated.bubble_span == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    assert uniform("naive", p, m, 2, 1, 3, 0).bubble_makespan == pytest.approx((p - 1) / p, abs=1e-12)


# sail-sg/VocabularyParallelism, artifact/exp_one_host.csv: profiles of 8 uneven stages in µs, 128 micro-batches, and
# the makespan (ms) and idle share that another simulator found for 1F1B without hops.
VOCABULARY = [
    (
        [10572, 10591, 10475, 10725, 10360, 10444, 10381, 36818],
        [25185, 21108, 20737, 21143, 20805, 21030, 20827, 52363],
        11639.6, 0.5690,
    ),
    (
        [10599, 10616, 10637, 10612, 10352, 10540, 10470, 24152],
        [23338, 20978, 20968, 21162, 20785, 21242, 21067, 37615],
        8129.5, 0.4388,
    ),
    (
        [10727, 10694, 10656, 10618, 10527, 10637, 10450, 17748],
        [22614, 21304, 21212, 21117, 21227, 21450, 21016, 29803],
        6310.8, 0.3109,
    ),
    (
        [10761, 10887, 10681, 10573, 10554, 10674, 10612, 14603],
        [21993, 21497, 21130, 21279, 21267, 21412, 21364, 25997],
        5421.5, 0.2171,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "backward", "milliseconds", "idle"), VOCABULARY)
def test_uneven_stages_give_the_published_makespan(
    forward: list[float], backward: list[float], milliseconds: float, idle: float
) -> None:
    plan = build("1f1b", 8, 128)
    costs = dataclasses.replace(
        Costs.uniform(plan), forward=forward, input_gradient=backward, weight_gradient=[0.0] * 8
    )
    simulated = simulate(plan, costs)
    assert simulated.makespan / 1000 == pytest.approx(milliseconds, abs=0.051)
    assert simulated.bubble_makespan == pytest.approx(idle, abs=0.51e-4)


def random_costs(plan: Plan, rng: random.Random) -> Costs:
    def per_stage() -> list[float]:
        return [rng.randint(0, 9) for _ in range(plan.placement.stages)]

    hop = {edge: rng.randint(0, 9) for edge in plan.edges}
    return Costs(per_stage(), per_stage(), per_stage(), hop, per_stage(), per_stage())


def ends_by_relaxation(plan: Plan, costs: Costs) -> dict[Action, float]:
    """Raises every end until nothing that an action waits for ends later than it may."""
    time = {"F": costs.forward, "I": costs.input_gradient, "W": costs.weight_gradient}
    ends = {action: 0.0 for order in plan.orders for action in order}
    rank_of = plan.placement.rank_of
    changed = True
    while changed:
        changed = False
        for order in plan.orders:
            for before, action in zip((None, *order), order, strict=False):
                stage, kind, m, _ = action
                waits = [ends[before]] if before else [0.0]
                source = {"F": stage - 1, "I": stage + 1, "B": stage + 1, "W": None}[kind.value]
                for maker in (Action(source, k, m) for k in Kind) if source is not None else ():
                    if maker in ends and (maker.kind is Kind.F) == (kind is Kind.F) and maker.kind is not Kind.W:
                        link = Edge(source, stage, "activation" if kind is Kind.F else "gradient")
                        waits.append(ends[maker] + (costs.hop[link] if rank_of(source) != rank_of(stage) else 0))
                end = max(waits) + sum(time[letter][stage] for letter in ("IW" if kind is Kind.B else kind.value))
                changed |= end != ends[action]
                ends[action] = end
    return ends


def test_every_end_is_the_longest_path_to_it(random_plans: list[Plan]) -> None:
    rng = random.Random(0)
    for plan in [*random_plans, *(build(family, 4, 6) for family in FAMILIES)]:
        costs = random_costs(plan, rng)
        simulated = simulate(plan, costs)
        assert {t.action: t.end for row in simulated.timeline for t in row} == ends_by_relaxation(plan, costs)
        assert [[t.action for t in row] for row in simulated.timeline] == [list(order) for order in plan.orders]


def test_both_bubbles_of_a_small_step_by_hand() -> None:
    """Rank 0: F0 0-1, B0 6-8. Rank 1 after a hop of 1: F0 2-4, B0 4-5 and a hop of 1 back."""
    plan = build("1f1b", 2, 1)
    costs = Costs(
        [1, 2], [1, 1], [1, 0], {Edge(0, 1, "activation"): 1, Edge(1, 0, "gradient"): 1}, [5, 7], [0, 0]
    )  # fmt: skip
    simulated = simulate(plan, costs)
    assert [[(t.start, t.end) for t in row] for row in simulated.timeline] == [[(0, 1), (6, 8)], [(2, 4), (4, 5)]]
    assert simulated.makespan == 8
    assert simulated.bubble_span == 1 - 3 / 8
    assert simulated.bubble_makespan == 1 - 6 / 16
    assert simulated.peak_memory == (5, 7)
    assert simulated.slots_used == {Edge(0, 1, "activation"): 1, Edge(1, 0, "gradient"): 1}


def test_span_and_makespan_differ_where_ranks_start_and_end_at_different_times() -> None:
    """A single micro-batch through gpipe: rank 1 is never idle between its first start and last end."""
    simulated = uniform("gpipe", 2, 1, 1, 1, 1, 0)
    assert simulated.makespan == 6
    assert simulated.bubble_span == 0.5  # rank 0 works 3 of 6, rank 1 3 of 3
    assert simulated.bubble_makespan == 0.5
    plan = build("naive", 2, 1)
    uneven = simulate(plan, dataclasses.replace(Costs.uniform(plan), weight_gradient=[0, 4]))
    assert uneven.bubble_span == 1 - 2 / 8  # rank 0 works 2 of 8, rank 1 6 of 6
    assert uneven.bubble_makespan == 1 - 8 / 16


def test_memory_of_deferred_weight_gradients_is_counted_until_w() -> None:
    """Rank 0 of zb-h1 with 2 ranks runs F0 F1 I0 W0 F2 I1 W1 ..., rank 1 F0 I0 F1 I1 W0 F2 ..."""
    plan = build("zb-h1", 2, 4)
    assert simulate(plan, Costs.uniform(plan, activation=10, deferred=3)).peak_memory == (20, 13)
    assert simulate(plan, Costs.uniform(plan, activation=10, deferred=0)).peak_memory == (20, 10)
    assert simulate(plan, Costs.uniform(plan, activation=3, deferred=10)).peak_memory == (13, 20)


def test_slots_used_never_exceed_slots_needed_and_reach_them_when_receivers_are_slow(random_plans: list[Plan]) -> None:
    rng = random.Random(1)
    for plan in random_plans:
        needed = slots_needed(plan)
        used = simulate(plan, random_costs(plan, rng)).slots_used
        assert all(1 <= used[edge] <= needed[edge] for edge in plan.edges)
    gpipe = build("gpipe", 2, 5)
    slow = simulate(gpipe, Costs.uniform(gpipe, forward=1, hop=100)).slots_used
    assert slow[Edge(0, 1, "activation")] == slots_needed(gpipe)[Edge(0, 1, "activation")] == 5
    assert set(simulate(gpipe, Costs.uniform(gpipe)).slots_used.values()) == {1}
    # A hop as long as F: each message is received in the moment in which the next one is sent, into the same slot.
    assert simulate(gpipe, Costs.uniform(gpipe, hop=1)).slots_used[Edge(0, 1, "activation")] == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"forward": [1.0]}, "wrong number of costs forward; got 1; needed 2, one per stage"),
        ({"deferred": [1.0] * 3}, "wrong number of costs deferred; got 3"),
        ({"input_gradient": [1.0, -1.0]}, "bad cost: input_gradient of stage 1; got -1.0"),
        ({"weight_gradient": [float("nan"), 1.0]}, "bad cost: weight_gradient of stage 0; got nan"),
        ({"hop": {}}, "no hop cost for the activation edge 0→1"),
        (
            {"hop": {Edge(0, 1, "activation"): 0.0, Edge(1, 0, "gradient"): float("inf")}},
            "hop of the gradient edge 1→0",
        ),
    ],
)
def test_costs_that_do_not_fit_the_plan_are_refused(change: dict[str, object], problem: str) -> None:
    plan = build("1f1b", 2, 2)
    with pytest.raises(InputError, match=problem):
        simulate(plan, dataclasses.replace(Costs.uniform(plan), **change))  # type: ignore[arg-type]


def test_a_plan_that_deadlocks_cannot_be_simulated() -> None:
    plan = build("1f1b", 2, 2)
    plan = dataclasses.replace(plan, orders=(plan.orders[0][::-1], plan.orders[1]))
    with pytest.raises(DeadlockError, match=r"rank 0 at position 0 \(0RECV_B1\) waits for rank 1"):
        simulate(plan, Costs.uniform(plan))
