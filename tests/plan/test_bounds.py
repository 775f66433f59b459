"""Lower bounds against printed figures, against the best of all orders that there are, and against real plans."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from itertools import permutations, product

import pytest

from pipex.errors import InputError, PlanError
from pipex.plan.bounds import Bound, Spare, check_limit, makespan_bound, smallest_memory, span_bound
from pipex.plan.costs import Costs, RankCosts
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Edge, Placement, PlacementName
from pipex.plan.plan import Plan
from pipex.plan.simulator import simulate


def bubble(ranks: int, microbatches: int, placement: Placement, limit: float | None, last: float = 1.0) -> float:
    """The makespan bubble at the bound with F, I, W, hop = 100, 100, 65, 2, and the last rank so many times slower."""
    share = [1.0] * (ranks - 1) + [last]
    model = RankCosts.of(ranks, [100 * x for x in share], [100 * x for x in share], [65 * x for x in share], 2)
    limits = [limit] * ranks if limit is not None else None
    bound = makespan_bound(placement, microbatches, model.on(placement), limits)
    return 1 - microbatches * 265 * last / bound.value


# Best known schedules (a study by search) that lie at the bound, and the bound where they do not.
@pytest.mark.parametrize(
    ("ranks", "microbatches", "v1", "loop_2", "loop_4", "v"),
    [
        (4, 8, 0.1683, 0.0742, 0.0498, 0.0734),
        (8, 32, 0.1056, 0.0444, 0.0287, 0.0442),
        (16, 64, 0.1123, 0.0473, 0.0304, 0.0472),
        (32, 256, 0.0613, 0.0250, 0.0158, 0.0250),
    ],
)
def test_bounds_at_the_memory_of_1f1b(
    ranks: int, microbatches: int, v1: float, loop_2: float, loop_4: float, v: float
) -> None:
    for placement, expected in (
        (Placement("loop", ranks), v1),
        (Placement("loop", ranks, 2), loop_2),
        (Placement("loop", ranks, 4), loop_4),
        (Placement("v", ranks, 2), v),
    ):
        assert bubble(ranks, microbatches, placement, ranks) == pytest.approx(expected, abs=0.5001e-4)


def test_bounds_with_other_memory_and_with_a_heavy_last_rank() -> None:
    loop_1, loop_2, loop_4 = (Placement("loop", 8, chunks) for chunks in (1, 2, 4))
    v = Placement("v", 8, 2)
    for placement, limit, expected in [
        (loop_2, None, 0.0412), (loop_4, None, 0.0218), (v, None, 0.0412),
        (v, 8.5, 0.0412), (loop_4, 9, 0.0218), (v, 6, 0.0888),
    ]:  # fmt: skip
        assert bubble(8, 32, placement, limit) == pytest.approx(expected, abs=0.5001e-4)
    for placement, expected in [(loop_1, 0.0690), (loop_2, 0.0320), (loop_4, 0.0169), (v, 0.0320)]:
        assert bubble(8, 32, placement, 8, last=1.3) == pytest.approx(expected, abs=0.5001e-4)


def test_closed_forms() -> None:
    """Makespan: the barrier bound, the first I at the memory of 1F1B. Span: ZB-1p of the Zero Bubble paper, table 5."""
    for p, chunks, f, i, w, c in product((2, 3, 8), (1, 2, 3), (6, 12), (6, 18), (3,), (0, 1)):
        loop = Placement("loop", p, chunks)
        costs = RankCosts.of(p, f, i, w, c).on(loop)
        work = 4 * p * (f + i + w)
        assert makespan_bound(loop, 4 * p, costs).value >= work + (p - 1) * (f / chunks + c)
        first_i = (p - 1) * i / chunks + (p * chunks + p - 2) * c
        last_f = (p - 1) * (f - w + 2 * c) if chunks == 1 else 0
        assert makespan_bound(loop, 4 * p, costs, [p] * p).value >= work + first_i + last_f
    zb_1p = RankCosts.of(8, 18.522, 18.086, 9.337, 0.601).on(Placement("loop", 8))
    bound = span_bound(Placement("loop", 8), 24, zb_1p, [8] * 8)
    assert 1 - 24 * (18.522 + 18.086 + 9.337) / bound.value == pytest.approx(0.1585, abs=0.5001e-4)


def test_reasons_name_rank_and_times() -> None:
    loop = Placement("loop", 4)
    costs = RankCosts.of(4, 100, 100, 65, 2).on(loop)
    assert makespan_bound(loop, 8, costs, [4] * 4) == Bound(
        2549, "rank 0 has 2120 of work and must be idle for 312 before its first I and for 117 after its last F"
    )
    assert makespan_bound(loop, 8, costs) == Bound(
        2426, "rank 3 has 2120 of work and must be idle for 306 before its first I"
    )
    assert span_bound(loop, 8, costs) == Bound(2120, "rank 0 has 2120 of work")
    assert makespan_bound(loop, 1, costs) == Bound(
        4 * 200 + 6 * 2 + 65, "rank 0 has 265 of work and must be idle for 612 before its first I"
    )
    reason = makespan_bound(loop, 8, costs, [1] * 4).reason
    assert reason == "rank 0 holds its micro-batches for so long that its memory is full for 7016"
    slow = Costs(
        [2, 4, 1], [2, 1, 1], [0] * 3, {e: 5.0 * (2 in e) for e in Placement("loop", 3).edges}, [1] * 3, [1] * 3
    )
    assert makespan_bound(Placement("loop", 3), 3, slow) == Bound(
        29, "rank 1 has 15 of work and must be idle for 2 before its first F and for 12 after its last F"
    )
    v = Placement("v", 3, 2)  # rank 1 holds stage 1 from 2 to 18, then its W, and stage 4 from 7 to 13, then its W
    full = makespan_bound(v, 4, RankCosts.of(3, 2, 2, 2, 1).on(v), [9, 1, 9])
    assert full.value == pytest.approx(2 + 4 * 12)
    assert full.reason == "rank 1 holds its micro-batches for so long that its memory is full for 48"
    fused = dataclasses.replace(RankCosts.of(4, 100, 100, 65).on(loop), overlap=0.5)
    assert makespan_bound(loop, 8, fused).value == (2120 + 300) / 2
    v = Placement("v", 2, 2)
    one_way = Costs([0, 9, 0, 0], [0] * 4, [0] * 4, dict.fromkeys(v.edges, 1.0), [1] * 4, [1] * 4)
    assert makespan_bound(v, 1, one_way).value == 13


def test_a_limit_that_no_plan_fits_is_refused_with_the_smallest_that_one_fits() -> None:
    loop = Placement("loop", 2, 2)
    costs = Costs([1] * 4, [1] * 4, [1] * 4, dict.fromkeys(loop.edges, 0.0), [1, 2, 3, 4], [0] * 4)
    assert smallest_memory(loop, costs) == (4, 6)
    check_limit(loop, costs, (4, 6))
    with pytest.raises(InputError, match=r"memory limit of rank 1; got 5\.5; needed at least 6, what one micro-batch"):
        makespan_bound(loop, 8, costs, (4, 5.5))
    with pytest.raises(InputError, match="memory limit of rank 0; got nan"):
        span_bound(loop, 8, costs, (float("nan"), 6))
    with pytest.raises(InputError, match="wrong number of memory limits; got 1; needed 2, one per rank"):
        span_bound(loop, 8, costs, (8,))
    assert (
        makespan_bound(loop, 8, costs, (0, 0), update="never").value
        == makespan_bound(loop, 8, costs, None, "never").value
    )
    thirds = RankCosts.of(2).on(Placement("loop", 2, 3))
    check_limit(Placement("loop", 2, 3), thirds, (1, 1))


# --- all orders there are ------------------------------------------------------------------------------------------

Job = tuple[str, int, int]
"""kind, stage, micro-batch"""


def orders_of(stages: tuple[int, ...], microbatches: int, simple: bool) -> list[tuple[Job, ...]]:
    """Every order of one rank's F, I, W, and with a B in the place of I and W, that keeps F before I before W and the
    stages of a rank in the order in which a micro-batch passes them; ``simple``: no B, and micro-batches rising."""
    found = []
    for whole in product((False,) if simple else (False, True), repeat=len(stages) * microbatches):
        is_whole = dict(zip(product(stages, range(microbatches)), whole, strict=True))

        def extend(done: tuple[Job, ...], left: frozenset[Job]) -> Iterator[tuple[Job, ...]]:
            if not left:
                yield done
            for job in sorted(left):
                kind, stage, m = job
                needs = {
                    "F": [("F", s, m) for s in stages if s < stage],
                    "I": [("F", stage, m)] + [(b, s, m) for s in stages if s > stage for b in "IB"],
                    "W": [("I", stage, m)],
                }["I" if kind == "B" else kind]
                if simple:
                    needs.append((kind, stage, m - 1))
                if not any(need in left for need in needs):
                    yield from extend((*done, job), left - {job})

        jobs = [(k, s, m) for (s, m), b in is_whole.items() for k in ("FB" if b else "FIW")]
        found += extend((), frozenset(jobs))
    return found


def times_of(
    orders: tuple[tuple[Job, ...], ...],
    takes: dict[str, list[float]],
    hop: dict[tuple[int, int], float],
    firsts: tuple[int, ...] = (0,),
) -> list[list[tuple[float, float]]] | None:
    """Per rank start and end of every job, or None if the ranks wait for ever; ``hop`` from stage to stage. A pipe
    begins at each stage of ``firsts``."""
    ends: dict[tuple[bool, int, int], float] = {}
    rows: list[list[tuple[float, float]]] = [[] for _ in orders]
    last = max(stage for order in orders for _, stage, _ in order)
    moved = True
    while moved:
        moved = False
        for row, order in zip(rows, orders, strict=True):
            while len(row) < len(order):
                kind, stage, m = order[len(row)]
                start = row[-1][1] if row else 0.0
                source = stage - 1 if kind == "F" else stage + 1
                if kind != "W" and max(stage, source) not in (*firsts, last + 1):
                    if (kind == "F", source, m) not in ends:
                        break
                    start = max(start, ends[kind == "F", source, m] + hop.get((source, stage), 0.0))
                end = start + sum(takes[k][stage] for k in ("IW" if kind == "B" else kind))
                if kind != "W":
                    ends[kind == "F", stage, m] = end
                row.append((start, end))
                moved = True
    return rows if all(len(row) == len(order) for row, order in zip(rows, orders, strict=True)) else None


def peak_of(order: tuple[Job, ...], activation: list[float], deferred: list[float]) -> float:
    held, peak = 0.0, 0.0
    for kind, s, _ in order:
        held += {"F": activation[s], "I": deferred[s] - activation[s], "W": -deferred[s], "B": -activation[s]}[kind]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "microbatches", "simple", "draws"),
    [
        ("loop", 1, 1, 3, False, 20), ("loop", 2, 1, 1, False, 100), ("loop", 2, 1, 2, False, 30),
        ("loop", 2, 1, 3, True, 40), ("loop", 3, 1, 1, False, 100), ("loop", 3, 1, 2, True, 10),
        ("v", 2, 2, 1, False, 60), ("loop", 2, 2, 1, False, 60), ("loop", 1, 2, 2, False, 5),
    ],
)  # fmt: skip
def test_no_order_at_all_beats_a_bound(
    name: PlacementName, ranks: int, chunks: int, microbatches: int, simple: bool, draws: int
) -> None:
    placement = Placement(name, ranks, chunks)
    every = list(product(*(orders_of(placement.stages_of(rank), microbatches, simple) for rank in range(ranks))))
    rng = random.Random(f"{name}{ranks}{chunks}{microbatches}")
    reached = 0
    for _ in range(draws):
        f, i, w, activation, deferred = (
            [float(rng.choice((0, 1, 2, 3, 5, 9))) for _ in range(placement.stages)] for _ in range(5)
        )
        hop = {edge: float(rng.choice((0, 1, 4))) for edge in placement.edges}
        costs = Costs(f, i, w, hop, activation, deferred)
        limits = [need + rng.choice((0, 1, 2, 4, 99)) for need in smallest_memory(placement, costs)]
        links = {(edge.source, edge.destination): time for edge, time in hop.items()}
        makespan = span = float("inf")
        for orders in every:
            if any(peak_of(o, activation, deferred) > most for o, most in zip(orders, limits, strict=True)):
                continue
            if rows := times_of(orders, {"F": f, "I": i, "W": w}, links):
                makespan = min(makespan, max(row[-1][1] for row in rows))
                span = min(span, max(row[-1][1] - row[0][0] for row in rows))
        bounds = (
            makespan_bound(placement, microbatches, costs, limits),
            span_bound(placement, microbatches, costs, limits),
        )
        assert bounds[0].value <= makespan * (1 + 1e-9)
        assert bounds[1].value <= span * (1 + 1e-9)
        reached += (bounds[0].value == pytest.approx(makespan)) + (bounds[1].value == pytest.approx(span))
    assert reached > draws / 2  # a bound that is never reached would prove little


def one_micro_batch_per_stage(stages: Sequence[int]) -> list[tuple[Job, ...]]:
    """Every order of a rank whose stages, of different pipes, are passed by one micro-batch each, their numbers."""
    found = set()
    for wholes in product(("FIW", "FB"), repeat=len(stages)):
        for turns in set(permutations([s for s, kinds in zip(stages, wholes, strict=True) for _ in kinds])):
            kinds = {stage: iter(kinds) for stage, kinds in zip(stages, wholes, strict=True)}
            found.add(tuple((next(kinds[stage]), stage, 0) for stage in turns))
    return sorted(found)


def test_no_order_with_two_copies_beats_a_bound() -> None:
    """Two ranks and two micro-batches: one down, one up; or both in one of the pipes, whose weights are then the only
    ones in use, but both copies are held and added up all the same."""
    placement = Placement("bidirectional", 2, 2)
    one_each = list(product(*(one_micro_batch_per_stage(placement.stages_of(rank)) for rank in range(2))))
    alike = [list(product(*(orders_of((stage,), 2, False) for stage in stages))) for stages in ((0, 1), (3, 2))]
    rng = random.Random(8)
    reached = 0
    for draw in range(40):
        pieces = [[float(rng.choice((0, 1, 2, 3, 5, 9))) for _ in range(4)] for _ in range(6)]
        if draw % 2:  # pieces that cost the same wherever they are
            pieces = [piece[:2] * 2 for piece in pieces]
        f, i, w, activation, deferred, weights = pieces
        hop = {edge: float(rng.choice((0, 1, 4))) for edge in placement.edges}
        costs = Costs(f, i, w, hop, activation, deferred, weights=weights, exchange=float(rng.choice((0, 3))))
        held = [weights[0] + weights[3], weights[1] + weights[2]]
        limits = [need + rng.choice((0, 1, 2, 4, 99)) for need in smallest_memory(placement, costs)]
        links = {(edge.source, edge.destination): time for edge, time in hop.items()}
        makespan = span = float("inf")
        for orders in [*one_each, *alike[0], *alike[1]]:
            peaks = [peak_of(order, activation, deferred) for order in orders]
            if any(peak + own > most for peak, own, most in zip(peaks, held, limits, strict=True)):
                continue
            if rows := times_of(orders, {"F": f, "I": i, "W": w}, links, firsts=(0, 2)):
                end = max(row[-1][1] for row in rows) + costs.exchange
                makespan = min(makespan, end)
                span = min(span, max(end - row[0][0] for row in rows))
        bounds = makespan_bound(placement, 2, costs, limits), span_bound(placement, 2, costs, limits)
        assert bounds[0].value <= makespan * (1 + 1e-9)
        assert bounds[1].value <= span * (1 + 1e-9)
        reached += (bounds[0].value == pytest.approx(makespan)) + (bounds[1].value == pytest.approx(span))
    assert reached > 15  # a bound that is never reached would prove little


def some_plans(rng: random.Random) -> Iterator[Plan]:
    """Of every family a few sizes that fit it, chunks as they come."""
    for family in FAMILIES:
        built = 0
        while built < 4:
            ranks, microbatches = rng.randint(1, 5), rng.randint(1, 10)
            try:
                plan = build(family, ranks, microbatches)
            except PlanError:
                continue
            built += 1
            yield plan


def test_no_plan_of_any_family_beats_a_bound() -> None:
    rng = random.Random(3)
    for plan in some_plans(rng):
        placement, stages = plan.placement, plan.placement.stages
        for _ in range(5):
            f, i, w, activation, deferred = ([rng.uniform(0, 9) for _ in range(stages)] for _ in range(5))
            hop = {edge: rng.uniform(0, 3) for edge in placement.edges}
            costs = Costs(f, i, w, hop, activation, deferred, overlap=rng.choice((1.0, 0.8)))
            simulated = simulate(plan, costs)
            limit = simulated.peak_memory
            bound = makespan_bound(placement, plan.microbatches, costs, limit, plan.update)
            assert bound.value <= simulated.makespan * (1 + 1e-9), (plan.family, bound)
            bound = span_bound(placement, plan.microbatches, costs, limit, plan.update)
            assert bound.value <= simulated.span * (1 + 1e-9), (plan.family, bound)


def test_bounds_of_forward_only_are_its_closed_form() -> None:
    """The last rank waits for the way there; on a V it has the way back to go when it has ended as well."""
    for name, chunks, idle in (("loop", 1, 3 * (2 + 1)), ("loop", 2, 3 * (1 + 1)), ("v", 2, 6 * (1 + 1))):
        placement = Placement(name, 4, chunks)  # type: ignore[arg-type]
        costs = RankCosts.of(4, 2, 7, 7, 1).on(placement)
        assert makespan_bound(placement, 20, costs, None, "never").value == 20 * 2 + idle
        assert span_bound(placement, 20, costs, None, "never").value == 20 * 2


def test_two_pipes_share_the_micro_batches() -> None:
    """Stages 0 and 1 go down, 2 and 3 up; a rank has work for the micro-batches of both of its stages."""
    placement = Placement("bidirectional", 2, 2)
    zero = [0.0] * 4
    costs = Costs([3, 1, 1, 1], zero, zero, dict.fromkeys(placement.edges, 0.0), zero, zero)
    assert Edge(1, 2, "activation") not in placement.edges
    assert span_bound(placement, 6, costs).value == 6 + 1  # all in the second pipe, and the last one to its end
    costs = Costs([3, 1, 5, 1], zero, zero, dict.fromkeys(placement.edges, 0.0), zero, zero)
    assert span_bound(placement, 6, costs).value == max(3 * 4 + 1 * 2, 1 * 4 + 5 * 2)


# --- stages that are spared ------------------------------------------------------------------------------------------


def spared_peak(order: tuple[Job, ...], costs: Costs, recomputed: set[int], offloaded: set[int]) -> float:
    """The most that one rank holds, if what is copied out or back is held for no moment longer than F and I take."""
    assert costs.inputs is not None
    held = peak = 0.0
    for kind, s, _ in order:
        kept = costs.inputs[s] if s in recomputed else 0.0 if s in offloaded else costs.activation[s]
        before, during, after = {
            "F": (0.0, max(kept, costs.activation[s] if s in offloaded else kept), kept),
            "I": (kept, costs.activation[s], costs.deferred[s]),
            "B": (kept, costs.activation[s], 0.0),
            "W": (costs.deferred[s], costs.deferred[s], 0.0),
        }[kind]
        peak = max(peak, held - before + during, held - before + after)
        held += after - before
    return peak


@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "microbatches", "draws"),
    [("loop", 2, 1, 2, 40), ("v", 2, 2, 1, 40), ("loop", 2, 2, 1, 40)],
)
def test_no_choice_of_stages_to_spare_beats_a_bound(
    name: PlacementName, ranks: int, chunks: int, microbatches: int, draws: int
) -> None:
    placement = Placement(name, ranks, chunks)
    every = list(product(*(orders_of(placement.stages_of(rank), microbatches, False) for rank in range(ranks))))
    rng = random.Random(f"{name}{ranks}{chunks}{microbatches}")
    reached = gained = 0
    for _ in range(draws):
        f, i, w, activation, deferred, again = (
            [float(rng.choice((1, 2, 3, 5, 9))) for _ in range(placement.stages)] for _ in range(6)
        )
        inputs = [rng.choice((0.0, 0.25, 0.5)) * most for most in activation]
        hop = {edge: float(rng.choice((0, 1, 4))) for edge in placement.edges}
        costs = Costs(f, i, w, hop, activation, deferred, inputs=inputs, recompute=again)
        links = {(edge.source, edge.destination): time for edge, time in hop.items()}
        spare: tuple[Spare, ...] = rng.choice((("recompute",), ("offload",), ("recompute", "offload")))
        least = smallest_memory(placement, costs, spare)
        limits = [need + rng.choice((0, 0, 1, 2)) for need in least]
        best: dict[bool, float] = {}
        fullest = [float("inf")] * ranks
        for chosen in product(("", *spare), repeat=placement.stages):
            recomputed = {s for s, way in enumerate(chosen) if way == "recompute"}
            offloaded = {s for s, way in enumerate(chosen) if way == "offload"}
            longer = {"F": f, "I": [t + again[s] * (s in recomputed) for s, t in enumerate(i)], "W": w}
            makespan = span = float("inf")
            peaks = [
                {o: spared_peak(o, costs, recomputed, offloaded) for o in {e[r] for e in every}} for r in range(ranks)
            ]
            fullest = [min(most, *of.values()) for most, of in zip(fullest, peaks, strict=True)]
            for orders in every:
                if all(of[o] <= most for of, o, most in zip(peaks, orders, limits, strict=True)) and (
                    rows := times_of(orders, longer, links)
                ):
                    makespan = min(makespan, max(row[-1][1] for row in rows))
                    span = min(span, max(row[-1][1] - row[0][0] for row in rows))
            if makespan < float("inf"):
                own = costs.spared(recomputed, offloaded)
                assert makespan_bound(placement, microbatches, own, limits).value <= makespan * (1 + 1e-9)
                assert span_bound(placement, microbatches, own, limits).value <= span * (1 + 1e-9)
                spares = bool(recomputed or offloaded)
                best[spares] = min(best.get(spares, float("inf")), makespan)
        bound = makespan_bound(placement, microbatches, costs, limits, spare=spare).value
        assert bound <= min(best.values()) * (1 + 1e-9)
        assert least == pytest.approx(fullest)
        reached += bound == pytest.approx(min(best.values()))
        gained += best[True] < best.get(False, float("inf"))
    assert reached > draws / 5
    assert gained > draws / 5


def test_with_loose_limits_sparing_changes_no_bound() -> None:
    loop = Placement("loop", 8, 4)
    costs = RankCosts.of(8, 100, 100, 65, 2).on(loop)
    plain = makespan_bound(loop, 32, costs, [8] * 8)
    assert makespan_bound(loop, 32, costs, [8] * 8, spare=("recompute",)) == plain
    free = makespan_bound(loop, 32, costs)
    assert makespan_bound(loop, 32, costs, [8] * 8, spare=("offload",)).value == free.value < plain.value
    tight = makespan_bound(loop, 32, costs, [3] * 8, spare=("recompute",)).value
    assert free.value < tight < makespan_bound(loop, 32, costs, [3] * 8).value
    assert makespan_bound(loop, 32, costs, None, spare=("recompute", "offload")) == free


def test_of_very_many_chunks_recomputation_is_taken_to_cost_nothing() -> None:
    loop = Placement("loop", 2, 8)
    costs = RankCosts.of(2, 8, 8, 8).on(loop)
    limits = [0.75] * 2
    least = makespan_bound(loop, 6, costs, limits, spare=("recompute",)).value
    free = dataclasses.replace(costs.spared(range(16), ()), input_gradient=costs.input_gradient)
    assert least == makespan_bound(loop, 6, free, limits).value
    with pytest.raises(
        InputError, match=r"rank 0; got 0\.1; needed at least 0\.330882, what one micro-batch holds there"
    ):
        makespan_bound(loop, 6, costs, [0.1] * 2, spare=("recompute",))
