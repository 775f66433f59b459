"""Every family at every size: 1 to 8 ranks, 1 to 16 micro-batches, 1 to 4 chunks per rank.

Where the sizes fit, the plan is proven with the slots that it needs, a slot less is refused exactly where a replay that
shares no code with the validator stops, and the memory is the published one. Where they do not, the error names the
nearest sizes that do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count, product

import pytest
from cases import sampled

from pipex.errors import DeadlockError, PlanError
from pipex.plan.actions import Kind
from pipex.plan.communication import slots_needed
from pipex.plan.families import FAMILIES, build
from pipex.plan.memory import peak_memory
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan
from pipex.plan.validator import validate

RANKS = range(1, 9)
MICROBATCHES = range(1, 17)
CHUNKS = range(1, 5)


def group(p: int, m: int) -> int:
    """Megatron-LM's rule: P where that divides M, or the next size that leaves no remainder from 1 to P-1. All micro-
    batches are one group where they are fewer."""
    return next((g for g in range(p, m) if m % g == 0 or m % g >= p), m)


Memory = Callable[[int, int, int, int], int]
"""(ranks, rank, micro-batches, chunks) -> the most activations of one chunk on the rank, if there are so many"""

# From the papers; the group of the two interleaved ones stands for P where P does not divide M.
PEAKS: dict[str, Memory] = {
    "naive": lambda p, r, m, v: 1,
    "gpipe": lambda p, r, m, v: m,
    "1f1b": lambda p, r, m, v: p - r,
    "interleaved": lambda p, r, m, v: (v - 1) * group(p, m) + 2 * (p - 1 - r) + 1,  # P + (P-1)/V of rank 0, g = P
    "looped-bfs": lambda p, r, m, v: m * v,
    "zb-h1": lambda p, r, m, v: p,
    "zb-h2": lambda p, r, m, v: 2 * p - 1,
    "zb-auto": lambda p, r, m, v: p,  # the limit, where none is given
    "interleaved-zb": lambda p, r, m, v: (v - 1) * group(p, m) + p,
    "zbv": lambda p, r, m, v: 2 * p,
    "v-half": lambda p, r, m, v: 2 * ((p + 2) // 2),
    "v-min": lambda p, r, m, v: 2 * ((p + 4) // 3),
    "dualpipev": lambda p, r, m, v: 2 * p + 1,
    "dualpipe": lambda p, r, m, v: p + 1,
    "chimera": lambda p, r, m, v: p // 2 + 1 + min(r, p - 1 - r),
    "hanayo": lambda p, r, m, v: p * v,
    "pipedream": lambda p, r, m, v: p - r,
    "pipedream-2bw": lambda p, r, m, v: p - r,
    "forward-only": lambda p, r, m, v: 1,
}

# From how many micro-batches on the ranks hold that; with fewer, no rank holds more.
ENOUGH: dict[str, Callable[[int], int]] = {"zbv": lambda p: 2 * p - 1, "chimera": lambda p: p}

# Their papers speak of the fullest rank only.
OF_THE_FULLEST = {"hanayo"}

# Families that do not take every number of ranks, micro-batches or chunks.
LEGAL: dict[str, Callable[[int, int], bool]] = {
    "dualpipev": lambda p, m: m >= 2 * p,
    "dualpipe": lambda p, m: p % 2 == 0 and m % 2 == 0 and m >= 2 * p,
    "chimera": lambda p, m: p % 2 == 0 and m >= 2,
    "pipedream-2bw": lambda p, m: m >= p,
}
LEGAL_CHUNKS: dict[str, list[int]] = {
    "zbv": [2],
    "v-half": [2],
    "v-min": [2],
    "dualpipev": [2],
    "dualpipe": [2],
    "chimera": [2],
    "hanayo": [2, 4],
    **{family: [1, 2, 3, 4] for family in ("interleaved", "looped-bfs", "interleaved-zb", "forward-only")},
}
"""Those within 1 to 4; the other families have one."""


def legal(family: str, ranks: int, microbatches: int) -> bool:
    return family not in LEGAL or LEGAL[family](ranks, microbatches)


def plans(family: str, ranks: int) -> Iterator[Plan]:
    """The legal plans of the grid."""
    for microbatches in MICROBATCHES:
        if legal(family, ranks, microbatches):
            for chunks in LEGAL_CHUNKS.get(family, [1]):
                yield build(family, ranks, microbatches, chunks=chunks)


Program = list[tuple[Edge, bool]]
"""A rank's messages in order, and whether it sends them."""


