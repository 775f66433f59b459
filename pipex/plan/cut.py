"""Where to cut a row of layers, so that the fullest rank has as little to do as possible.

A rank's load is what one micro-batch costs it: the time of all its layers, over all its stages; under ``bidirectional``
half of that, since a micro-batch passes one of the two pipes. The largest load is the bottleneck: M micro-batches take
at least M bottlenecks, in whatever order. Hops are left out, since they delay a rank but do not occupy it.

One stage per rank: ``chain``, which is exact. Several stages per rank: a rank's load is the sum of pieces that are far
apart, which makes the problem one of packing. Local search shifts layers along the row: on 128 layers whose times vary
by 5 to 30 %, for 8 to 64 stages, it ends .1 to 4 % above the bound, and 20 times its budget finds cuts that are better
by 0 to .6 %. The smallest bottleneck alone is a bad guide there: very unequal pieces on the ranks made simulated steps
of interleaved schedules up to a quarter longer. So the pieces are then evened out, which may cost a little bottleneck.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, floor

from pipex.errors import InputError
from pipex.plan.chain import Blocks, chain, check_stages, uniform
from pipex.plan.placement import Placement

Block = tuple[int, int]
"""First layer, and the one after the last."""

ROUNDING = 1e-9
"""Sums of the same layers may differ in their last bits."""

MemoryUse = Callable[[int, Sequence[Block]], float]
"""(rank, its blocks in stage order) -> what they need of the rank's memory limit; above 1 is too much."""


SLACKS = (0.02, 0.0, 0.01, 0.04, 0.08)
"""How much more bottleneck equal pieces may cost. The first was the best for most of 60 simulated cases of interleaved,
zero-bubble and wave schedules with a light or a heavy head."""


@dataclass(frozen=True)
class Cut:
    """A cut of a row of layers.

    Attributes:
        counts: layers per stage in stage order (of one pipe under ``bidirectional``: both are cut alike).
        bottleneck: the largest load of a rank, in the unit of the times.
        bound: no cut into so many stages has a smaller bottleneck.
    """

    counts: tuple[int, ...]
    bottleneck: float
    bound: float


class TooLittleMemory(InputError):
    """No cut keeps the memory limits: with ``factor`` times as much there is one. ``proven``: with no less."""

    def __init__(self, factor: float, proven: bool) -> None:
        self.factor, self.proven = factor, proven
        needed = f"{'at least' if proven else 'as far as was found'} {factor:.4g} times as much"
        super().__init__("no cut of the model keeps the memory limits", needed=needed)


def cut(times: Sequence[float], placement: Placement) -> Cut:
    """Cuts layers of these times for the stages of ``placement``: with the smallest bottleneck that there is where
    every rank has one stage, else within the first of ``SLACKS`` of the smallest found.

    Args:
        times: F, I and W of each layer together.

    Raises:
        InputError: fewer layers than stages.
    """
    return next(cuts(times, placement))


def cuts(times: Sequence[float], placement: Placement, memory: MemoryUse | None = None) -> Iterator[Cut]:
    """The cut of ``cut``, and where ranks have several stages one for each of the other ``SLACKS``.

    Args:
        memory: what a rank would need; None: no limits.

    Raises:
        InputError: fewer layers than stages.
        TooLittleMemory: no cut is found that keeps the memory limits.
    """
    row = _Row(times, placement)
    check_stages(len(times), row.pieces)
    if row.alone:
        yield _cut_chain(row, memory)
    else:
        yield from _Search(row, memory).cuts()


def loads(times: Sequence[float], placement: Placement, counts: Sequence[int]) -> list[float]:
    """Per rank what one micro-batch costs it under a given cut."""
    return _Row(times, placement).loads(list(accumulate(counts, initial=0)))


