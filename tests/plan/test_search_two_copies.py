"""The search with two copies of the model: what it proposes, when, at which price, and that a judge agrees."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest

from pipex.errors import InputError, PlanError
from pipex.plan.bounds import makespan_bound, span_bound
from pipex.plan.communication import unfused
from pipex.plan.costs import RankCosts
from pipex.plan.families import FAMILIES, build
from pipex.plan.list_scheduler import execution, improvement, reference
from pipex.plan.list_scheduler.improvement import Objective
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.search import Candidate, SearchResult, planner, search
from pipex.plan.search.published import ONLY_BY_NAME, TWO_COPIES
from pipex.plan.simulator import simulate
from pipex.plan.validator import validate

ONE_COPY = [name for name in FAMILIES if name not in ONLY_BY_NAME | TWO_COPIES]
BOTH = [*ONE_COPY, *TWO_COPIES]


class Model(NamedTuple):
    """Per piece of the model, of which there are as many as ranks, what it costs wherever it is."""

    f: Sequence[float]
    i: Sequence[float]
    w: Sequence[float]
    hop: float = 0.0
    held: Sequence[float] = ()
    weights: Sequence[float] = ()
    exchange: float = 0.0

    def costs(self) -> RankCosts:
        return RankCosts.of(
            len(self.f), self.f, self.i, self.w, self.hop, activation=self.held or 1.0, weights=self.weights or None,
            exchange=self.exchange,
        )  # fmt: skip


def uniform(ranks: int, f: float, i: float, w: float, hop: float) -> Model:
    return Model((f,) * ranks, (i,) * ranks, (w,) * ranks, hop)


def uneven(ranks: int, seed: int) -> Model:
    rng = random.Random(seed)
    scale = [rng.choice((1.0, 1.3, 2.0)) for _ in range(ranks)]
    f, i, w, held, weights = ([x * s for s in scale] for x in (2.0, 2.0, 1.3, 1.0, 0.5))
    return Model(f, i, w, 0.2, held, weights, exchange=0.7)


class Judged(NamedTuple):
    makespan: float
    span: float
    peaks: list[float]


def judge(plan: Plan, model: Model) -> Judged:
    """Runs a plan with two copies of the model on paper. Stage s < P is piece s on rank s, stage P + s is piece s once
    more, on rank P-1-s. Shares no code with placement, simulator, memory or replay."""
    ranks = len(model.f)
    ends: dict[tuple[str, int, int], float] = {}
    rows: list[list[tuple[float, float]]] = [[] for _ in range(ranks)]
    parts = [[part for action in order for part in action.each] for order in plan.orders]
    moved = True
    while moved:
        moved = False
        for rank, (row, order) in enumerate(zip(rows, parts, strict=True)):
            while len(row) < len(order):
                stage, kind, m, _ = order[len(row)]
                letter, piece = kind.value, stage % ranks
                assert rank == (stage if stage < ranks else ranks - 1 - piece)
                start = row[-1][1] if row else 0.0
                if letter == "F" and piece > 0:
                    needs, hop = ("F", stage - 1, m), model.hop
                elif letter in "IB" and piece < ranks - 1:
                    needs, hop = ("I", stage + 1, m), model.hop
                else:
                    needs, hop = (("I" if letter == "W" else "F"), stage, m), 0.0
                if letter != "F" or piece > 0:
                    if needs not in ends:
                        break
                    start = max(start, ends[needs] + hop)
                assert letter == "F" or ("F", stage, m) in ends
                times = {"F": (model.f,), "I": (model.i,), "W": (model.w,), "B": (model.i, model.w)}[letter]
                end = start + sum(time[piece] for time in times)
                for done in letter.replace("B", "IW"):
                    assert (done, stage, m) not in ends
                    ends[done, stage, m] = end
                row.append((start, end))
                moved = True
    for m in range(plan.microbatches):
        pipe = 0 if ("F", 0, m) in ends else ranks
        for stage in range(2 * ranks):
            assert all(((k, stage, m) in ends) == (pipe <= stage < pipe + ranks) for k in "FIW"), (m, stage)
    assert [len(row) for row in rows] == list(map(len, parts))
    over = [max(rows[rank][-1][1], rows[ranks - 1 - rank][-1][1]) + model.exchange for rank in range(ranks)]
    held, weights = model.held or [1.0] * ranks, model.weights or [0.0] * ranks
    peaks = []
    for rank, order in enumerate(parts):
        now = peak = weights[rank] + weights[ranks - 1 - rank]
        for stage, kind, _, _ in order:
            now += {"F": held[stage % ranks], "I": 0.0}.get(kind.value, -held[stage % ranks])
            peak = max(peak, now)
        peaks.append(peak)
    return Judged(max(over), max(end - row[0][0] for row, end in zip(rows, over, strict=True)), peaks)


def two_copies(result: SearchResult) -> list[Candidate]:
    return [c for c in (result.best, *result.runners_up) if c.placement.name == "bidirectional"]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 7), (4, 4), (4, 9), (6, 12)])
@pytest.mark.parametrize("objective", ["makespan", "span"])
@pytest.mark.parametrize("room", [2.0, 3.0, math.inf])
def test_every_plan_is_what_a_judge_says_within_the_memory(
    ranks: int, microbatches: int, objective: Objective, room: float
) -> None:
    model = uneven(ranks, seed=ranks * microbatches)
    rng = random.Random(microbatches)
    both = [
        model.weights[r]
        + model.weights[-1 - r]
        + max(model.held[r], model.held[-1 - r]) * (room + rng.choice((0, 0.7)))
        for r in range(ranks)
    ]
    result = search(
        model.costs(), both, ranks=ranks, microbatches=microbatches, families=sorted(TWO_COPIES), objective=objective,
        evaluations=120, spare=(),
    )  # fmt: skip
    assert result.best in two_copies(result)
    for candidate in two_copies(result):
        validate(candidate.plan)
        judged = judge(candidate.plan, model)
        assert (candidate.makespan, candidate.span) == pytest.approx(judged[:2], rel=1e-6)
        assert candidate.peak_memory == pytest.approx(judged.peaks, rel=1e-6)
        assert all(peak <= most * (1 + 1e-9) for peak, most in zip(judged.peaks, both, strict=True))
        value = judged.makespan if objective == "makespan" else judged.span
        assert result.bound.value <= value * (1 + 1e-9)
    assert result.distance == pytest.approx(getattr(result.best, objective) / result.bound.value - 1, abs=1e-6)
    assert (result.simulation.makespan, result.simulation.span) == pytest.approx(judge(result.plan, model)[:2])


CELLS = [(ranks, k * ranks) for ranks in (2, 4, 8) for k in (1, 2, 4)]


@pytest.mark.parametrize(("ranks", "microbatches"), CELLS)
@pytest.mark.parametrize("times", ["equal", "realistic", "uneven"])
@pytest.mark.parametrize("spare", [0.0, 1.0, math.inf])
def test_no_published_plan_with_two_copies_is_better_and_neither_is_one_copy(
    ranks: int, microbatches: int, times: str, spare: float
) -> None:
    model = {
        "equal": uniform(ranks, 1, 1, 1, 0),
        "realistic": uniform(ranks, 100, 100, 65, 2),
        "uneven": Model(*([x * (1 + 0.3 * (r % 3)) for r in range(ranks)] for x in (2.0, 2.0, 1.3)), hop=0.2),
    }[times]
    memory = ranks + spare
    found = search(
        model.costs(), memory, ranks=ranks, microbatches=microbatches, families=BOTH, spare=(), evaluations=100
    )
    without = search(
        model.costs(), memory, ranks=ranks, microbatches=microbatches, families=ONE_COPY, spare=(), evaluations=100
    )
    assert found.best.makespan <= without.best.makespan
    if found.best not in two_copies(found):
        assert found.plan.digest == without.plan.digest  # the same search, and another one after it
        found = search(
            model.costs(),
            memory,
            ranks=ranks,
            microbatches=microbatches,
            families=sorted(TWO_COPIES),
            evaluations=100,
            spare=(),
        )
    assert judge(found.plan, model).makespan == pytest.approx(found.best.makespan)
    compared = 0
    for family, options in (("dualpipe", {}), *(("chimera", {"scaling": s}) for s in ("concatenation", "doubling"))):
        try:
            published = judge(unfused(build(family, ranks, microbatches, **options)), model)
        except PlanError:
            continue
        if max(published.peaks) <= memory:
            compared += 1
            assert found.best.makespan <= published.makespan * (1 + 1e-9), (family, options)
    assert compared


def test_both_scalings_of_chimera_and_pairs_that_are_cheaper_are_candidates() -> None:
    """A whole B each, no split: where W takes no time there is nothing to gain, and only the published orders are
    judged when there is one evaluation."""
    model = uniform(4, 1, 2, 0, 0)
    best = search(model.costs(), ranks=4, microbatches=8, families=["chimera"], evaluations=3).best
    by_scaling = [judge(build("chimera", 4, 8, scaling=s), model).makespan for s in ("concatenation", "doubling")]
    assert best.makespan <= min(by_scaling) < max(by_scaling)
    cheap = dataclasses.replace(model.costs(), overlap=0.6)
    found = search(cheap, ranks=4, microbatches=16, families=["dualpipe"], evaluations=60)
    assert any(action.parts for order in found.plan.orders for action in order)


# When they are considered

LIMIT = 9.0


def families_of(result: SearchResult) -> set[str]:
    return {candidate.family for candidate in (result.best, *result.runners_up)}


def test_a_second_copy_is_proposed_only_where_there_is_known_to_be_room_for_it() -> None:
    """Of 4 ranks, 4 micro-batches: what wins when it may."""

    def found(memory: float | None, **more: float) -> SearchResult:
        costs = RankCosts.of(4, 100, 100, 65, 2, **more)
        return search(costs, memory, ranks=4, microbatches=4, evaluations=300, spare=())

    assert not families_of(found(LIMIT)) & TWO_COPIES  # nothing is said of weights
    assert not families_of(found(None, weights=2.0)) & TWO_COPIES  # nothing of memory
    room = found(LIMIT, weights=2.0)
    assert room.best.placement.name == "bidirectional"
    assert max(room.simulation.peak_memory) <= LIMIT
    assert room.limit == (LIMIT,) * 4
    one = found(6.0, weights=2.0)  # one copy and what 1f1b holds
    assert one.best.placement.name != "bidirectional"
    assert max(one.simulation.peak_memory) <= 6
    assert not families_of(found(4.5, weights=2.0)) & TWO_COPIES  # two copies leave less than one micro-batch
    gain = one.best.makespan - room.best.makespan
    assert gain > 0
    assert found(LIMIT, weights=2.0, exchange=gain - 0.5).best.placement.name == "bidirectional"
    assert found(LIMIT, weights=2.0, exchange=gain + 0.5).best.placement.name != "bidirectional"
    with pytest.raises(
        InputError, match=r"limit of rank 0; got 2\.5; needed at least 3, .* holds there, and the weights"
    ):
        found(2.5, weights=2.0)


def test_a_tie_is_one_copy_s() -> None:
    """One rank's work is all there is: with one micro-batch per rank and nothing to compute in W or to wait for."""
    nothing = RankCosts.of(2, 0, 0, 0, weights=0)
    result = search(nothing, 9, ranks=2, microbatches=4, evaluations=40)
    assert two_copies(result)
    assert result.best.placement.name != "bidirectional"