def comes_to_its_end(programs: list[Program], slots: Mapping[Edge, int]) -> bool:
    """Whether all ranks get through when each goes on for as long as it can."""
    at = [0] * len(programs)
    under_way = dict.fromkeys(slots, 0)
    going = True
    while going:
        going = False
        for rank, program in enumerate(programs):
            for edge, sends in program[at[rank] :]:
                if not (under_way[edge] < slots[edge] if sends else under_way[edge]):
                    break
                under_way[edge] += 1 if sends else -1
                at[rank] += 1
                going = True
    return at == list(map(len, programs))


def programs_of(plan: Plan) -> list[Program]:
    """An action receives what it needs before it and sends what it made after it, an OVERLAP_F_B for all its parts."""
    rank_of, pipes = plan.placement.rank_of, 2 if plan.placement.name == "bidirectional" else 1
    length = plan.placement.stages // pipes

    def edge(source: int, destination: int, kind: Kind) -> list[Edge]:
        inside = min(source, destination) >= 0 and max(source, destination) < length * pipes
        linked = inside and source // length == destination // length and rank_of(source) != rank_of(destination)
        return [Edge(source, destination, "activation" if kind is Kind.F else "gradient")] if linked else []

    ends = {
        (stage, kind): (edge(stage - step, stage, kind), edge(stage, stage + step, kind))
        for stage in range(plan.placement.stages)
        for kind, step in ((Kind.F, 1), (Kind.I, -1), (Kind.B, -1))
    }
    programs: list[Program] = [[] for _ in plan.orders]
    for program, order in zip(programs, plan.orders, strict=True):
        for action in order:
            parts = [ends[part.stage, part.kind] for part in action.each if (part.stage, part.kind) in ends]
            program += [(edge, False) for receives, _ in parts for edge in receives]
            program += [(edge, True) for _, sends in parts for edge in sends]
    return programs


def fewest(programs: list[Program], slots: dict[Edge, int]) -> dict[Edge, int]:
    """So few slots, of those given, that with one less on any edge the programs would stop."""
    cap = next(k for k in count(1) if comes_to_its_end(programs, {edge: min(k, n) for edge, n in slots.items()}))
    few = {edge: min(cap, n) for edge, n in slots.items()}
    for edge, most in few.items():
        few[edge] = next(n for n in range(most + 1) if comes_to_its_end(programs, {**few, edge: n}))
    return few


def refused_with_a_slot_less(plan: Plan, programs: list[Program], slots: dict[Edge, int], edge: Edge) -> bool:
    """Whether ``validate`` refuses one slot less on ``edge``, which must be what the replay says."""
    fewer = {**slots, edge: slots[edge] - 1}
    if comes_to_its_end(programs, fewer):
        validate(plan, fewer)
        return False
    with pytest.raises(DeadlockError, match=r"waits for rank .* give more slots to"):
        validate(plan, fewer)
    return True