def held_blocks(placement: Placement, counts: Sequence[int]) -> list[list[Block]]:
    """Per rank the blocks of its stages, in stage order, under a given cut."""
    blocks = list(pairwise(accumulate(counts, initial=0))) * len(placement.pipes)
    return [[blocks[stage] for stage in placement.stages_of(rank)] for rank in range(placement.ranks)]


class _Row:
    """The layers, and the pieces in which the placement wants them."""

    def __init__(self, times: Sequence[float], placement: Placement) -> None:
        pipe = placement.pipes[0]
        self.placement = placement
        self.layers = len(times)
        self.pieces = len(pipe)
        self.prefix = list(accumulate(times, initial=0.0))
        self.times = times
        # rank -> the pieces of its stages; the second pipe's stages hold the first one's pieces once more
        self.held = [[placement.piece(s) for s in placement.stages_of(rank)] for rank in range(placement.ranks)]
        self.alone = all(len(pieces) == 1 for pieces in self.held)

    def size(self, begin: int, end: int) -> float:
        return self.prefix[end] - self.prefix[begin]

    def loads(self, ends: Sequence[int]) -> list[float]:
        """Per rank, for pieces that end at ``ends[1:]``."""
        sizes = [self.prefix[end] - self.prefix[begin] for begin, end in pairwise(ends)]
        pipes = len(self.placement.pipes)
        return [sum(sizes[piece] for piece in pieces) / pipes for pieces in self.held]

    def even(self) -> float:
        """The largest piece of the uniform cut. No cut of smallest largest piece has a larger one."""
        ends = accumulate(uniform(self.layers, self.pieces), initial=0)
        return max(self.size(begin, end) for begin, end in pairwise(ends))

    def within(self, limit: float) -> Blocks:
        """All blocks up to a size, for ``chain``."""

        def blocks(_: int, begin: int) -> Iterable[tuple[int, float]]:
            for end in range(begin + 1, self.layers + 1):
                size = self.prefix[end] - self.prefix[begin]
                if size > limit:
                    return
                yield end, size

        return blocks

    def blocks(self, rank: int, ends: Sequence[int]) -> list[Block]:
        return [(ends[piece], ends[piece + 1]) for piece in self.held[rank]]

    def bound(self) -> float:
        """No bottleneck is below: the mean load; the heaviest layer, or the first or last one on its rank, with the
        lightest of layers for the other pieces of its rank; and, for every w, the load that whole ws make up: a rank
        holds at least as many of them as its layers do one by one."""
        times, ranks, pipes = self.times, self.placement.ranks, len(self.placement.pipes)
        chunks = self.placement.chunks
        bounds = [self.prefix[-1] / ranks, (max(times) + sum(sorted(times)[: chunks - 1])) / pipes]
        if pipes == 1:
            between = sorted(times[1:-1])
            for pieces in self.held:
                fixed = [times[end] for end, piece in ((0, 0), (-1, self.pieces - 1)) if piece in pieces]
                bounds.append(sum(fixed) + sum(between[: chunks - len(fixed)]))
        for w in {time for time in times if time > 0}:
            whole = sum(floor(time / w) for time in times)
            # Under two pipes, ranks r and P-1-r hold the same pieces, of which each does half.
            bounds.append(w * ceil(whole / ranks) if pipes == 1 else w / 2 * _halves(whole, ranks))
        return max(bounds)


def _halves(whole: int, ranks: int) -> int:
    """The least k such that ``whole`` units fit into ranks of capacity k/2 each, two together taking k."""
    k = 2 * whole // ranks
    while ranks // 2 * k + ranks % 2 * (k // 2) < whole:
        k += 1
    return k


def _cut_chain(row: _Row, memory: MemoryUse | None) -> Cut:
    """One stage per rank: exact."""
    if memory is not None:
        bottleneck, counts = _cut_chain_within(row, memory)
    else:
        found = chain(row.layers, row.pieces, row.within(row.even()))
        assert found is not None
        bottleneck, counts = found
    return Cut(tuple(counts), bottleneck, bottleneck)