@pytest.mark.parametrize(("ranks", "microbatches"), [(3, 8), (1, 8), (4, 1)])
def test_sizes_without_a_use_for_two_copies_have_none(ranks: int, microbatches: int) -> None:
    costs = RankCosts.of(ranks, weights=0)
    assert not two_copies(search(costs, 99, ranks=ranks, microbatches=microbatches, evaluations=40))
    with pytest.raises(PlanError, match="none of dualpipe, chimera fits these sizes"):
        search(costs, 99, ranks=ranks, microbatches=microbatches, families=["dualpipe", "chimera"])


def test_two_copies_may_recompute_to_fit() -> None:
    """Weights of 2 and 2 leave 1.2 of 5.2 for activations, too little for a whole one of each copy."""
    costs = RankCosts.of(4, 100, 100, 65, 2, weights=2.0)
    result = search(costs, 5.2, ranks=4, microbatches=8, families=["dualpipe", "chimera"], evaluations=200)
    assert result.plan.recomputed
    validate(result.plan)
    assert simulate(result.plan, costs.on(result.plan.placement)).makespan == pytest.approx(result.best.makespan)
    assert max(result.simulation.peak_memory) <= 5.2
    assert result.bound.value <= result.best.makespan


# How micro-batches are shared


def shares(plan: Plan) -> tuple[int, int]:
    down = sum(0 in plan.pipe_of(m) for m in range(plan.microbatches))
    return down, plan.microbatches - down


