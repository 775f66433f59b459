"""Times and memory of the families on one chain against published figures, another simulator's, and closed forms."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from pipex.errors import InputError, PlanError
from pipex.plan.actions import Kind
from pipex.plan.bounds import smallest_memory
from pipex.plan.costs import RankCosts
from pipex.plan.families import build
from pipex.plan.families.updates import with_updates
from pipex.plan.memory import peak_memory
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, simulate
from pipex.plan.validator import validate

Times = tuple[float, float, float]
"""F, I, W of a whole rank"""


def run(family: str, ranks: int, microbatches: int, times: Times, hop: float = 0, **options: int) -> Simulation:
    """A micro-batch takes 12 units of memory on a rank, from F to W: a whole number for each chunk."""
    plan = build(family, ranks, microbatches, **options)
    return simulate(plan, RankCosts.of(ranks, *times, hop, activation=12).on(plan.placement))


# What another simulator found: bubble of the makespan, bubble of the span, and the most micro-batches (of a whole
# rank) held from F to W, for P4 M8, P8 M32 and P16 M64.
SIZES = [(4, 8), (8, 32), (16, 64)]
Row = tuple[float, float, float]
SCOREBOARD: list[tuple[str, dict[str, int], list[Row]]] = [
    ("gpipe", {}, [(.2727, .2727, 8), (.1795, .1795, 32), (.1899, .1899, 64)]),
    ("1f1b", {}, [(.2727, .2727, 4), (.1795, .1795, 8), (.1899, .1899, 16)]),
    ("interleaved", {"chunks": 2}, [(.1579, .1579, 5.5), (.0986, .0986, 11.5), (.1049, .1049, 23.5)]),
    ("interleaved", {"chunks": 4}, [(.0857, .0857, 4.75), (.0519, .0519, 9.75), (.0554, .0554, 19.75)]),
    ("looped-bfs", {"chunks": 2}, [(.1579, .1579, 8), (.0986, .0986, 32), (.1049, .1049, 64)]),
    ("zb-h1", {}, [(.1111, .1111, 4), (.0680, .0680, 8), (.0725, .0725, 16)]),
    ("zb-h2", {}, [(.1111, 0, 7), (.0680, 0, 15), (.0725, 0, 31)]),
    ("interleaved-zb", {"chunks": 2}, [(.0588, .0588, 4), (.0352, .0352, 8), (.0376, .0376, 16)]),
    ("interleaved-zb", {"chunks": 3}, [(.0400, .0400, 4), (.0237, .0237, 8), (.0254, .0254, 16)]),
    ("interleaved-zb", {"chunks": 4}, [(.0303, .0303, 4), (.0179, .0179, 8), (.0192, .0192, 16)]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options", "rows"), SCOREBOARD)
def test_bubbles_and_memory_at_equal_times(family: str, options: dict[str, int], rows: list[Row]) -> None:
    for (ranks, microbatches), (makespan, span, memory) in zip(SIZES, rows, strict=True):
        simulated = run(family, ranks, microbatches, (1, 1, 1), **options)
        assert simulated.bubble_makespan == pytest.approx(makespan, abs=0.5001e-4)
        assert simulated.bubble_span == pytest.approx(span, abs=0.5001e-4)
        assert max(simulated.peak_memory) == 12 * memory


# Bubbles of the makespan at F, I, W, hop = 100, 100, 65, 2; zb-h2 has another one of the span.
REALISTIC: list[tuple[str, dict[str, int], list[float], list[float]]] = [
    ("gpipe", {}, [.2757, .1817, .1922], [.2757, .1817, .1922]),
    ("1f1b", {}, [.2806, .1901, .2012], [.2806, .1901, .2012]),
    ("interleaved", {"chunks": 2}, [.1672, .1043, .1107], [.1672, .1043, .1107]),
    ("interleaved", {"chunks": 4}, [.1088, .0648, .0684], [.1088, .0648, .0684]),
    ("looped-bfs", {"chunks": 2}, [.1619, .1013, .1077], [.1619, .1013, .1077]),
    ("zb-h1", {}, [.1683, .1056, .1123], [.1683, .1056, .1123]),
    ("zb-h2", {}, [.1261, .0777, .0827], [.0948, .0576, .0614]),
    ("interleaved-zb", {"chunks": 2}, [.0996, .0603, .0643], [.0996, .0603, .0643]),
    ("interleaved-zb", {"chunks": 3}, [.0763, .0454, .0482], [.0763, .0454, .0482]),
    ("interleaved-zb", {"chunks": 4}, [.0658, .0386, .0408], [.0658, .0386, .0408]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options", "makespans", "spans"), REALISTIC)
def test_bubbles_at_realistic_times(
    family: str, options: dict[str, int], makespans: list[float], spans: list[float]
) -> None:
    for (ranks, microbatches), makespan, span in zip(SIZES, makespans, spans, strict=True):
        simulated = run(family, ranks, microbatches, (100, 100, 65), 2, **options)
        assert simulated.bubble_makespan == pytest.approx(makespan, abs=0.5001e-4)
        assert simulated.bubble_span == pytest.approx(span, abs=0.5001e-4)


# Bubbles of the makespan for F = I = W = 1, P8 M64 and hops of 0, .1, .2 and .5.
HOPS = [
    ("1f1b", {}, [.0986, .1482, .1926, .3018]),
    ("1f1b", {"warmup": 7}, [.0986, .1045, .1103, .1273]),
    ("zb-h1", {}, [.0352, .0486, .0616, .0986]),
    ("zb-h2", {}, [.0352, .0386, .0419, .0519]),
    ("interleaved", {"chunks": 2}, [.0519, .0657, .0791, .1172]),
    ("interleaved", {"chunks": 4}, [.0266, .0563, .0842, .3075]),
]  # fmt: skip


@pytest.mark.parametrize(("family", "options", "bubbles"), HOPS)
def test_what_hops_cost(family: str, options: dict[str, int], bubbles: list[float]) -> None:
    for hop, bubble in zip([0, 0.1, 0.2, 0.5], bubbles, strict=True):
        simulated = run(family, 8, 64, (1, 1, 1), hop, **options)
        assert simulated.bubble_makespan == pytest.approx(bubble, abs=0.5001e-4)


def test_eager_1f1b_pays_for_it_in_memory() -> None:
    assert build("1f1b", 8, 64).peak_activations == (8, 7, 6, 5, 4, 3, 2, 1)
    assert build("1f1b", 8, 64, warmup=2).peak_activations == (10, 9, 8, 7, 6, 5, 3, 1)
    assert build("1f1b", 8, 64, warmup=7).peak_activations == (15, 13, 11, 9, 7, 5, 3, 1)


@pytest.mark.parametrize(
    ("group", "bubble", "memory"), [(4, 0.0986, 4.75), (6, 0.0778, 6.25), (8, 0.0560, 7.75), (16, 0.0560, 13.75)]
)
def test_larger_groups_hide_hops_and_hold_more(group: int, bubble: float, memory: float) -> None:
    """P4 V4 M16, F = I = W = 1, hops of .1 and of 0."""
    with_hops = run("interleaved", 4, 16, (1, 1, 1), 0.1, chunks=4, group=group)
    assert with_hops.bubble_makespan == pytest.approx(bubble, abs=0.5001e-4)
    assert max(with_hops.peak_memory) == 12 * memory
    without = run("interleaved", 4, 16, (1, 1, 1), chunks=4, group=group)
    assert without.bubble_makespan == pytest.approx(0.0448, abs=0.5001e-4)


# Whole numbers and shares of them by 2, 3 and 4, so that all sums are exact.
TIMES: list[Times] = [(12, 12, 12), (84, 132, 60), (12, 36, 36)]
CHAINS = [(1, 1), (1, 5), (2, 2), (2, 6), (3, 3), (3, 7), (4, 4), (4, 11), (5, 10), (8, 8), (8, 24)]


@pytest.mark.parametrize(("p", "m"), CHAINS)
def test_makespans_without_hops_are_the_closed_forms(p: int, m: int) -> None:
    for times in TIMES:
        f, i, w = times
        t = f + i + w
        for v in (1, 2, 3, 4):
            for family in ("interleaved", "looped-bfs"):
                assert run(family, p, m, times, chunks=v).makespan == m * t + (p - 1) * t / v
            assert run("forward-only", p, m, times, chunks=v).makespan == m * f + (p - 1) * f / v
            if f == i == w:
                assert run("interleaved-zb", p, m, times, chunks=v).makespan == m * t + (p - 1) * (f + i - w) / v
        for warmup in range(p):
            assert run("1f1b", p, m, times, warmup=warmup).makespan == (m + p - 1) * t
        for family in ("pipedream", "pipedream-2bw"):
            assert run(family, p, m, times).makespan == (m + p - 1) * t
        if m >= 2 * p - 1 and w <= min(f, i):
            zb_h2 = run("zb-h2", p, m, times)
            assert zb_h2.makespan == m * t + (p - 1) * max(f, f + i - 2 * w)
            spans = [row[-1].end - row[0].start for row in zb_h2.timeline]
            assert max(spans) == m * t + (p - 1) * (f + i - 2 * w)


@pytest.mark.parametrize(("p", "m"), CHAINS)
def test_makespans_with_hops_are_the_closed_forms(p: int, m: int) -> None:
    for times in TIMES:
        f, i, w = times
        t = f + i + w
        for hop in (0.25, t / 8, t / 2):
            eager = run("1f1b", p, m, times, hop, warmup=p - 1)
            assert eager.makespan == (m + p - 1) * t + 2 * (p - 1) * hop
            if m % p == 0:
                plain = (2 * (p - 1) * m // p + 2 * p - 4) if p > 1 else 0
                assert run("1f1b", p, m, times, hop).makespan == (m + p - 1) * t + plain * hop
        for v in (1, 2, 4):
            for hop in (0.25, f / v / 4, f / v / 2):
                if m % p == 0:
                    hops = 2 * p * v - 2 if p > 1 else 0
                    interleaved = run("interleaved", p, m, times, hop, chunks=v)
                    assert interleaved.makespan == m * t + (p - 1) * t / v + hops * hop
                if v == 1 or m * min(f, i + w) >= p * (min(f, i + w) + hop * v):
                    bfs = run("looped-bfs", p, m, times, hop, chunks=v)
                    assert bfs.makespan == m * t + (p - 1) * t / v + 2 * (p - 1) * hop
                if v == 1 or m >= 2 * p:
                    forward = run("forward-only", p, m, times, hop, chunks=v)
                    assert forward.makespan == m * f + (p - 1) * (f / v + hop)


def test_the_zero_bubble_paper_s_interleaved_column_is_matched_within_the_hops_it_leaves_unexplained() -> None:
    """arXiv 2401.10241, table 5, 1F1B-I at V = (layers + 2) / P. The column fits (2PV-P-2) hops beyond the ideal, the
    order of Megatron-LM has (2PV-2): the rates differ by no more than P hops can make."""
    column = [
        (8, 3, 24, (18.522, 18.086, 9.337), 0.601, 0.1055),
        (8, 3, 32, (18.513, 18.086, 9.331), 0.626, 0.0818),
        (8, 3, 64, (18.546, 18.097, 9.321), 0.762, 0.0443),
        (8, 4, 24, (29.718, 29.444, 19.927), 0.527, 0.0808),
        (8, 4, 32, (29.802, 29.428, 19.530), 0.577, 0.0628),
        (8, 4, 64, (29.935, 29.621, 19.388), 0.535, 0.0320),
        (32, 2, 96, (10.419, 10.207, 7.715), 0.408, 0.1493),
        (32, 2, 128, (10.408, 10.204, 7.703), 0.408, 0.1164),
        (32, 2, 256, (10.402, 10.248, 7.698), 0.460, 0.0624),
    ]
    for p, v, m, times, hop, rate in column:
        makespan = run("interleaved", p, m, times, hop, chunks=v).makespan
        assert 1 - m * sum(times) / (makespan - p * hop) == pytest.approx(rate, abs=0.5001e-4)


@pytest.mark.parametrize("rank", range(8))
def test_memory_of_the_zero_bubble_orders_is_that_of_the_paper(rank: int) -> None:
    """arXiv 2401.10241: worker i (from 1) holds (P-i+1) M_B + (i-1) M_W in zb-h1 and (2P-2i+1) M_B + (2i-2) M_W in
    zb-h2."""
    for family, whole, deferred in [("zb-h1", 8 - rank, rank), ("zb-h2", 15 - 2 * rank, 2 * rank)]:
        plan = build(family, 8, 24)
        costs = RankCosts.of(8, activation=100, deferred=41).on(plan.placement)
        assert simulate(plan, costs).peak_memory[rank] == whole * 100 + deferred * 41


@pytest.mark.parametrize("family", ["pipedream", "pipedream-2bw"])
@pytest.mark.parametrize(("p", "m"), [(1, 1), (2, 3), (4, 4), (8, 11)])
def test_without_a_flush_more_micro_batches_take_their_work_and_nothing_else(family: str, p: int, m: int) -> None:
    for times in TIMES:
        longer, shorter = run(family, p, 3 * m, times), run(family, p, m, times)
        assert longer.makespan - shorter.makespan == 2 * m * sum(times)


def versions_alive(order: Iterable[Kind], reads: list[int], made_after: list[int]) -> int:
    """The most versions of its weights that a rank must keep. Version 0 is there from the start, version v+1 from the
    end of the ``made_after[v]``-th backward (from 1) on; micro-batch m reads version ``reads[m]`` in F and in B. A
    version is kept from its making until no micro-batch to come reads it."""
    forwards = backwards = 0
    most = 1
    for kind in order:
        if kind is Kind.F:
            assert reads[forwards] <= sum(after <= backwards for after in made_after), "read before it was made"
            forwards += 1
        else:
            backwards += 1
        newest = sum(after <= backwards for after in made_after)
        needed = {v for v in reads[backwards:] if v <= newest}
        most = max(most, len(needed | {newest}))
    return most


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_pipedream_keeps_as_many_versions_as_it_says(ranks: int) -> None:
    """A micro-batch reads the newest version that there is at its F; every backward makes one."""
    plan = build("pipedream", ranks, 5 * ranks)
    for rank, order in enumerate(plan.orders):
        order = [action for action in order if action.kind is not Kind.UPDATE]
        reads = [sum(a.kind is Kind.B for a in order[:at]) for at, a in enumerate(order) if a.kind is Kind.F]
        made_after = list(range(1, plan.microbatches + 1))
        assert versions_alive([a.kind for a in order], reads, made_after) == plan.weight_versions[rank] == ranks - rank


def delayed_versions(ranks: int, per_update: int) -> list[int]:
    """Versions alive per rank when six updates of ``per_update`` micro-batches follow each other in the order that
    pipedream-2bw has for all of them: W(t+1) = W(t) - lr g(W(t-1)), so those of update t read version t-1."""
    plan = build("1f1b", ranks, 6 * per_update)
    if per_update >= ranks:
        orders = build("pipedream-2bw", ranks, 6 * per_update, updates=6).orders
        assert plan.orders == tuple(tuple(a for a in order if a.kind is not Kind.UPDATE) for order in orders)
    reads = [max(0, m // per_update - 1) for m in range(plan.microbatches)]
    made_after = [per_update * (update + 1) for update in range(6)]
    return [versions_alive([a.kind for a in order], reads, made_after) for order in plan.orders]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_pipedream_2bw_keeps_two_versions_from_as_many_micro_batches_as_ranks_on(ranks: int) -> None:
    for per_update in (ranks, ranks + 1, 2 * ranks, 3 * ranks + 1):
        assert build("pipedream-2bw", ranks, per_update).weight_versions == (2,) * ranks
        assert delayed_versions(ranks, per_update) == [2] * ranks


@pytest.mark.parametrize("ranks", [3, 4, 8])
def test_pipedream_2bw_with_fewer_micro_batches_would_not_have_its_version_in_time(ranks: int) -> None:
    """Rank 0 has P micro-batches under way: with fewer than P-1 per update, one enters too early."""
    with pytest.raises(AssertionError, match="read before it was made"):
        delayed_versions(ranks, ranks - 2)
    plain = replace(build("1f1b", ranks, 6 * (ranks - 2)), update="delayed")
    with pytest.raises(PlanError, match="uses weights that are not made yet"):
        validate(replace(plain, orders=with_updates(plain.orders, ranks - 2)))
    plain = replace(build("1f1b", ranks, 6 * (ranks - 1)), update="delayed")
    validate(replace(plain, orders=with_updates(plain.orders, ranks - 1)))
    with pytest.raises(PlanError, match="too few micro-batches per update"):
        build("pipedream-2bw", ranks, ranks - 1)


def test_only_the_asynchronous_families_and_forward_only_change_the_weights_otherwise() -> None:
    def update(plan: Plan) -> str:
        return plan.update

    assert update(build("pipedream", 2, 4)) == "microbatch"
    assert update(build("pipedream-2bw", 2, 4)) == "delayed"
    assert update(build("forward-only", 2, 4)) == "never"


def random_costs(rng: random.Random, ranks: int) -> RankCosts:
    def each(low: int, high: int) -> list[float]:
        return [rng.randint(low, high) for _ in range(ranks)]

    times = each(5, 20), each(5, 20), each(0, 15)
    return RankCosts.of(ranks, *times, hop=rng.randint(0, 4), activation=each(3, 9), deferred=each(1, 3))


def test_interleaved_zb_planned_with_costs_is_valid_within_its_limit_and_never_longer_than_published() -> None:
    rng = random.Random(0)
    shorter = 0
    for _ in range(40):
        ranks, microbatches, chunks = rng.randint(1, 5), rng.randint(1, 12), rng.randint(1, 4)
        costs = random_costs(rng, ranks)
        sizes: dict[str, Any] = {"ranks": ranks, "microbatches": microbatches, "chunks": chunks}
        published = build("interleaved-zb", **sizes)
        stage_costs = costs.on(published.placement)
        before = simulate(published, stage_costs)
        least = smallest_memory(published.placement, stage_costs)
        tight = [(low + peak) / 2 for low, peak in zip(least, before.peak_memory, strict=True)]
        for limit in (None, tight):
            plan = build("interleaved-zb", **sizes, costs=costs, memory=limit)
            validate(plan)
            after = simulate(plan, stage_costs)
            most = before.peak_memory if limit is None else limit
            assert all(peak <= top * (1 + 1e-9) for peak, top in zip(after.peak_memory, most, strict=True))
            ones = [1] * plan.placement.stages
            assert peak_memory(plan, ones, ones) == plan.peak_activations
            if limit is None:
                assert after.makespan <= before.makespan * (1 + 1e-9)
                shorter += after.makespan < before.makespan * (1 - 1e-9)
    assert shorter > 10


@pytest.mark.parametrize(("chunks", "published", "bubble"), [(2, 0.0603, 0.0575), (4, 0.0386, 0.0340)])
def test_interleaved_zb_planned_with_realistic_times_beats_the_published_order(
    chunks: int, published: float, bubble: float
) -> None:
    """P8 M32, F, I, W, hop = 100, 100, 65, 2, at the memory of 1F1B."""
    costs = RankCosts.of(8, 100, 100, 65, 2)
    plan = build("interleaved-zb", 8, 32, chunks=chunks, costs=costs)
    simulated = simulate(plan, costs.on(plan.placement))
    assert simulated.bubble_makespan < bubble < published
    assert max(plan.peak_activations) == 8 * chunks
    assert build("interleaved-zb", 8, 32, chunks=chunks, costs=costs, memory=8) == plan


def test_interleaved_zb_says_which_memory_it_needs() -> None:
    with pytest.raises(InputError, match=r"memory limit of rank 0; got 0\.5; needed at least 1, what one micro-batch"):
        build("interleaved-zb", 4, 8, costs=RankCosts.of(4), memory=0.5)
    with pytest.raises(InputError, match="wrong number of memory limits; got 3; needed 4, one per rank"):
        build("interleaved-zb", 4, 8, memory=[4, 4, 4])
    with pytest.raises(InputError, match="the costs are of another number of ranks; got 2; needed 4"):
        build("interleaved-zb", 4, 8, costs=RankCosts.of(2))


@pytest.mark.parametrize("family", ["zb-auto", "interleaved-zb"])
@pytest.mark.parametrize("limit", [None, 4.0])
def test_a_limit_counts_weights_where_the_costs_have_them(family: str, limit: float | None) -> None:
    weights = (5, 6, 7, 8)
    counted = RankCosts.of(4, 3, 3, 2, weights=weights)
    limits = None if limit is None else [limit + own for own in weights]
    plain = build(family, 4, 8, costs=RankCosts.of(4, 3, 3, 2), memory=limit)
    assert build(family, 4, 8, costs=counted, memory=limits).orders == plain.orders
    with pytest.raises(InputError, match=r"got 5\.5; needed at least 6.*, and the weights|one micro-batch and the wei"):
        build(family, 4, 8, costs=counted, memory=5.5)
