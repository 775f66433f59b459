"""zb-auto: zero bubble for a memory limit, planned with the real times of F, I, W and hops.

    rank 0 |F0 F1 F2 ......I0 W0 F3 I1 W1 I2 W2 I3 W3
    rank 1 |...F0 F1 ...I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2 |......F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

Time        simulate: the bubble shrinks as the limit grows. At F = I = W and no hop cost that of zb-h1 at a limit of P
            micro-batches, and from 2P-1 (M no fewer) none in the span. (M+P-1)(F+I) + W at M <= P, a limit of P, no
            hop cost and W no longer than F and I.
Memory      at most the limit of each rank: P micro-batches where none is given (ZB-1p); 2P is ZB-2p. Made for limits
            from P to 2P; a lower one is kept, at a large bubble.
Constraints the limit of a rank holds at least one micro-batch: the larger of its activation and its deferred part.
Source      Zero Bubble (arXiv 2401.10241), section 3.1 and appendix H; what the heuristic leaves open there is decided
            as by the authors' scheduler, so that the rates of table 5 come out to all printed digits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, pairwise, product
from operator import add, sub
from typing import NamedTuple

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.costs import CostModel, Costs, RankCosts
from pipex.plan.memory import peak_memory
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan


def zb_auto(
    ranks: int, microbatches: int, *, costs: CostModel | None = None, memory: float | Sequence[float] | None = None
) -> Plan:
    """The plan with the shortest span (then makespan) of the heuristic's eight ways to decide.

    Args:
        costs: one unit for F, I and W, no hops and equal activations where not given.
        memory: one limit for all ranks or one per rank, in the unit of the costs' activation; infinity for no limit.
            None: P activations of each rank.

    Raises:
        PlanError: a limit that no plan can keep (names the smallest that one can), or a wrong number of limits.
        InputError: the costs are of another number of ranks.
    """
    placement = Placement("loop", ranks)
    times = (RankCosts.of(ranks) if costs is None else costs).on(placement)
    limits = _limits(times, memory)
    drafts = [_Draft(times, limits, microbatches, _Ways(*ways)) for ways in product((False, True), repeat=3)]
    best = min(drafts, key=lambda draft: (draft.span, draft.makespan))
    orders = tuple(rank.actions() for rank in best.ranks)
    plan = Plan("zb-auto", placement, microbatches, orders, peak_activations=(microbatches,) * ranks)
    ones = [1] * ranks
    return replace(plan, peak_activations=tuple(map(int, peak_memory(plan, ones, ones))))


def _limits(costs: Costs, memory: float | Sequence[float] | None) -> list[float]:
    smallest = list(map(max, costs.activation, costs.deferred))
    ranks = len(smallest)
    if memory is None:
        return [ranks * needed for needed in smallest]
    weights = costs.weights or [0.0] * ranks
    limits = list(memory) if isinstance(memory, Sequence) else [memory] * ranks
    if len(limits) != ranks:
        raise PlanError("wrong number of memory limits", got=len(limits), needed=f"1 or {ranks}, one per rank")
    least = list(map(add, weights, smallest))
    for rank, (limit, needed) in enumerate(zip(limits, least, strict=True)):
        if not limit >= needed:  # so that nan is refused too
            problem = f"memory limit of rank {rank} too small for zb-auto"
            fix = f"a limit of {max(least)} is feasible on every rank"
            what = "one micro-batch" + (" and the weights" if costs.weights else "")
            raise PlanError(problem, got=limit, needed=f"at least {needed}, {what}", fix=fix)
    return list(map(sub, limits, weights))


class _Ways(NamedTuple):
    """What the heuristic leaves open: no answer is best for all times, so all are tried."""

    delay_first_i: bool
    """The warm-up fills the whole wait for the first I, though its last F may make that I late."""
    hold_back_f: bool
    """A rank skips an F when the next rank has others in stock and the next I is due."""
    fill_short_waits: bool
    """A W may run in a wait that is shorter than itself even where waiting would not make the rank the idlest."""


class _Rank:
    """One rank while its order grows: its clock, what it has run and what it may hold."""

    def __init__(self, stage: int, costs: Costs, limit: float) -> None:
        self.stage = stage
        self.f, self.i, self.w = costs.forward[stage], costs.input_gradient[stage], costs.weight_gradient[stage]
        self.hop_f = costs.hop.get(Edge(stage - 1, stage, "activation"), 0.0)
        self.hop_i = costs.hop.get(Edge(stage + 1, stage, "gradient"), 0.0)
        self.activation, self.deferred, self.limit = costs.activation[stage], costs.deferred[stage], limit
        self.order: list[Kind] = []
        self.f_ends: list[float] = []
        self.i_ends: list[float] = []
        self.w_done = 0
        self.now = self.idle = 0.0

    @property
    def whole(self) -> int:
        """Micro-batches between F and I."""
        return len(self.f_ends) - len(self.i_ends)

    @property
    def waiting(self) -> int:
        """Micro-batches between I and W."""
        return len(self.i_ends) - self.w_done

    @property
    def span(self) -> float:
        return self.now - (self.f_ends[0] - self.f)

    def fits(self, whole: int, waiting: int) -> bool:
        """Whether it may hold so much, and still after the next I, which adds to it where W needs more than F left."""
        growth = max(0.0, self.deferred - self.activation)
        return whole * self.activation + waiting * self.deferred + growth <= self.limit

    def run_f(self, arrival: float) -> None:
        self._wait(arrival)
        self.now += self.f
        self.f_ends.append(self.now)
        self.order.append(Kind.F)

    def run_i(self, arrival: float) -> None:
        self._wait(arrival)
        self.now += self.i
        self.i_ends.append(self.now)
        self.order.append(Kind.I)

    def run_w(self) -> None:
        assert self.waiting
        self.now += self.w
        self.w_done += 1
        self.order.append(Kind.W)

    def _wait(self, until: float) -> None:
        if until > self.now:
            if self.order:  # the span begins with the first F
                self.idle += until - self.now
            self.now = until

    def actions(self) -> tuple[Action, ...]:
        """Its order; micro-batches rise within each kind."""
        numbers: dict[Kind, Iterator[int]] = defaultdict(count)
        return tuple(Action(self.stage, kind, next(numbers[kind])) for kind in self.order)


class _Draft:
    """The heuristic: a warm-up, then one F down all ranks and one I up all ranks in turn, W in the waits."""

    def __init__(self, costs: Costs, limits: list[float], microbatches: int, ways: _Ways) -> None:
        self.microbatches, self.ways = microbatches, ways
        self.ranks = [_Rank(stage, costs, limit) for stage, limit in enumerate(limits)]
        self.most_idle = 0.0
        self._warm_up()
        self._run_i_on_all()
        for _ in range(1, microbatches):
            self._run_f_on_all()
            self._run_i_on_all()
        for rank in self.ranks:
            while rank.waiting:
                rank.run_w()

    @property
    def span(self) -> float:
        return max(rank.span for rank in self.ranks)

    @property
    def makespan(self) -> float:
        return max(rank.now for rank in self.ranks)

    def _warm_up(self) -> None:
        """The F before the first I: as many as fit into the wait for it and into memory."""
        for rank in self.ranks:
            rank.run_f(self._f_arrival(rank))
        counts = [1] * len(self.ranks)
        first_i = self.ranks[-1].now + self.ranks[-1].i
        for rank in self.ranks[-2::-1]:
            arrival, now, ahead = first_i + rank.hop_i, rank.now, 1
            while ahead < self.microbatches and rank.fits(ahead + 1, 0):
                if now >= arrival or (now + rank.f > arrival and not self.ways.delay_first_i):
                    break
                now += rank.f
                ahead += 1
            first_i = max(now, arrival) + rank.i
            counts[rank.stage] = ahead
        for rank in self.ranks:
            # One F fewer than the rank before, as in 1f1b: what more it ran, it would wait for.
            if rank.stage and counts[rank.stage - 1] < self.microbatches:
                counts[rank.stage] = min(counts[rank.stage], max(1, counts[rank.stage - 1] - 1))
            for _ in range(1, counts[rank.stage]):
                rank.run_f(self._f_arrival(rank))

    def _run_f_on_all(self) -> None:
        going = [len(rank.f_ends) < self.microbatches for rank in self.ranks]
        if self.ways.hold_back_f:
            for rank, after in pairwise(self.ranks):
                going[rank.stage] &= not self._f_would_delay_i(rank, after)
        for rank in self.ranks[-2::-1]:
            going[rank.stage] &= going[rank.stage + 1]  # no rank adds to the stock of one that does not use it
        for rank in self.ranks:
            if going[rank.stage]:
                while not rank.fits(rank.whole + 1, rank.waiting):
                    rank.run_w()
                arrival = self._f_arrival(rank)
                self._fill(rank, arrival)
                rank.run_f(arrival)
                self.most_idle = max(self.most_idle, rank.idle)

    def _run_i_on_all(self) -> None:
        for rank in reversed(self.ranks):
            while not rank.fits(rank.whole, rank.waiting):
                rank.run_w()
            arrival = self._i_arrival(rank)
            self._fill(rank, arrival)
            if rank.stage == 0 and len(rank.f_ends) == self.microbatches:
                while rank.waiting:  # from here on nobody waits for rank 0
                    rank.run_w()
            rank.run_i(arrival)
            self.most_idle = max(self.most_idle, rank.idle)

    def _f_arrival(self, rank: _Rank) -> float:
        """When the input of the rank's next F is there."""
        return self.ranks[rank.stage - 1].f_ends[len(rank.f_ends)] + rank.hop_f if rank.stage else 0.0

    def _i_arrival(self, rank: _Rank) -> float:
        """When the gradient for the rank's next I is there."""
        last = rank is self.ranks[-1]
        return 0.0 if last else self.ranks[rank.stage + 1].i_ends[len(rank.i_ends)] + rank.hop_i

    def _f_would_delay_i(self, rank: _Rank, after: _Rank) -> bool:
        """Whether an F that the next rank does not need yet, having two in stock, would end after the next I is due,
        with the W that must make room for it, and to wait for that I would not make the rank the idlest."""
        if len(rank.f_ends) == self.microbatches or len(rank.f_ends) < len(after.f_ends) + 2:
            return False
        due = after.now + after.f + after.i + rank.hop_i
        room = 0
        while not rank.fits(rank.whole + 1, rank.waiting - room):
            room += 1
        return rank.now + rank.f + room * rank.w > due and self._may_wait(rank, due)

    def _fill(self, rank: _Rank, arrival: float) -> None:
        """W into the wait until ``arrival``: all that fit, and one that does not where waiting is worse."""
        while rank.waiting and rank.now + rank.w <= arrival:
            rank.run_w()
        if rank.waiting and rank.now < arrival and (self.ways.fill_short_waits or not self._may_wait(rank, arrival)):
            rank.run_w()

    def _may_wait(self, rank: _Rank, until: float) -> bool:
        """Whether a rank that waits so long has still not idled more than every other: then the step is no longer."""
        return until - rank.now <= self.most_idle - rank.idle