def test_pieces_that_cost_the_same_everywhere_are_passed_by_half_of_the_micro_batches_each() -> None:
    for microbatches in (6, 7):
        result = search(
            uneven(4, seed=3).costs(), ranks=4, microbatches=microbatches, families=["dualpipe"], evaluations=100
        )
        assert shares(result.plan) == ((microbatches + 1) // 2, microbatches // 2)


def test_where_ranks_differ_the_better_pipe_gets_more() -> None:
    """Times per stage: a light and a heavy piece, on a slow and a fast rank. Down, the heavy piece is on the fast one;
    five in six go there, and both ranks work 10 · 2 + 2 · 6 = 10 · 3 + 2 · 1 = 32 each in F, I and W."""
    times = [2.0, 3.0, 1.0, 6.0]
    costs = RankCosts.of(2, times, times, times)
    result = search(costs, ranks=2, microbatches=12, families=["dualpipe"], evaluations=200)
    assert shares(result.plan) == (10, 2)
    assert result.bound.value >= 96
    assert result.best.makespan < 3 * (6 * 2 + 6 * 6)  # what rank 0 would work with halves
    assert result.distance < 0.05


# Bounds, and both implementations


def test_the_bound_counts_both_placements_and_the_exchange() -> None:
    costs = RankCosts.of(4, 100, 100, 65, 2, weights=2.0, exchange=40)
    both = Placement("bidirectional", 4, 2)
    for objective, of in (("makespan", makespan_bound), ("span", span_bound)):
        result = search(
            costs, 9, ranks=4, microbatches=8, families=["dualpipe"], evaluations=60, spare=(),
            objective=objective,  # type: ignore[arg-type]
        )  # fmt: skip
        bound = of(both, 8, costs.on(both), [9] * 4)
        assert result.bound == bound
        free = of(both, 8, dataclasses.replace(costs, exchange=0).on(both), [9] * 4)
        assert bound.value == free.value + 40
        assert bound.reason == f"{free.reason}; then the gradients of both copies are added up for 40"
        without = of(both, 8, dataclasses.replace(costs, weights=None).on(both), [5] * 4)
        assert bound.value == without.value + 0  # two copies leave 5 of the 9
        assert of(both, 8, costs.on(both), None, "never").value < free.value


def test_the_same_search_finds_the_same_plan_natively_and_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[SearchResult]:
        return [
            search(uneven(4, 4).costs(), 5, ranks=4, microbatches=6, evaluations=60, chunks=2, objective=objective)
            for objective in ("makespan", "span")
        ]

    first = found()
    assert all(two_copies(result) for result in first)
    for name, module in (("list_schedule", reference), ("replay", execution), ("improve", improvement)):
        monkeypatch.setattr(planner, name, getattr(module, name))
    for result, slow in zip(first, found(), strict=True):
        assert [c.plan.digest for c in (result.best, *result.runners_up)] == [
            c.plan.digest for c in (slow.best, *slow.runners_up)
        ]
        assert result.evaluations == slow.evaluations


def test_more_evaluations_never_find_worse() -> None:
    found = [
        search(
            uneven(6, 5).costs(), 6.5, ranks=6, microbatches=14, families=["dualpipe"], spare=(), evaluations=n
        ).best.makespan
        for n in (20, 100, 600)
    ]
    assert all(more <= fewer for fewer, more in pairwise(found))
