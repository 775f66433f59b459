"""The search: how low it gets, that it keeps limits and promises, and that it always finds the same plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
from step_judge import Judge

from pipex.errors import InputError, PlanError
from pipex.plan.bounds import makespan_bound, span_bound
from pipex.plan.communication import unfused
from pipex.plan.costs import Costs, RankCosts
from pipex.plan.families import FAMILIES, build
from pipex.plan.list_scheduler import execution, improvement, reference
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.search import SearchResult, planner, search
from pipex.plan.search.published import ONLY_BY_NAME, TWO_COPIES
from pipex.plan.search.units import Units
from pipex.plan.simulator import simulate
from pipex.plan.validator import validate

F, I, W, HOP = 100, 100, 65, 2  # noqa: E741 - the field's letter


def rank_costs(ranks: int, last: float = 1.0) -> RankCosts:
    """Those of the study whose figures are the targets, the last rank so many times slower."""
    share = [1.0] * (ranks - 1) + [last]
    return RankCosts.of(ranks, [F * x for x in share], [I * x for x in share], [W * x for x in share], HOP)


def bubble(result: SearchResult, last: float = 1.0) -> float:
    """Idle share of the busiest rank over the makespan."""
    return 1 - result.plan.microbatches * (F + I + W) * last / result.simulation.makespan


@pytest.mark.parametrize(
    ("ranks", "microbatches", "memory", "families", "evaluations", "most"),
    [
        (8, 32, 8, ["zbv"], 1000, 0.04425),
        (8, 32, 8, None, 1000, 0.030),
        (16, 64, 16, ["zbv"], 200, 0.04725),
        (16, 64, 16, None, 200, 0.033),
        (32, 256, 32, ["zbv"], 20, 0.026),
        (32, 256, 32, ["interleaved-zb"], 15, 0.018),
        (8, 32, 6, None, 1000, 0.070),
        (4, 8, 4, ["zbv"], 1000, 0.07345),
    ],
)
def test_makespan_bubbles_come_close_to_the_best_known(
    ranks: int, microbatches: int, memory: float, families: Sequence[str] | None, evaluations: int | None, most: float
) -> None:
    result = search(
        rank_costs(ranks), memory, ranks=ranks, microbatches=microbatches, families=families, evaluations=evaluations
    )
    assert bubble(result) <= most
    assert all(peak <= memory * (1 + 1e-9) for peak in result.simulation.peak_memory)


def test_a_heavy_last_rank_is_never_idle_but_for_what_it_must_be() -> None:
    result = search(rank_costs(8, last=1.3), 8, ranks=8, microbatches=32)
    assert bubble(result, last=1.3) == pytest.approx(0.0169, abs=0.5001e-4)
    assert result.distance == pytest.approx(0, abs=1e-9)
    assert result.evaluations < 1000  # it stops when nothing better is possible


def uneven(ranks: int, seed: int) -> RankCosts:
    rng = random.Random(seed)
    f, i, w = ([rng.choice((1.0, 1.5, 4.0)) * x for _ in range(ranks)] for x in (1.0, 1.2, 0.7))
    return RankCosts.of(ranks, f, i, w, 0.1, deferred=rng.choice((None, 0.5)))


CELLS = [(1, 3, None), (2, 2, 1.0), (3, 7, 2.0), (4, 6, None), (5, 12, 3.5), (6, 8, 6.0)]


@pytest.mark.parametrize(("ranks", "microbatches", "memory"), CELLS)
@pytest.mark.parametrize("objective", ["makespan", "span"])
def test_every_candidate_is_what_it_claims(
    ranks: int, microbatches: int, memory: float | None, objective: planner.Objective
) -> None:
    model = uneven(ranks, seed=ranks)
    result = search(
        model, memory, ranks=ranks, microbatches=microbatches, objective=objective, chunks=3, evaluations=150
    )
    assert not result.capped
    assert result.evaluations <= 150
    values = []
    for candidate in (result.best, *result.runners_up):
        plan, costs = candidate.plan, model.on(candidate.placement)
        validate(plan)
        assert (plan.family, plan.placement, plan.microbatches) == (
            candidate.family, candidate.placement, microbatches,
        )  # fmt: skip
        simulated = simulate(plan, costs)
        assert simulated.makespan == pytest.approx(candidate.makespan, rel=1e-6)
        assert simulated.span == pytest.approx(candidate.span, rel=1e-6)
        assert simulated.peak_memory == pytest.approx(candidate.peak_memory, rel=1e-6)
        if memory is not None:
            assert max(simulated.peak_memory) <= memory * (1 + 1e-9)
        values.append(simulated.makespan if objective == "makespan" else simulated.span)
    assert values == pytest.approx(sorted(values), rel=1e-6)
    assert result.simulation == simulate(result.plan, result.costs)
    assert result.bound.value <= values[0] * (1 + 1e-9)
    assert result.distance == pytest.approx(values[0] / result.bound.value - 1, abs=1e-6)


def test_the_bound_is_the_lowest_of_the_placements_searched() -> None:
    model = rank_costs(4)
    for families, placements in [
        (["zbv"], [Placement("v", 4, 2)]),
        (["zb-auto", "1f1b"], [Placement("loop", 4)]),
        (["interleaved-zb", "zbv"], [Placement("loop", 4, 2), Placement("loop", 4, 3), Placement("v", 4, 2)]),
    ]:
        result = search(model, 4, ranks=4, microbatches=8, chunks=3, families=families, evaluations=40)
        bounds = [makespan_bound(p, 8, model.on(p), [4] * 4) for p in placements]
        assert result.bound == min(bounds, key=lambda bound: bound.value)
        result = search(
            model, 4, ranks=4, microbatches=8, chunks=3, families=families, evaluations=40, objective="span"
        )
        assert result.bound.value == min(span_bound(p, 8, model.on(p), [4] * 4).value for p in placements)


def test_no_published_plan_that_keeps_the_limit_is_better() -> None:
    """Not even with next to no evaluations for planning."""
    for seed in range(12):
        rng = random.Random(seed)
        ranks, microbatches = rng.randint(1, 6), rng.randint(1, 12)
        model, memory = uneven(ranks, seed), rng.choice((None, 2.0, ranks * 0.6 + 0.5, float(ranks)))
        memory = memory and max(1.0, memory)
        for objective in ("makespan", "span"):
            result = search(
                model, memory, ranks=ranks, microbatches=microbatches, chunks=2, objective=objective, evaluations=90
            )  # fmt: skip
            found = result.best.makespan if objective == "makespan" else result.best.span
            for family in set(FAMILIES) - ONLY_BY_NAME - TWO_COPIES:
                try:
                    plan = unfused(build(family, ranks, microbatches))
                except PlanError:
                    continue
                published = simulate(plan, model.on(plan.placement))
                if memory is None or max(published.peak_memory) <= memory:
                    value = published.makespan if objective == "makespan" else published.span
                    assert found <= value * (1 + 1e-6), (family, seed)


def test_the_same_search_finds_the_same_plan_natively_and_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[SearchResult]:
        return [
            search(uneven(3, 4), 1.5, ranks=3, microbatches=6, chunks=2, evaluations=100, objective="span"),
            search(uneven(4, 7), 2.0, ranks=4, microbatches=6, chunks=2, evaluations=100),
        ]

    first, again = found(), found()
    called = set()

    def in_python(name: str, module: ModuleType) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            called.add(name)
            return getattr(module, name)(*arguments, **more)

        return call

    for name, module in (("list_schedule", reference), ("replay", execution), ("improve", improvement)):
        monkeypatch.setattr(planner, name, in_python(name, module))
    for result, other, slow in zip(first, again, found(), strict=True):
        assert result.plan.digest == other.plan.digest == slow.plan.digest
        assert [c.plan.digest for c in result.runners_up] == [c.plan.digest for c in slow.runners_up]
        assert (result.evaluations, result.bound) == (slow.evaluations, slow.bound)
    assert called == {"list_schedule", "replay", "improve"}


def test_the_seconds_end_a_search_early_and_the_answer_says_so() -> None:
    whole = search(uneven(6, 3), 4, ranks=6, microbatches=16, evaluations=200)
    assert (whole.capped, whole.evaluations) == (False, 200)
    short = search(uneven(6, 3), 4, ranks=6, microbatches=16, evaluations=200, seconds=0)
    assert short.capped
    assert short.evaluations < 10
    validate(short.plan)


def test_more_evaluations_never_find_worse() -> None:
    found = [search(uneven(6, 3), 4.0, ranks=6, microbatches=16, evaluations=n).best.makespan for n in (20, 200, 1000)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_jitter_is_planned_with_medians_and_replayed_as_it_is() -> None:
    rng = random.Random(1)
    jittery = [[x * rng.uniform(0.9, 1.1) for _ in range(8)] for x in (F, I, W)]
    model = RankCosts.of(8, *jittery, HOP)  # type: ignore[misc, arg-type]
    result = search(model, 8, ranks=8, microbatches=16, families=["zbv"], evaluations=40)
    assert result.best.origin == "planned on medians"
    assert result.simulation.makespan == simulate(result.plan, model.on(Placement("v", 8, 2))).makespan


def test_the_span_is_another_objective_than_the_makespan() -> None:
    """With twice the memory and little held for W the span has nearly no bubble (the Zero Bubble paper's ZB-2p); the
    makespan cannot, on one chunk per rank."""
    model = RankCosts.of(8, F, I, W, HOP, activation=1, deferred=0.35)
    span, makespan = (
        search(model, 16, ranks=8, microbatches=32, chunks=1, evaluations=400, objective=objective)
        for objective in ("span", "makespan")
    )
    assert span.simulation.bubble_span < 0.01
    assert span.simulation.span < makespan.simulation.span
    assert makespan.simulation.makespan <= span.simulation.makespan


def test_families_restrict_the_search_and_only_they_bring_in_a_second_copy_of_the_weights() -> None:
    everything = search(rank_costs(4), None, ranks=4, microbatches=8, evaluations=100)
    assert {c.family for c in (everything.best, *everything.runners_up)} <= set(FAMILIES) - ONLY_BY_NAME - TWO_COPIES
    for family in ("dualpipe", "chimera", "pipedream", "pipedream-2bw", "forward-only"):
        assert search(rank_costs(4), ranks=4, microbatches=8, families=[family]).best.family == family


def test_fused_pairs_count_when_they_are_cheaper() -> None:
    cheap = RankCosts.of(4, 1, 1, 1, overlap=0.7)
    result = search(cheap, None, ranks=4, microbatches=16, families=["dualpipev"], evaluations=20)
    assert any(action.parts for order in result.plan.orders for action in order)
    dear = RankCosts.of(4, 1, 1, 1, overlap=1.0)
    result = search(dear, None, ranks=4, microbatches=16, families=["dualpipev"], evaluations=20)
    assert not any(action.parts for order in result.plan.orders for action in order)


def test_limits_hold_per_rank() -> None:
    limits = [4.0, 2.0, 3.5, 1.5]
    result = search(rank_costs(4), limits, ranks=4, microbatches=8, evaluations=200)
    assert result.limit == tuple(limits)
    for candidate in (result.best, *result.runners_up):
        assert all(p <= most * (1 + 1e-9) for p, most in zip(candidate.peak_memory, limits, strict=True))


def test_the_smallest_feasible_limit_is_kept_and_less_is_refused_by_name() -> None:
    model = RankCosts.of(3, activation=[2, 3, 5], deferred=[1, 9, 1])
    result = search(model, [2, 3, 5], ranks=3, microbatches=4, evaluations=60)
    assert result.simulation.peak_memory == (2, 3, 5)
    with pytest.raises(InputError, match=r"memory limit of rank 1; got 2\.9; needed at least 3, what one micro-batch"):
        search(model, [2, 2.9, 5], ranks=3, microbatches=4, spare=())
    with pytest.raises(InputError, match="wrong number of memory limits; got 2; needed 3"):
        search(model, [2, 3], ranks=3, microbatches=4)
    with pytest.raises(InputError, match="memory limit of rank 0; got nan"):
        search(model, float("nan"), ranks=3, microbatches=4)
    # With several chunks, of which all but one hold their inputs alone: 5/4 and three inputs of 5/34 on rank 2.
    model = RankCosts.of(3, activation=[2, 3, 5])
    result = search(model, [0.8, 1.1, 1.75], ranks=3, microbatches=4, evaluations=60)
    assert result.plan.recomputed
    assert all(p <= most for p, most in zip(result.simulation.peak_memory, [0.8, 1.1, 1.75], strict=True))
    with pytest.raises(InputError, match=r"memory limit of rank 2; got 1\.65; needed at least 1\.69118, what one"):
        search(model, [0.8, 1.1, 1.65], ranks=3, microbatches=4)


def test_a_limit_that_the_families_miss_is_called_unproven_with_one_that_is_enough() -> None:
    with pytest.raises(
        PlanError, match="found no plan of 1f1b, gpipe within the memory limit, and cannot prove"
    ) as caught:
        search(rank_costs(4), 3, ranks=4, microbatches=8, families=["1f1b", "gpipe"], spare=())
    assert "got 3, 3, 3, 3; needed 4 per rank, which is enough for 1f1b" in str(caught.value)
    assert search(rank_costs(4), 4, ranks=4, microbatches=8, families=["1f1b", "gpipe"]).best.family == "1f1b"


def test_measured_costs_of_stages_fit_their_placement_only() -> None:
    loop = Placement("loop", 4)
    costs = Costs([2, 1, 1, 1], [1] * 4, [1] * 4, dict.fromkeys(loop.edges, 0.0), [1] * 4, [1] * 4)
    result = search(costs, 4, ranks=4, microbatches=8, evaluations=100)
    assert {c.placement for c in (result.best, *result.runners_up)} == {loop}
    with pytest.raises(InputError, match="wrong number of costs forward; got 4; needed 3, one per stage"):
        search(costs, 4, ranks=3, microbatches=8)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"objective": "time"}, "unknown objective; got 'time'; needed makespan or span"),
        ({"ranks": 0}, "bad number of ranks; got 0"),
        ({"microbatches": 0}, "bad number of micro-batches; got 0"),
        ({"chunks": 0}, "bad number of chunks; got 0"),
        ({"ranks": 4.0}, "bad number of ranks; got 4.0"),
        ({"families": "zbv"}, "bad families; got 'zbv'"),
        ({"families": []}, "bad families"),
        ({"evaluations": 0}, "too few evaluations; got 0"),
        ({"spare": ["offload"]}, "the costs do not say what it takes to offload; needed offload, the time of a copy"),
        ({"spare": ["keep"]}, "unknown way to spare memory; got 'keep'; needed recompute or offload"),
        ({"spare": "offload"}, "bad ways to spare memory; got 'offload'; needed a list of names"),
        ({"seconds": -1.0}, "bad number of seconds; got -1.0; needed at least 0"),
        ({"seconds": float("nan")}, "bad number of seconds; got nan"),
        ({"families": ["zb-h9"]}, "unknown schedule; got 'zb-h9'; needed one of naive, gpipe"),
        ({"families": ["dualpipev"]}, "none of dualpipev fits these sizes"),
        ({"ranks": 3}, "the costs are of another number of ranks; got 4; needed 3"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], problem: str) -> None:
    arguments: dict[str, object] = {"ranks": 4, "microbatches": 7}
    with pytest.raises(InputError, match=problem):
        search(rank_costs(4), None, **{**arguments, **change})  # type: ignore[arg-type]


def test_units_keep_usual_costs_exact() -> None:
    for chunks in (1, 2, 3, 4):
        placement = Placement("loop", 8, chunks)
        costs = RankCosts.of(8, 100, 100, 65.125, 2).on(placement)
        units = Units.of({placement: costs}, 32, [8] * 8)
        problem = units.problem(placement, 32, costs, [8] * 8)
        assert problem.forward == (round(units.time * 100) // chunks,) * 8 * chunks
        assert problem.weight_gradient[0] * chunks * 1000 == problem.forward[0] * chunks * 651.25
        assert problem.activation_hop == (round(units.time * 2),) * (8 * chunks - 1)
        assert problem.limit[0] // problem.activation[0] == 8 * chunks  # thirds fit three times into a whole


def test_units_suit_any_scale() -> None:
    """Seconds or nanoseconds, micro-batches or bytes: a plan as good."""

    def found(unit: float) -> SearchResult:
        model = RankCosts.of(4, 1.1 * unit, 1.3 * unit, 0.7 * unit, 0.1 * unit, activation=unit)
        return search(model, 3 * unit, ranks=4, microbatches=8, families=["zbv"], evaluations=60)

    usual = found(1.0)
    for unit in (1e-9, 1e-3, 1e6, 1e12):
        result = found(unit)
        validate(result.plan)
        assert result.best.makespan / unit == pytest.approx(usual.best.makespan, rel=1e-6)
        assert max(result.simulation.peak_memory) <= 3 * unit * (1 + 1e-9)


def test_costs_of_nothing_can_be_searched() -> None:
    result = search(RankCosts.of(2, 0, 0, 0, activation=0), 0, ranks=2, microbatches=3, evaluations=50)
    assert (result.simulation.makespan, result.distance) == (0, 0)


# --- stages that are spared ------------------------------------------------------------------------------------------


def judged(result: SearchResult, model: RankCosts) -> float:
    """The makespan of the best plan by the judge, for which every candidate is what it claims, and keeps the limit."""
    assert result.limit is not None
    makespans = []
    for candidate in (result.best, *result.runners_up):
        plan = candidate.plan
        validate(plan)
        assert (plan.recomputed, plan.offloaded) == (candidate.recomputed, candidate.offloaded)
        assert Plan.from_text(plan.to_text()) == plan
        judge = Judge(unfused(plan), model.on(plan.placement))
        makespans.append(max(judge.end.values()) - min(judge.start.values()))
        assert makespans[-1] == pytest.approx(candidate.makespan, rel=1e-6)
        for rank in judge.ranks:
            assert judge.peak(rank) == pytest.approx(candidate.peak_memory[rank], rel=1e-6)
            assert judge.peak(rank) <= result.limit[rank] * (1 + 1e-9)
            assert judge.most_held(rank) <= plan.peak_activations[rank]
            assert judge.most_held_by_the_clock(rank) <= plan.peak_activations[rank]
    assert result.bound.value <= makespans[0] * (1 + 1e-9)
    return makespans[0]


def test_with_three_activations_on_eight_ranks_bubble_and_recomputation_are_less_than_the_bubble_alone() -> None:
    """An activation is that of one micro-batch on a rank. Recomputing one takes as long as its F, copying it 10."""
    lost = {}
    model = RankCosts.of(8, F, I, W, HOP, offload=10)
    for spare in ((), ("recompute",), ("offload",), ("recompute", "offload")):
        result = search(model, 3, ranks=8, microbatches=32, spare=spare, evaluations=1500)  # type: ignore[arg-type]
        makespan = judged(result, model)
        lost[spare] = 1 - 32 * (F + I + W) / makespan
        assert result.simulation.lost == pytest.approx(lost[spare], abs=1e-6)
        assert bool(result.plan.recomputed) == (spare == ("recompute",))
        assert bool(result.plan.offloaded) == ("offload" in spare)
        print(spare, f"lost {lost[spare]:.4f}, recomputation {result.simulation.recomputation:.4f}", result.best)
    assert lost["recompute",] < 0.24 < 0.32 < lost[()]
    assert lost["offload",] < 0.04
    assert lost["recompute", "offload"] < 0.04


@pytest.mark.parametrize("seed", range(8))
def test_every_candidate_that_spares_is_what_it_claims(seed: int) -> None:
    rng = random.Random(seed)
    ranks, microbatches = rng.randint(2, 5), rng.randint(4, 10)
    f = [rng.choice((1.0, 1.5, 4.0)) for _ in range(ranks)]
    model = RankCosts.of(
        ranks, f, [1.2 * x for x in f], [0.7 * x for x in f], 0.1, deferred=rng.choice((None, 0.5)),
        inputs=rng.choice((0.0, 0.2, None)), recompute=rng.choice((None, 0.5)), offload=rng.choice((0.1, 1.0, 5.0)),
    )  # fmt: skip
    memory = [rng.choice((1.0, 1.5, 2.0)) for _ in range(ranks)]
    objective: planner.Objective = rng.choice(("makespan", "span"))
    found = search(model, memory, ranks=ranks, microbatches=microbatches, evaluations=300, objective=objective)
    judged(found, model)
    assert found.evaluations <= 300
    plain = search(
        model, memory, ranks=ranks, microbatches=microbatches, evaluations=300, objective=objective, spare=()
    )
    spares = [bool(c.recomputed or c.offloaded) for c in (found.best, *found.runners_up)]
    assert any(spares) == (getattr(found.best, objective) < getattr(plain.best, objective))


def test_copies_that_are_too_slow_leave_room_for_recomputation() -> None:
    """A copy that takes as long as all work for a micro-batch is worth less than recomputation in its place."""
    lost = {}
    for offload in (10.0, 150.0, 2000.0):
        model = RankCosts.of(4, F, I, W, HOP, offload=offload)
        result = search(model, 1.5, ranks=4, microbatches=16, evaluations=600)
        lost[offload] = 1 - 16 * (F + I + W) / judged(result, model)
        assert bool(result.plan.offloaded) == (offload < 2000)
        assert bool(result.plan.recomputed) == (offload == 2000)
    assert lost[10.0] < lost[150.0] < lost[2000.0]


def test_a_family_that_needs_more_memory_is_kept_by_recomputing() -> None:
    model = rank_costs(4)
    result = search(model, 2, ranks=4, microbatches=8, families=["1f1b"], evaluations=20)
    judged(result, model)
    assert (result.best.family, result.best.placement) == ("1f1b", Placement("loop", 4))
    assert set(result.plan.recomputed) >= {0, 1}
    with pytest.raises(PlanError, match="found no plan of 1f1b within the memory limit"):
        search(model, 2, ranks=4, microbatches=8, families=["1f1b"], spare=())


def test_less_than_one_micro_batch_of_a_rank_is_enough_for_plans_with_several_chunks() -> None:
    """No plan that spares nothing has a bound here, and those that are tried after the first that fits have to do."""
    model = rank_costs(4)
    for memory in (0.5, 0.7, 0.9):
        result = search(model, memory, ranks=4, microbatches=8, evaluations=400)
        assert judged(result, model) < 8 * 4 * (F + I + W)
        assert all(c.recomputed for c in (result.best, *result.runners_up))


def test_nothing_is_spared_without_a_limit_or_where_it_is_loose() -> None:
    for memory in (None, 8):
        result = search(rank_costs(8), memory, ranks=8, microbatches=32, evaluations=200)
        assert not result.plan.recomputed + result.plan.offloaded
        assert not any(c.offloaded for c in result.runners_up)  # what copies take is not known
