"""What no schedule can beat, and why.

One rank at a time: its work, and the time for which it must be idle whatever anyone does.

    before its first F   the first micro-batch is still on its way (counts in a makespan only)
    before its first I   until one micro-batch has gone all the way and come back, the rank can run forwards only, and
                         of these no more than it has memory for
    after its last F     the last micro-batch goes to the end and comes back, while the rank has left the backwards of
                         the activations that it holds, and no others
    after its last I     the gradient goes on to the first stage (counts in a makespan only), while the rank has left
                         the weight gradients that it holds back, and no others

On every rank a micro-batch meets the shallowest stage first on its way out and last on its way home; so the rank's
first F and last I are of that stage, its first I and last F of its deepest. A last F comes after the first I where
the memory is too small for all forwards at once; else the two windows may overlap, and only one of them counts.
Besides, a micro-batch takes a certain memory for a certain time, and all of them must share the limit.

Where stages may be recomputed or offloaded to keep a limit, a rank does so with those of its stages with which its own
bound is lowest, the others having done nothing. What an I takes for itself, and the time of copies, are left out.
With two copies of a model each pipe has its own such times, of which the shorter are certain, and the gradients of the
copies are added up at the end.

With stages and hops all alike, F, I and W being times of a rank, c a hop and a limit of P micro-batches, the first I
alone makes a rank idle for (P-1)I/V + (PV+P-2)c on a loop of V chunks, for (P-1)I/2 + 3(P-1)c on a V. At V = 1 the
last F adds (P-1)(F-W+2c); ZB-H1 reaches that, so it is optimal there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, product
from math import inf
from typing import Literal, NamedTuple

from pipex.errors import InputError
from pipex.plan.actions import Kind
from pipex.plan.costs import Costs
from pipex.plan.placement import Placement
from pipex.plan.versions import Update

SLACK = 1 + 1e-9
"""Sums of memory in floating point may exceed a limit by this factor: three thirds need not be 1."""


class Bound(NamedTuple):
    """A time, in the unit of the costs, that no schedule can go below, and the reason in words."""

    value: float
    reason: str


Spare = Literal["recompute", "offload"]
"""A way to hold less of a stage between F and I."""

_MOST_SPARED = 6
"""Stages of a rank of which all subsets are looked at; of more, recomputation counts as if it took no time."""


def smallest_memory(placement: Placement, costs: Costs, spare: Collection[Spare] = ()) -> tuple[float, ...]:
    """Per rank the memory without which no plan with a backward can run, in the unit of the costs: its weights, and a
    micro-batch that has reached a stage, which is held, whole or as far as ``spare`` says, by all stages before it.
    With one pipe it is enough too, as ``naive`` shows."""
    every = range(placement.stages)
    least = costs.spared(every if "recompute" in spare else (), every if "offload" in spare else ()).activation

    def needed(stages: Sequence[int]) -> float:
        return max(costs.activation[s] + sum(least[t] for t in stages if t < s) for s in stages)

    return tuple(
        weights + min(map(needed, _stages_of(placement, rank, placement.pipes)))
        for rank, weights in enumerate(costs.weights_held(placement))
    )


def check_limit(placement: Placement, costs: Costs, limit: Sequence[float], spare: Collection[Spare] = ()) -> None:
    """Raises InputError unless ``limit`` has one entry per rank, none below ``smallest_memory``."""
    if len(limit) != placement.ranks:
        raise InputError("wrong number of memory limits", got=len(limit), needed=f"{placement.ranks}, one per rank")
    for rank, (given, needed) in enumerate(zip(limit, smallest_memory(placement, costs, spare), strict=True)):
        if not given * SLACK >= needed:
            problem = f"no plan fits the memory limit of rank {rank}"
            what = "what one micro-batch holds there" + (", and the weights" if costs.weights is not None else "")
            raise InputError(problem, got=f"{given:g}", needed=f"at least {needed:g}, {what}")


def makespan_bound(
    placement: Placement,
    microbatches: int,
    costs: Costs,
    limit: Sequence[float] | None = None,
    update: Update = "step",
    spare: Collection[Spare] = (),
) -> Bound:
    """No plan has a smaller makespan.

    Args:
        placement, microbatches, update: those of the plans.
        costs: those of the simulation, or ``Costs.spared`` of them, for plans with these stages spared.
        limit: per rank the peak memory that plans may have, in the unit of the costs; None: any. Ignored where there
            is no backward.
        spare: what plans may do with any of their stages to keep the limit.

    Raises:
        InputError: the costs do not fit the placement, or no plan at all fits the limit (names the smallest that is
            needed).
    """
    return _bound(placement, microbatches, costs, limit, update, spare, whole_step=True)


def span_bound(
    placement: Placement,
    microbatches: int,
    costs: Costs,
    limit: Sequence[float] | None = None,
    update: Update = "step",
    spare: Collection[Spare] = (),
) -> Bound:
    """No plan has a smaller span; as ``makespan_bound`` otherwise."""
    return _bound(placement, microbatches, costs, limit, update, spare, whole_step=False)


def _bound(
    placement: Placement,
    microbatches: int,
    costs: Costs,
    limit: Sequence[float] | None,
    update: Update,
    spare: Collection[Spare],
    *,
    whole_step: bool,
) -> Bound:
    costs.on(placement)
    every = [_Chain.of(pipe, placement, costs, backward=update != "never") for pipe in placement.pipes]
    limits = [inf] * placement.ranks
    if limit is None or update == "never":
        spare = ()
    else:
        check_limit(placement, costs, limit, spare)
        limits = [most * SLACK - held for most, held in zip(limit, costs.weights_held(placement), strict=True)]

    def passing(chains: list[_Chain], ways: list[tuple[int, ...]]) -> Bound:
        """Where all of these are passed: the best way to share the micro-batches, and in that the worst rank."""
        if update == "never":
            ranks = [[_forward_only(rank, placement, chains, whole_step)] for rank in range(placement.ranks)]
        else:
            ranks = [
                [
                    _with_backward(rank, placement, chains, microbatches, choice, limits[rank], whole_step)
                    for choice in _choices(placement.stages_of(rank), costs, spare)
                ]
                for rank in range(placement.ranks)
            ]
        each = [[min((choice.bound(way) for choice in rank), key=_value) for rank in ranks] for way in ways]
        best = min((max(bounds, key=_value) for bounds in each), key=_value)
        alone = max(chain.end for chain in chains)
        if whole_step and alone > best.value:
            return Bound(alone, f"one micro-batch alone takes {alone:g}")
        return best

    found = [passing([chain], [(microbatches,)]) for chain in every]
    if len(every) > 1 and microbatches > 1:
        found.append(passing(every, [(m, microbatches - m) for m in range(1, microbatches)]))
    best = min(found, key=_value)
    if len(every) > 1 and update != "never" and costs.exchange:
        sums = f"{best.reason}; then the gradients of both copies are added up for {costs.exchange:g}"
        return Bound(best.value + costs.exchange, sums)
    return best


def _choices(stages: Sequence[int], costs: Costs, spare: Collection[Spare]) -> Iterator[Costs]:
    """The costs of a rank, for each way to spare its stages that might be the best."""
    if "offload" in spare:
        yield costs.spared((), stages)  # holds less than all others, in the same time
    elif "recompute" not in spare:
        yield costs
    elif len(stages) > _MOST_SPARED:
        yield replace(costs.spared(stages, ()), input_gradient=costs.input_gradient)
    else:
        for chosen in product((False, True), repeat=len(stages)):
            yield costs.spared(compress(stages, chosen), ())


def _value(bound: Bound) -> float:
    return bound.value


def _stages_of(placement: Placement, rank: int, pipes: Sequence[range]) -> list[tuple[int, ...]]:
    """Per pipe the stages of the rank, rising."""
    return [tuple(s for s in pipe if placement.rank_of(s) == rank) for pipe in pipes]


@dataclass(frozen=True)
class _Chain:
    """How fast a micro-batch gets through a pipe that it has for itself; per stage, by its number.

    Attributes:
        pipe: its stages.
        f, i, w: what the actions take.
        arrival: when F can start.
        gradient: when I can start.
        done: when W, and with it all that concerns the stage, can have ended.
        end: the last of these.
    """

    pipe: range
    f: dict[int, float]
    i: dict[int, float]
    w: dict[int, float]
    arrival: dict[int, float]
    gradient: dict[int, float]
    done: dict[int, float]
    end: float

    @staticmethod
    def of(pipe: range, placement: Placement, costs: Costs, *, backward: bool) -> _Chain:
        # Fused pairs take a share of the time of their parts; at best everything is in such a pair.
        share = min(1.0, costs.overlap)
        back = share if backward else 0.0
        hop = {end: costs.hop[edge] * (backward or edge.kind == "activation") for end, edge in placement.ends.items()}
        f = {s: share * costs.forward[s] for s in pipe}
        i = {s: back * costs.input_gradient[s] for s in pipe}
        w = {s: back * costs.weight_gradient[s] for s in pipe}
        arrival, gradient = {}, {}
        now = 0.0
        for s in pipe:
            arrival[s] = now = now + hop.get((s, Kind.RECV_F), 0.0)
            now += f[s]
        for s in reversed(pipe):
            gradient[s] = now = now + hop.get((s, Kind.RECV_B), 0.0)
            now += i[s]
        done = {s: gradient[s] + i[s] + w[s] for s in pipe}
        return _Chain(pipe, f, i, w, arrival, gradient, done, end=max(done.values()))


@dataclass(frozen=True)
class _Rank:
    """What one rank cannot do without.

    Attributes:
        rank: its number.
        work: per pipe the time of one micro-batch's actions.
        idle: the time for which it must be idle, and ``why``.
        arrival: when its first F can start; 0 where its span counts.
        occupied: per pipe memory times time that one micro-batch needs.
        limit: its memory.
    """

    rank: int
    work: tuple[float, ...]
    idle: float
    why: str
    arrival: float = 0.0
    occupied: tuple[float, ...] = ()
    limit: float = inf

    def bound(self, passing: tuple[int, ...]) -> Bound:
        """With so many micro-batches in each pipe."""
        work = sum(m * t for m, t in zip(passing, self.work, strict=True))
        best = Bound(work + self.idle, f"rank {self.rank} has {work:g} of work{self.why}")
        if 0 < self.limit < inf:
            occupied = sum(m * t for m, t in zip(passing, self.occupied, strict=True)) / self.limit
            if self.arrival + occupied > best.value:
                reason = (
                    f"rank {self.rank} holds its micro-batches for so long that its memory is full for {occupied:g}"
                )
                return Bound(self.arrival + occupied, reason)
        return best


def _forward_only(rank: int, placement: Placement, chains: list[_Chain], whole_step: bool) -> _Rank:
    pipes = list(zip(chains, _stages_of(placement, rank, [chain.pipe for chain in chains]), strict=True))
    work = tuple(sum(c.f[s] for s in stages) for c, stages in pipes)
    if not whole_step:
        return _Rank(rank, work, 0.0, "")
    before = min(c.arrival[stages[0]] for c, stages in pipes)
    after = min(c.end - c.arrival[stages[-1]] - c.f[stages[-1]] for c, stages in pipes)
    why = f" and must be idle for {before:g} before its first F and for {after:g} after its last"
    return _Rank(rank, work, before + after, why)


def _with_backward(
    rank: int,
    placement: Placement,
    chains: list[_Chain],
    microbatches: int,
    costs: Costs,
    limit: float,
    whole_step: bool,
) -> _Rank:
    share = min(1.0, costs.overlap)
    chains = [replace(chain, i={s: share * costs.input_gradient[s] for s in chain.i}) for chain in chains]
    pipes = list(zip(chains, _stages_of(placement, rank, [chain.pipe for chain in chains]), strict=True))
    windows = [_Windows.of(chain, stages, whole_step) for chain, stages in pipes]
    # Each pipe has its own windows; the shorter is the one that is certain.
    first_f, first_i, last_f, last_i = (min(times) for times in zip(*windows, strict=True))

    # What there is to do in a window: forwards into empty memory, or what is left of the micro-batches in full memory.
    each = [(c, s, costs.activation[s], costs.deferred[s]) for c, stages in pipes for s in stages]
    forwards = _most([(activation, c.f[s]) for c, s, activation, _ in each], microbatches, limit)
    begun = [(activation, c.i[s] + c.w[s]) for c, s, activation, _ in each]
    half_done = [(deferred, c.w[s]) for c, s, activation, deferred in each if deferred < activation]
    backwards = min(_most(begun + half_done, microbatches, limit), microbatches * sum(time for _, time in begun))
    weights = _most([(deferred, c.w[s]) for c, s, _, deferred in each], microbatches, limit)

    before_i = max(first_f, first_i - forwards)
    after_f, after_i = max(0.0, last_f - backwards), max(0.0, last_i - weights)
    all_fit = microbatches * min(sum(costs.activation[s] for s in stages) for _, stages in pipes) <= limit
    choices = [
        (before_i + after_i, (before_i, "before its first I"), (after_i, "after its last I")),
        (first_f + after_f, (first_f, "before its first F"), (after_f, "after its last F")),
    ]
    if not all_fit:
        choices.append((before_i + after_f, (before_i, "before its first I"), (after_f, "after its last F")))
    idle, *when = max(choices)
    times = " and ".join(f"for {time:g} {window}" for time, window in when if time)
    return _Rank(
        rank,
        work=tuple(sum(c.f[s] + c.i[s] + c.w[s] for s in stages) for c, stages in pipes),
        idle=idle,
        why=f" and must be idle {times}" if times else "",
        arrival=first_f,
        occupied=tuple(
            sum(
                costs.activation[s] * (c.gradient[s] + c.i[s] - c.arrival[s])
                + min(costs.activation[s], costs.deferred[s]) * c.w[s]
                for s in stages
            )
            for c, stages in pipes
        ),
        limit=limit,
    )


class _Windows(NamedTuple):
    """What must go by on a rank: until its first F and its first I start, from the ends of its last F and last I."""

    first_f: float
    first_i: float
    last_f: float
    last_i: float

    @staticmethod
    def of(chain: _Chain, stages: tuple[int, ...], whole_step: bool) -> _Windows:
        """Counted within the whole step, or between the rank's own first start and last end."""
        first, last = stages[0], stages[-1]
        forward_end, gradient_end = chain.arrival[last] + chain.f[last], chain.gradient[first] + chain.i[first]
        if whole_step:
            # The rank's own W is no reason to be idle, and a B has it done when the gradient goes on.
            upstream = max((done for s, done in chain.done.items() if s < first), default=gradient_end)
            after_i = upstream - gradient_end
            return _Windows(chain.arrival[first], chain.gradient[last], chain.end - forward_end, after_i)
        own = max(chain.done[s] for s in stages)
        return _Windows(0.0, chain.gradient[last] - chain.arrival[first], own - forward_end, 0.0)


def _most(items: list[tuple[float, float]], count: int, room: float) -> float:
    """At least the largest value of at most ``count`` of each of the items (size, value) that fit into ``room``
    together: exact where all sizes are equal, else the last one may be cut."""
    sizes = {size for size, _ in items}
    if len(sizes) == 1 and (size := sizes.pop()) > 0 and room < inf:
        room = size * (room // size)
    most = 0.0
    for size, value in sorted(items, key=lambda item: item[1] / item[0] if item[0] else inf, reverse=True):
        taken = min(count, room / size) if size else count
        most += taken * value
        room -= taken * size
    return most