def _cut_chain_within(row: _Row, memory: MemoryUse) -> tuple[float, list[int]]:
    rank_of = row.placement.rank_of

    def fitting(stage: int, begin: int) -> Iterable[tuple[int, float]]:
        for end in range(begin + 1, row.layers + 1):
            if memory(rank_of(stage), [(begin, end)]) <= 1:
                yield end, row.size(begin, end)

    if found := chain(row.layers, row.pieces, fitting):
        return found

    def memories(stage: int, begin: int) -> Iterable[tuple[int, float]]:
        return ((end, memory(rank_of(stage), [(begin, end)])) for end in range(begin + 1, row.layers + 1))

    smallest = chain(row.layers, row.pieces, memories)
    assert smallest is not None
    raise TooLittleMemory(smallest[0], proven=True)


OVERHEAD = 10
"""What a look at a cut takes besides its pieces, in pieces."""


class _Search:
    """Several stages per rank: local search, with a fixed seed and a fixed budget, so that every rank of a run finds
    the same cut.

    A state is the row of ``ends``: 0, then the end of each piece. A shift takes one layer from one piece and gives one
    to another, moving every piece between them by one layer.
    """

    BUDGET = 300_000
    """pieces looked at, in all; about a quarter of a second"""

    def __init__(self, row: _Row, memory: MemoryUse | None) -> None:
        self.row = row
        self.memory = memory
        self.left = self.BUDGET
        self.random = random.Random(0)

    def cuts(self) -> Iterator[Cut]:
        row = self.row
        bound = row.bound()
        found = chain(row.layers, row.pieces, row.within(row.even()))  # no large piece: a fair start
        assert found is not None
        trail = [list(accumulate(found[1], initial=0))]
        best = min(self.descend(trail[0], trail), self.descend(self.recut(trail[0])))
        enough = bound * (1 + ROUNDING)
        while (
            row.pieces < row.layers
            and row.pieces > 1
            and self.left > 0
            and not (best[0][0] <= 1 and best[0][1] <= enough)
        ):
            other = self.descend(self.kick(best[1]))
            if other[0] <= best[0]:  # among equals the newer, to wander on the plateau
                best = other
        (excess, least, *_), ends = best
        if excess > 1:
            raise TooLittleMemory(excess, proven=False)
        for slack in SLACKS:
            limit = least * (1 + slack + ROUNDING)
            # From the best cut, and from the most equal one on the way to it that will do.
            starts = [ends, *(cut for cut in trail if max(row.loads(cut)) <= limit and self.fill(cut) <= 1)][:2]
            even = min((self.even_out(start, limit) for start in starts), key=self.squares)
            counts = tuple(end - begin for begin, end in pairwise(even))
            yield Cut(counts, max(row.loads(even)), least if least <= enough else bound)

    def key(self, ends: Sequence[int]) -> list[float]:
        """What to minimise: memory above the limit, then the loads, largest first."""
        self.left -= self.row.pieces + OVERHEAD
        return [max(self.fill(ends), 1.0), *sorted(self.row.loads(ends), reverse=True)]

    def fill(self, ends: Sequence[int]) -> float:
        if self.memory is None:
            return 0.0
        return max(self.memory(rank, self.row.blocks(rank, ends)) for rank in range(self.row.placement.ranks))

    def recut(self, ends: list[int]) -> list[int]:
        """Cuts runs of neighbouring pieces on different ranks anew, by ``chain``, around what these ranks hold besides;
        as long as that helps."""
        row = self.row
        rank_of = [row.placement.rank_of(piece) for piece in range(row.pieces)]
        key = self.key(ends)
        improved = True
        while improved:
            improved = False
            for first in range(0, row.pieces, max(1, row.placement.ranks // 2)):
                last = first + 1
                while last < row.pieces and rank_of[last] not in rank_of[first:last]:
                    last += 1
                after = self.recut_run(ends, first, last)
                if (better := self.key(after)) < key:
                    ends, key, improved = after, better, True
        return ends

    def recut_run(self, ends: list[int], first: int, last: int) -> list[int]:
        """The same for the pieces first to last - 1, which stand on different ranks. (Under ``bidirectional`` a piece
        has a second rank, whose other piece may change as well; whether the result is better is for ``key`` to say.)"""
        row, start = self.row, ends[first]
        loads = row.loads(ends)
        limit = max(loads)

        def blocks(index: int, begin: int) -> Iterable[tuple[int, float]]:
            piece = first + index
            rank = row.placement.rank_of(piece)
            share = row.held[rank].count(piece) / len(row.placement.pipes)
            besides = loads[rank] - share * row.size(ends[piece], ends[piece + 1])
            for end in range(begin + 1, ends[last] - start + 1):
                load = besides + share * row.size(start + begin, start + end)
                if load > limit:
                    return
                yield end, load

        found = chain(ends[last] - start, last - first, blocks)
        if found is None:
            return ends
        return [*ends[:first], *accumulate(found[1], initial=start), *ends[last + 1 :]]

    def descend(self, ends: list[int], trail: list[list[int]] | None = None) -> tuple[list[float], list[int]]:
        """Takes layers from the fullest rank while that helps; notes on the trail where it has been."""
        key = self.key(ends)
        while self.left > 0:
            shifted = (after for piece in self.fullest(ends, key) for after in self.shifts(ends, piece))
            best = min(((self.key(after), after) for after in shifted), default=(key, ends))
            if best[0] >= key:
                break
            key, ends = best
            if trail is not None:
                trail.append(ends)
        return key, ends

    def fullest(self, ends: Sequence[int], key: list[float]) -> list[int]:
        """The pieces of the rank whose memory is fullest, where that is too full; else of the one with most to do."""
        if self.memory is not None and key[0] > 1:
            uses = [self.memory(rank, self.row.blocks(rank, ends)) for rank in range(self.row.placement.ranks)]
        else:
            uses = self.row.loads(ends)
        return self.row.held[uses.index(max(uses))]

    def shifts(self, ends: Sequence[int], piece: int) -> Iterable[list[int]]:
        """One layer from ``piece`` to each other piece."""
        if ends[piece + 1] - ends[piece] < 2:
            return
        for other in range(self.row.pieces):
            if other != piece:
                yield _shift(ends, piece, other)

    def kick(self, ends: list[int]) -> list[int]:
        """A few random shifts, of one layer or of several."""
        for _ in range(self.random.randint(1, 4)):
            source, target = self.random.sample(range(self.row.pieces), 2)
            for _ in range(min(self.random.choice((1, 1, 2, 4)), ends[source + 1] - ends[source] - 1)):
                ends = _shift(ends, source, target)
        return ends

    def even_out(self, ends: list[int], limit: float) -> list[int]:
        """Makes the pieces more equal while no load is above the limit."""
        squares = self.squares(ends)
        piece = since = 0
        self.left = self.BUDGET // 4
        while since < self.row.pieces and self.left > 0:
            for after in self.shifts(ends, piece):
                fewer = self.squares(after)
                if fewer < squares and max(self.row.loads(after)) <= limit and self.fill(after) <= 1:
                    squares, ends, since = fewer, after, 0
                    break
            else:
                piece, since = (piece + 1) % self.row.pieces, since + 1
        return ends

    def squares(self, ends: Sequence[int]) -> float:
        self.left -= self.row.pieces + OVERHEAD
        return sum(self.row.size(begin, end) ** 2 for begin, end in pairwise(ends))


def _shift(ends: Sequence[int], source: int, target: int) -> list[int]:
    after = list(ends)
    for end in range(min(source, target) + 1, max(source, target) + 1):
        after[end] += 1 if target < source else -1
    return after