@pytest.mark.parametrize(
    ("family", "ranks"), sampled(product(FAMILIES, RANKS), 2, name="plans", stratum=lambda case: case[0])
)
def test_every_plan_runs_with_its_slots_and_holds_what_the_paper_says(family: str, ranks: int) -> None:
    for cell, plan in enumerate(plans(family, ranks)):
        chunks, ones = plan.placement.chunks, [1] * plan.placement.stages
        slots = slots_needed(plan)
        validate(plan, slots)
        held = plan.peak_activations
        assert peak_memory(plan, ones, ones) == held
        published = [
            min(PEAKS[family](ranks, rank, plan.microbatches, chunks), plan.microbatches * chunks)
            for rank in range(ranks)
        ]
        assert all(here <= said for here, said in zip(held, published, strict=True)), plan.to_text()
        if family in OF_THE_FULLEST:
            assert max(held) == max(published), plan.to_text()
        elif family not in ENOUGH or plan.microbatches >= ENOUGH[family](ranks):
            assert list(held) == published, plan.to_text()
        if cell % 5 == 0:  # one edge of every fifth plan; the next test has fewer plans, and the long one all of both
            edge = plan.edges[cell // 5 % len(plan.edges)] if plan.edges else None
            if edge and slots[edge]:
                refused_with_a_slot_less(plan, programs_of(plan), slots, edge)


def check_slots(plan: Plan) -> Counter[bool]:
    """Takes a slot from every edge with several, once with the slots of ``slots_needed`` and once with so few that this
    always stops the plan. How often it was refused, and how often not."""
    slots, programs = slots_needed(plan), programs_of(plan)
    assert comes_to_its_end(programs, slots)
    few = fewest(programs, slots)
    validate(plan, few)
    refused = Counter(refused_with_a_slot_less(plan, programs, slots, e) for e in plan.edges if slots[e] > 1)
    always = [refused_with_a_slot_less(plan, programs, few, edge) for edge in plan.edges if few[edge] > 1]
    assert all(always)
    return refused + Counter(always)


def test_a_slot_less_on_any_edge_is_refused_exactly_where_a_replay_stops() -> None:
    """With the slots of ``slots_needed`` no send ever waits, which is more than it takes to get through: one less stops
    a plan only where none is left. So few that every one counts are found by trying."""
    refused: Counter[bool] = Counter()
    for family in FAMILIES:
        for ranks in (2, 3, 4):
            for plan in plans(family, ranks):
                if plan.microbatches == 6:
                    refused += check_slots(plan)
    assert min(refused[True], refused[False]) > 50


@pytest.mark.parametrize("family", LEGAL)
def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do(family: str) -> None:
    """What does not fit is the ranks where no number of micro-batches would do, else the micro-batches."""
    rows = {ranks: [m for m in range(1, 100) if legal(family, ranks, m)] for ranks in range(1, 20)}
    for ranks in RANKS:
        for microbatches in MICROBATCHES:
            if not legal(family, ranks, microbatches):
                with pytest.raises(PlanError) as caught:
                    build(family, ranks, microbatches)
                what, got = ("micro-batches", microbatches) if rows[ranks] else ("ranks", ranks)
                fits = rows[ranks] or [p for p, fitting in rows.items() if fitting]
                nearest = {*[n for n in fits if n < got][-1:], *[n for n in fits if n > got][:1]}
                problem, _, needed = str(caught.value).partition(f"; got {got}; needed ")
                assert what in problem
                assert set(map(int, re.findall(r"\b[0-9]+\b", needed))) == nearest


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_of_chunks_that_do_not_fit_are_refused_with_the_nearest_that_do(family: str) -> None:
    fits = LEGAL_CHUNKS.get(family, [1])
    for chunks in CHUNKS:
        if chunks in fits:
            assert build(family, 4, 16, chunks=chunks).placement.chunks == chunks
            continue
        nearest = {*[n for n in fits if n < chunks][-1:], *[n for n in fits if n > chunks][:1]}
        with pytest.raises(PlanError) as caught:
            build(family, 4, 16, chunks=chunks)
        problem, _, needed = str(caught.value).partition(f"; got {chunks}; needed ")
        assert problem == f"wrong number of chunks per rank for {family}"
        assert set(map(int, re.findall(r"\b[0-9]+\b", needed))) == nearest


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("family", "ranks"), sampled(product(FAMILIES, RANKS), 1, name="slots", stratum=lambda case: case[0])
)
def test_a_slot_less_on_any_edge_of_the_grid_is_refused_exactly_where_a_replay_stops(family: str, ranks: int) -> None:
    for plan in plans(family, ranks):
        check_slots(plan)
