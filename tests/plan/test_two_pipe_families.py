"""Families with two copies of the model, dualpipe and chimera: tables, the pipes taken apart, published figures."""

from __future__ import annotations

import re

import pytest
from torch.distributed.pipelining.schedules import ScheduleDualPipeV

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.costs import RankCosts
from pipex.plan.families import build
from pipex.plan.plan import Plan
from pipex.plan.simulator import Simulation, simulate
from pipex.plan.validator import validate

TABLES = {
    ("dualpipe", 4, 8, ""): """
        0F0 0F1 0F2 7F4 7I4 7W4 7F5 0F3+7B5 7F6+0B0 7B6 7F7+0B1 7B7 0I2 0W2 0I3 0W3
        1F0 6F4 1F1 6F5 1F2 6B4 6F6+1B0 1F3+6B5 6F7+1B1 6B6 1B2 6I7 1I3 6W7 1W3
        5F4 2F0 5F5 2F1 5F6 2B0 2F2+5B4 5F7+2B1 2F3+5B5 2B2 5B6 2I3 5I7 2W3 5W7
        4F4 4F5 4F6 3F0 3I0 3W0 3F1 4F7+3B1 3F2+4B4 3B2 3F3+4B5 3B3 4I6 4W6 4I7 4W7
    """,
    ("chimera", 4, 4, "concatenation"): """
        0F0 0F1 7F2 7B2 7F3 7B3 0B0 0B1
        1F0 6F2 1F1 6F3 6B2 1B0 6B3 1B1
        5F2 2F0 5F3 2F1 2B0 5B2 2B1 5B3
        4F2 4F3 3F0 3B0 3F1 3B1 4B2 4B3
    """,
    ("chimera", 4, 8, "concatenation"): """
        0F0 0F1 7F2 7B2 7F3 7B3 0F4 0B0 0F5 0B1 7F6 7B6 7F7 7B7 0B4 0B5
        1F0 6F2 1F1 6F3 6B2 1B0 6B3 1B1 1F4 6F6 1F5 6F7 6B6 1B4 6B7 1B5
        5F2 2F0 5F3 2F1 2B0 5B2 2B1 5B3 5F6 2F4 5F7 2F5 2B4 5B6 2B5 5B7
        4F2 4F3 3F0 3B0 3F1 3B1 4F6 4B2 4F7 4B3 3F4 3B4 3F5 3B5 4B6 4B7
    """,
    ("chimera", 4, 8, "doubling"): """
        0F0 0F1 0F2 0F3 7F4 7F5 7B4 7F6 7F7 7B5 0B0 7B6 0B1 7B7 0B2 0B3
        1F0 1F1 6F4 6F5 1F2 1F3 6F6 6F7 6B4 1B0 6B5 1B1 6B6 1B2 6B7 1B3
        5F4 5F5 2F0 2F1 5F6 5F7 2F2 2F3 2B0 5B4 2B1 5B5 2B2 5B6 2B3 5B7
        4F4 4F5 4F6 4F7 3F0 3F1 3B0 3F2 3F3 3B1 4B4 3B2 4B5 3B3 4B6 4B7
    """,
    ("chimera", 4, 3, "concatenation"): """
        0F0 0F1 7F2 7B2 0B0 0B1
        1F0 6F2 1F1 6B2 1B0 1B1
        5F2 2F0 2F1 2B0 5B2 2B1
        4F2 3F0 3B0 3F1 3B1 4B2
    """,
}


@pytest.mark.parametrize(("family", "ranks", "microbatches", "scaling"), TABLES)
def test_orders_equal_the_table(family: str, ranks: int, microbatches: int, scaling: str) -> None:
    expected = [row.split() for row in TABLES[family, ranks, microbatches, scaling].strip().splitlines()]
    plan = build(family, ranks, microbatches, **({"scaling": scaling} if scaling else {}))
    assert [["+".join(map(str, action.each)) for action in order] for order in plan.orders] == expected


