"""Cuts of a row of layers, against brute force over all cuts and against closed forms."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations, pairwise
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipex.errors import InputError
from pipex.plan.chain import chain, uniform
from pipex.plan.cut import SLACKS, Block, MemoryUse, _Search, cut, cuts, held_blocks, loads
from pipex.plan.placement import Placement

ONE_STAGE_PER_RANK = [Placement("loop", 1), Placement("loop", 2), Placement("loop", 4)]
SEVERAL = [
    Placement("loop", 2, 2), Placement("loop", 3, 2), Placement("loop", 2, 3), Placement("v", 1, 2),
    Placement("v", 2, 2), Placement("v", 3, 2), Placement("wave", 2, 4), Placement("bidirectional", 1, 2),
    Placement("bidirectional", 2, 2), Placement("bidirectional", 3, 2), Placement("bidirectional", 4, 2),
]  # fmt: skip


def every_cut(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    for ends in combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in pairwise((0, *ends, layers)))


def slow_loads(times: Sequence[float], placement: Placement, counts: Sequence[int]) -> list[float]:
    """Straight from the definition: the mean over the pipes of a rank's time for a micro-batch."""
    pieces = [times[a:b] for a, b in pairwise(accumulate(counts, initial=0))]
    pipes = placement.pipes
    return [
        sum(sum(pieces[stage - pipe[0]]) for pipe in pipes for stage in pipe if placement.rank_of(stage) == rank)
        / len(pipes)
        for rank in range(placement.ranks)
    ]


def slow_best(times: Sequence[float], placement: Placement) -> float:
    every = every_cut(len(times), len(placement.pipes[0]))
    return min(max(slow_loads(times, placement, counts)) for counts in every)


def check(counts: Sequence[int], layers: int, placement: Placement) -> None:
    assert len(counts) == len(placement.pipes[0])
    assert sum(counts) == layers
    assert min(counts) >= 1


def random_times(rng: random.Random, layers: int) -> list[float]:
    return [rng.choice([1.0, 1.0, 1.0, rng.random() * 3, float(rng.randint(0, 9))]) for _ in range(layers)]


@given(st.data())
def test_one_stage_per_rank_gets_the_best_of_all_cuts(data: st.DataObject) -> None:
    times = data.draw(st.lists(st.floats(0, 10), min_size=4, max_size=9))
    placement = data.draw(st.sampled_from(ONE_STAGE_PER_RANK))
    found = cut(times, placement)
    check(found.counts, len(times), placement)
    assert found.bottleneck == pytest.approx(slow_best(times, placement), rel=1e-12, abs=1e-12)
    assert found.bound == found.bottleneck
    assert max(loads(times, placement, found.counts)) == found.bottleneck


@given(st.data())
def test_of_the_best_cuts_the_most_even_one_is_taken(data: st.DataObject) -> None:
    stages = data.draw(st.integers(4, 6))
    times = data.draw(st.lists(st.integers(0, 9), min_size=stages, max_size=10))
    every = [slow_loads(times, Placement("loop", stages), counts) for counts in every_cut(len(times), stages)]
    largest = min(map(max, every))
    squares = min(sum(x * x for x in row) for row in every if max(row) == largest)
    found = slow_loads(times, Placement("loop", stages), cut(times, Placement("loop", stages)).counts)
    assert (max(found), sum(x * x for x in found)) == (largest, squares)


def test_an_early_block_may_be_large_where_a_later_one_is_larger_still() -> None:
    """Squares 369; a search that always prefers the smallest largest block so far ends at 1, 2, 2, 2, 1 with 371."""
    assert cut([4, 6, 1, 5, 4, 4, 5, 12], Placement("loop", 5)).counts == (2, 2, 2, 1, 1)


@pytest.mark.parametrize("placement", SEVERAL, ids=str)
def test_several_stages_per_rank_get_the_best_of_all_cuts_of_small_models(
    placement: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Search, "BUDGET", 60_000)
    rng = random.Random(str(placement))
    for _ in range(6):
        layers = rng.randint(len(placement.pipes[0]), 12)
        times = random_times(rng, layers)
        best = slow_best(times, placement)
        for slack, found in zip(SLACKS, cuts(times, placement), strict=True):
            check(found.counts, layers, placement)
            assert best * (1 - 1e-9) <= found.bottleneck <= best * (1 + slack + 1e-8), times
            assert found.bound <= best * (1 + 1e-9)
            assert max(slow_loads(times, placement, found.counts)) == pytest.approx(found.bottleneck, rel=1e-9)


def optimum_with_a_heavy_head(layers: int, head: float, ranks: int, chunks: int, pipes: int = 1) -> float:
    """For ``layers`` of time 1 and a head: the least C so that the layers fit, C per rank and C - head beside the head.
    With two pipes two ranks share pairs of pieces, 2C per pair."""
    bins = ranks // pipes
    needed = [float(k) for k in range(1, layers + 2)]
    for capacity in sorted([*needed, *(head + k for k in needed), head]):
        room = (bins - 1) * floor(capacity) + floor(capacity - head)
        if room >= layers and capacity >= head + chunks - 1:
            return capacity / pipes
    raise AssertionError


@pytest.mark.parametrize("head", [1.0, 3.25, 5.0, 20.5])
@pytest.mark.parametrize(
    "placement",
    [
        Placement("loop", 16), Placement("loop", 8, 2), Placement("v", 8, 2), Placement("loop", 4, 4),
        Placement("wave", 4, 4), Placement("loop", 16, 2), Placement("loop", 16, 4), Placement("bidirectional", 16, 2),
    ],
    ids=str,
)  # fmt: skip
def test_126_equal_layers_and_a_heavy_head_are_cut_at_the_optimum(placement: Placement, head: float) -> None:
    times = [1.0] * 126 + [head]
    best = optimum_with_a_heavy_head(126, head, placement.ranks, placement.chunks, len(placement.pipes))
    for slack, found in zip(SLACKS, cuts(times, placement), strict=False):
        check(found.counts, 127, placement)
        assert best * (1 - 1e-9) <= found.bottleneck <= best * (1 + slack + 1e-8)
        assert found.bound == pytest.approx(best, rel=1e-9)
    if placement.chunks == 1:
        assert cut(times, placement).bottleneck == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize(
    ("placement", "distance"),
    [
        (Placement("loop", 4, 2), 0.01), (Placement("loop", 8, 2), 0.035), (Placement("v", 8, 2), 0.035),
        (Placement("wave", 4, 4), 0.015), (Placement("bidirectional", 8, 2), 0.015),
    ],
    ids=str,
)  # fmt: skip
def test_uneven_layers_are_cut_near_the_bound(placement: Placement, distance: float) -> None:
    for noise in (0.05, 0.3):
        rng = random.Random(0)
        times = [0.1, *(1 + noise * rng.uniform(-1, 1) for _ in range(126)), 4.0]
        even, tight, *_ = cuts(times, placement)
        assert tight.bound <= tight.bottleneck <= (1 + distance) * tight.bound
        assert even.bottleneck <= (1 + SLACKS[0] + 1e-8) * tight.bottleneck


def test_the_same_layers_are_always_cut_alike() -> None:
    """On every rank of a run: the search ends at its budget here, without a proof, after many random moves."""
    rng = random.Random(0)
    times = [rng.uniform(0.7, 1.3) for _ in range(128)]
    first, second = (list(cuts(times, Placement("loop", 8, 4))) for _ in range(2))
    assert first == second
    assert first[1].bottleneck > first[1].bound


def test_pieces_are_as_equal_as_the_slack_allows() -> None:
    assert sorted(cut([1.0] * 16, Placement("loop", 2, 4)).counts) == [2] * 8
    assert sorted(cut([1.0] * 12, Placement("v", 3, 2)).counts) == [2] * 6
    rng = random.Random(1)
    times = [rng.uniform(0.7, 1.3) for _ in range(12)]
    placement = Placement("v", 2, 2)

    def squares(counts: Sequence[int]) -> float:
        return sum(sum(times[a:b]) ** 2 for a, b in pairwise(accumulate(counts, initial=0)))

    least = slow_best(times, placement)
    for slack, found in zip(SLACKS, cuts(times, placement), strict=True):
        allowed = [c for c in every_cut(12, 4) if max(slow_loads(times, placement, c)) <= least * (1 + slack + 1e-9)]
        assert squares(found.counts) <= 1.02 * min(map(squares, allowed))


def test_blocks_are_listed_per_rank_in_stage_order() -> None:
    assert held_blocks(Placement("v", 2, 2), (1, 2, 3, 4)) == [[(0, 1), (6, 10)], [(1, 3), (3, 6)]]
    assert held_blocks(Placement("bidirectional", 2, 2), (1, 2)) == [[(0, 1), (1, 3)], [(1, 3), (0, 1)]]


def rooms(weights: Sequence[float], limit: Sequence[float]) -> MemoryUse:
    def use(rank: int, blocks: Sequence[Block]) -> float:
        return sum(sum(weights[a:b]) for a, b in blocks) / limit[rank]

    return use