@pytest.mark.parametrize("ranks", [2, 4, 6, 8, 16])
def test_dualpipe_is_torchs_dualpipev_unfolded(ranks: int) -> None:
    """Its ranks r and P-1-r each run what rank r of P/2 runs in the folded schedule with half the micro-batches."""
    for half in (ranks, ranks + 1, 2 * ranks):
        schedule = object.__new__(ScheduleDualPipeV)  # the orders need no modules and no process group
        schedule.pp_group_size, schedule.num_stages, schedule._n_microbatches = ranks // 2, ranks, half
        plan = build("dualpipe", ranks, 2 * half)
        for rank in range(ranks // 2):
            folded = schedule._calculate_single_rank_operations(rank)
            there = {rank: (rank, 0), ranks - 1 - rank: (2 * ranks - 1 - rank, half)}
            back = {rank: (ranks + rank, half), ranks - 1 - rank: (ranks - 1 - rank, 0)}
            assert [unfold(action, there) for action in folded] == list(map(str, plan.orders[rank]))
            assert [unfold(action, back) for action in folded] == list(map(str, plan.orders[ranks - 1 - rank]))


def unfold(action: object, stages: dict[int, tuple[int, int]]) -> str:
    """torch's action with its stage moved, and its micro-batch counted from another one, as ``stages`` says."""

    def moved(match: re.Match[str]) -> str:
        stage, first = stages[int(match[1])]
        return f"{stage}{match[2]}{first + int(match[3])}"

    return re.sub("([0-9]+)([FBIW])([0-9]+)", moved, str(action))


def simulated(plan: Plan, overlap: float = 1.0, **costs: float) -> Simulation:
    return simulate(plan, RankCosts.of(plan.placement.ranks, overlap=overlap, **costs).on(plan.placement))


def idle(result: Simulation) -> list[float]:
    return [result.makespan - sum(end - start for _, start, end in row) for row in result.timeline]


@pytest.mark.parametrize(
    ("ranks", "microbatches", "fused", "makespan", "waits"),
    [
        (4, 8, 3, 26, 2),
        (8, 20, 3, 66, 6),
        (8, 20, 2.5, 59, 4.5),
        (8, 32, 3, 102, 6),
        (8, 32, 2.5, 89, 4.5),
        (16, 64, 3, 206, 14),
        (16, 64, 2.5, 179, 10.5),
    ],
)
def test_dualpipe_takes_the_time_of_its_formula(
    ranks: int, microbatches: int, fused: float, makespan: float, waits: float
) -> None:
    """At F = I = W = 1, ``fused`` being the time of a pair; (PP/2-1)(F&B + B - 3W) on the idlest rank."""
    result = simulated(build("dualpipe", ranks, microbatches), overlap=fused / 3)
    assert result.makespan == pytest.approx(makespan)
    assert max(idle(result)) == pytest.approx(waits)
    assert waits == (ranks / 2 - 1) * (fused + 2 - 3)
    assert set(result.peak_memory) == {ranks + 1}


def test_dualpipe_waits_less_than_its_formula_where_w_is_short() -> None:
    """F&B = 2.4, F = 1, B = 2, W = .8: the formula says 6."""
    result = simulated(build("dualpipe", 8, 20), overlap=0.8, input_gradient=1.2, weight_gradient=0.8)
    assert max(idle(result)) == pytest.approx(5.4)
    assert min(idle(result)) == pytest.approx(4.2)


# (D, N): bubble in per cent at B = F and at B = 2F.
CHIMERA = {
    (4, 4, "concatenation"): ("20.0", "25.0"),
    (8, 8, "concatenation"): ("27.3", "33.3"),
    (16, 16, "concatenation"): ("30.4", "36.8"),
    (4, 8, "concatenation"): ("11.1", "17.2"),
    (8, 16, "concatenation"): ("15.8", "26.2"),
    (16, 32, "concatenation"): ("17.9", "29.9"),
    (4, 8, "doubling"): ("11.1", "11.1"),
    (8, 16, "doubling"): ("15.8", "15.8"),
    (16, 32, "doubling"): ("17.9", "17.9"),
}


@pytest.mark.parametrize(("ranks", "microbatches", "scaling"), CHIMERA)
def test_chimera_has_the_bubbles_of_the_table(ranks: int, microbatches: int, scaling: str) -> None:
    plan = build("chimera", ranks, microbatches, scaling=scaling)
    found = simulated(plan, forward=2), simulated(plan)
    assert tuple(f"{100 * result.bubble_makespan:.1f}" for result in found) == CHIMERA[ranks, microbatches, scaling]
    # (D-2)/(2N+D-2) at B = F, whatever N.
    assert found[0].bubble_makespan == pytest.approx((ranks - 2) / (2 * microbatches + ranks - 2))


@pytest.mark.parametrize("ranks", [4, 6, 8, 16])
@pytest.mark.parametrize("backward", [1, 1.5, 2])
def test_chimera_takes_the_times_of_its_closed_forms(ranks: int, backward: float) -> None:
    for units in (1, 2, 3):
        m = ranks * units
        result = simulated(build("chimera", ranks, m), input_gradient=backward / 2, weight_gradient=backward / 2)
        between = (units - 1) * (ranks - 3) * (backward - 1)
        assert result.makespan == m * (1 + backward) + (ranks - 2) * backward + between
        doubled = build("chimera", ranks, 2 * m, scaling="doubling")
        result = simulated(doubled, input_gradient=backward / 2, weight_gradient=backward / 2)
        assert result.makespan == 2 * m * (1 + backward) + (ranks - 2) * (1 + backward) / 2


@pytest.mark.parametrize(("ranks", "slots", "percent"), [(4, 14, "14.3"), (8, 30, "20.0"), (16, 62, "22.6")])
def test_doubling_with_pairs_handed_over_as_one_takes_the_slots_of_the_paper(
    ranks: int, slots: int, percent: str
) -> None:
    """N = 2D: 1.5N + D - 2 slots of B = 2F, a slot for a pair of forwards or for a backward; 1.5N of them are busy."""
    plan = build("chimera", ranks, 2 * ranks, scaling="doubling")
    rows = [pairs_as_one(order) for order in plan.orders]
    end: dict[tuple[int, Kind, int], int] = {}
    now, at = [0] * ranks, [0] * ranks
    while any(position < len(row) for position, row in zip(at, rows, strict=True)):
        for rank, row in enumerate(rows):
            if at[rank] < len(row) and all(need in end for need in needs(row[at[rank]], ranks)):
                job = row[at[rank]]
                now[rank] = max([now[rank], *(end[need] for need in needs(job, ranks))]) + 1
                end.update({(action.stage, action.kind, action.microbatch): now[rank] for action in job})
                at[rank] += 1
    assert max(now) == slots
    assert f"{100 * (1 - 3 * ranks / max(now)):.1f}" == percent


def pairs_as_one(order: tuple[Action, ...]) -> list[list[Action]]:
    """Two forwards of a stage in a row are one job."""
    jobs: list[list[Action]] = []
    for action in order:
        if action.kind is Kind.F and jobs and len(jobs[-1]) == 1 and jobs[-1][0][:2] == action[:2]:
            jobs[-1].append(action)
        else:
            jobs.append([action])
    return jobs


def needs(job: list[Action], ranks: int) -> list[tuple[int, Kind, int]]:
    needed = []
    for stage, kind, m, _ in job:
        if kind is Kind.B:
            needed.append((stage, Kind.F, m) if stage % ranks == ranks - 1 else (stage + 1, Kind.B, m))
        elif stage % ranks:
            needed.append((stage - 1, Kind.F, m))
    return needed


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_each_pipe_of_chimera_alone_is_1f1b(ranks: int) -> None:
    """One unit: D micro-batches, half of them down the ranks, half up."""
    plan = build("chimera", ranks, ranks)
    alone = build("1f1b", ranks, ranks // 2)
    for rank, order in enumerate(plan.orders):
        down = [action for action in order if action.stage < ranks]
        up = [action for action in order if action.stage >= ranks]
        assert down == list(alone.orders[rank])
        assert up == [
            Action(ranks + stage, kind, ranks // 2 + m) for stage, kind, m, _ in alone.orders[ranks - 1 - rank]
        ]


@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_chimera_holds_what_the_paper_says(ranks: int) -> None:
    """D/2+1 micro-batches on the outer ranks to D on the inner; with doubling at most twice as many."""
    middle = [min(rank, ranks - 1 - rank) for rank in range(ranks)]
    for microbatches in range(ranks, 4 * ranks + 1):
        concatenated = build("chimera", ranks, max(2, microbatches))
        assert concatenated.peak_activations == tuple(ranks // 2 + 1 + r for r in middle)
        if microbatches >= 2 * ranks:
            doubled = build("chimera", ranks, microbatches, scaling="doubling")
            assert doubled.peak_activations == tuple(min(microbatches, 3 * ranks // 2 + 1 + r) for r in middle)
            assert max(doubled.peak_activations) == 2 * max(concatenated.peak_activations)


@pytest.mark.parametrize("family", ["dualpipe", "chimera", "chimera with doubling"])
@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
def test_micro_batches_rise_and_pass_one_pipe_each_and_the_promised_memory_is_held(family: str, ranks: int) -> None:
    name, _, doubling = family.partition(" with ")
    options = {"scaling": doubling} if doubling else {}
    for microbatches in range(2 * ranks, 4 * ranks, 2) if name == "dualpipe" else range(2, 4 * ranks):
        plan = build(name, ranks, microbatches, **options)
        validate(plan)
        passes: dict[int, set[int]] = {}
        for order, promised in zip(plan.orders, plan.peak_activations, strict=True):
            last: dict[tuple[int, str], int] = {}
            held = [0]
            for stage, kind, m, _ in (part for action in order for part in action.each):
                passes.setdefault(m, set()).add(stage // ranks)
                held.append(held[-1] + {Kind.F: 1, Kind.I: 0}.get(kind, -1))
                for letter in "IW" if kind is Kind.B else kind.value:
                    assert last.get((stage, letter), -1) < m
                    last[stage, letter] = m
            assert max(held) == promised
        halves = [sum(pipes == {pipe} for pipes in passes.values()) for pipe in (0, 1)]
        assert halves == [(microbatches + 1) // 2, microbatches // 2]
        for m, pipes in passes.items():
            assert {stage // ranks for stage in plan.pipe_of(m)} == pipes
            assert len(plan.pipe_of(m)) == ranks


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do() -> None:
    for family in ("dualpipe", "chimera"):
        with pytest.raises(PlanError, match=f"ranks for {family}; got 5; needed an even number, such as 4 or 6"):
            build(family, 5, 12)
        with pytest.raises(PlanError, match=f"ranks for {family}; got 1; needed an even number, such as 2$"):
            build(family, 1, 12)
    with pytest.raises(PlanError, match="few micro-batches for dualpipe; got 6; needed at least 8, twice the ranks"):
        build("dualpipe", 4, 6)
    with pytest.raises(PlanError, match=r"micro-batches for dualpipe; got 11; needed an even .* such as 10 or 12"):
        build("dualpipe", 4, 11)
    with pytest.raises(PlanError, match="few micro-batches for chimera; got 1; needed at least 2"):
        build("chimera", 4, 1)
    with pytest.raises(PlanError, match="scaling for chimera; got 'halving'; needed one of concatenation, doubling"):
        build("chimera", 4, 8, scaling="halving")