def test_memory_limits_are_kept_and_the_best_cut_within_them_is_found() -> None:
    rng = random.Random(5)
    refused = 0
    for _ in range(60):
        placement = rng.choice(ONE_STAGE_PER_RANK[1:])
        layers = rng.randint(placement.ranks, 9)
        times, weights = random_times(rng, layers), [rng.uniform(0, 5) for _ in range(layers)]
        limit = [rng.uniform(0.5, 2) * sum(weights) / placement.ranks for _ in range(placement.ranks)]

        def fullest(counts: Sequence[int], w: Sequence[float] = weights, at: Sequence[float] = limit) -> float:
            return max(sum(w[a:b]) / at[r] for r, (a, b) in enumerate(pairwise(accumulate(counts, initial=0))))

        every = list(every_cut(layers, placement.ranks))
        legal = [counts for counts in every if fullest(counts) <= 1]
        if legal:
            (found,) = cuts(times, placement, rooms(weights, limit))
            assert fullest(found.counts) <= 1
            best = min(max(slow_loads(times, placement, counts)) for counts in legal)
            assert found.bottleneck == pytest.approx(best, rel=1e-12)
        else:
            refused += 1
            factor = min(map(fullest, every))
            with pytest.raises(InputError, match="no cut of the model keeps") as caught:
                list(cuts(times, placement, rooms(weights, limit)))
            assert f"needed at least {factor:.4g} times as much" in str(caught.value)
    assert 10 < refused < 50


@pytest.mark.parametrize("placement", [Placement("v", 3, 2), Placement("loop", 2, 3)], ids=str)
def test_several_stages_per_rank_keep_memory_limits_too(placement: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Search, "BUDGET", 60_000)
    times, weights = [1.0] * 11 + [6.0], [3.0] + [1.0] * 10 + [2.0]

    def fullest(counts: Sequence[int]) -> float:
        return max(sum(sum(weights[a:b]) for a, b in blocks) for blocks in held_blocks(placement, counts))

    every = list(every_cut(12, 6))
    least = min(map(fullest, every))
    even, tight, *_ = cuts(times, placement, rooms(weights, [least] * placement.ranks))
    assert fullest(even.counts) == fullest(tight.counts) == least
    assert tight.bottleneck == min(max(slow_loads(times, placement, c)) for c in every if fullest(c) == least)
    with pytest.raises(InputError, match="needed as far as was found 2 times as much"):
        list(cuts(times, placement, rooms(weights, [least / 2] * placement.ranks)))


def test_pieces_are_evened_out_within_the_memory_limits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Search, "BUDGET", 20_000)
    rng, placement = random.Random(0), Placement("loop", 2, 2)
    for _ in range(15):
        times, weights = [rng.uniform(0.8, 1.2) for _ in range(10)], [rng.uniform(0, 5) for _ in range(10)]

        def fullest(counts: Sequence[int], w: Sequence[float] = weights) -> float:
            return max(sum(sum(w[a:b]) for a, b in blocks) for blocks in held_blocks(placement, counts))

        limit = 1.02 * min(map(fullest, every_cut(10, 4)))
        for found in cuts(times, placement, rooms(weights, [limit] * 2)):
            assert fullest(found.counts) <= limit


def test_one_rank_with_too_little_memory_is_refused() -> None:
    for placement in (Placement("loop", 1), Placement("loop", 1, 2), Placement("bidirectional", 1, 2)):
        with pytest.raises(InputError, match="no cut of the model keeps the memory limits"):
            list(cuts([1.0, 1.0], placement, rooms([1.0, 1.0], [0.5])))


@pytest.mark.parametrize("placement", [Placement("loop", 8), Placement("loop", 4, 2), Placement("wave", 2, 4)], ids=str)
def test_fewer_layers_than_stages_are_refused_with_both_numbers(placement: Placement) -> None:
    with pytest.raises(InputError, match="a model of 7 layers cannot be cut into 8 stages; needed 1 to 7 stages"):
        cut([1.0] * 7, placement)


def test_layers_that_cost_nothing_can_be_cut() -> None:
    assert cut([0.0] * 5, Placement("loop", 3)).bottleneck == 0
    assert cut([0.0] * 5, Placement("v", 2, 2)).bound == 0


def test_a_chain_without_a_legal_cut_is_none() -> None:
    assert chain(4, 2, lambda stage, begin: [(begin + 1, 1.0)]) is None


@pytest.mark.parametrize(
    ("layers", "stages", "counts"),
    [(1, 1, [1]), (4, 4, [1, 1, 1, 1]), (9, 4, [3, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (34, 8, [5, 5, *[4] * 6])],
)
def test_uniform_gives_the_extra_layers_to_the_first_stages(layers: int, stages: int, counts: list[int]) -> None:
    assert uniform(layers, stages) == counts
