"""A judge of plans that shares no code with the one under test, and knows what is recomputed and offloaded.

What a rank holds is a set of positions for every activation; what a step takes is found by letting every rank go on as
far as it can, again and again. From the planner it takes plans, costs and placements alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import product

from pipex.plan.actions import Action, Kind
from pipex.plan.costs import Costs
from pipex.plan.placement import Edge
from pipex.plan.plan import Plan

Key = tuple[int, int]
"""(stage, micro-batch)"""


@dataclass
class Judge:
    """A step of a valid plan under its costs.

    Attributes:
        held: per rank and activation the positions of the actions while which it is held whole, W's needs counted too.
        start, end: of every simple action.
        out, back: start and end of the copy of every activation that is away.
    """

    plan: Plan
    costs: Costs
    held: list[dict[Key, set[int]]] = field(default_factory=list)
    start: dict[Action, float] = field(default_factory=dict)
    end: dict[Action, float] = field(default_factory=dict)
    out: dict[Key, tuple[float, float]] = field(default_factory=dict)
    back: dict[Key, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = range(self.plan.placement.ranks)
        self._spots: dict[tuple[int, Key], tuple[int, int, int]] = {}
        self.places = [
            {part: position for position, action in enumerate(order) for part in action.each}
            for order in self.plan.orders
        ]
        self.held = [self._held(rank) for rank in self.ranks]
        self.away = [{key: gap for key in self.held[rank] if (gap := self._gap(rank, key))} for rank in self.ranks]
        self.out_free = [0.0 for _ in self.ranks]
        self.back_free = [0.0 for _ in self.ranks]
        self._run()

    @property
    def held_keys(self) -> list[Key]:
        """All activations."""
        return [key for held in self.held for key in held]

    # What is held

    def where(self, rank: int, key: Key) -> tuple[int, int, int]:
        """The positions of F, of I or B, and of the last action of an activation."""
        if (rank, key) in self._spots:
            return self._spots[rank, key]
        f, *rest = (self.places[rank].get(Action(key[0], kind, key[1])) for kind in (Kind.F, Kind.I, Kind.W, Kind.B))
        positions = [position for position in rest if position is not None]
        assert f is not None
        return self._spots.setdefault((rank, key), (f, min(positions), max(positions)))

    def _held(self, rank: int) -> dict[Key, set[int]]:
        keys = [(a.stage, a.microbatch) for a in self.places[rank] if a.kind is Kind.F]
        held: dict[Key, set[int]] = {}
        copies: list[tuple[int, int, Key]] = []
        for key in keys:
            f, i, last = self.where(rank, key)
            if key[0] in self.plan.recomputed:
                held[key] = set(range(i, last + 1))
            elif key[0] in self.plan.offloaded:
                held[key] = {f, *range(i, last + 1)}
                copies += [(f, 0, key), (i, 1, key)]
            else:
                held[key] = set(range(f, last + 1))
        promise = self.plan.peak_activations[rank]
        count = Counter(p for positions in held.values() for p in positions)
        copies.sort()
        for _ in range(3 * self.plan.placement.chunks):
            for copy in list(copies):
                _, inward, key = copy
                f, i, _ = self.where(rank, key)
                gap = [p for p in range(f, i) if p not in held[key]]
                if gap and count[gap[-inward]] < promise:
                    held[key].add(gap[-inward])
                    count[gap[-inward]] += 1
                else:
                    copies.remove(copy)
        return held

    def _gap(self, rank: int, key: Key) -> list[int]:
        """The positions while which an offloaded activation is away."""
        f, i, _ = self.where(rank, key)
        return [p for p in range(f, i) if key[0] in self.plan.offloaded and p not in self.held[rank][key]]

    def most_held(self, rank: int) -> int:
        """What the promise has to be at least."""
        return max(Counter(p for positions in self.held[rank].values() for p in positions).values())

    def peak(self, rank: int) -> float:
        """The most memory of a rank while an action runs, or right after it, whatever takes how long."""
        costs = self.costs
        inputs = costs.inputs or [0.0] * self.plan.placement.stages
        totals: dict[tuple[int, bool], float] = {}
        for key, positions in self.held[rank].items():
            (stage, _), (f, i, last) = key, self.where(rank, key)
            for p, after in product(range(f, last + 1), (False, True)):
                total = totals.get((p, after), 0.0)
                if p in positions and not (after and p == last):
                    total += costs.activation[stage] if p + after <= i else costs.deferred[stage]
                elif p < i and stage in self.plan.recomputed:
                    total += inputs[stage]
                totals[p, after] = total
        return max(totals.values())

    def most_held_by_the_clock(self, rank: int) -> int:
        """The same as ``most_held`` in the course of the step: what is away is so from a copy's end to the next's
        start."""
        changes: list[tuple[float, int]] = []
        for key in self.held[rank]:
            stage, m = key
            start, last = self.start[Action(stage, Kind.F, m)], self._last_end(key)
            if stage in self.plan.recomputed:
                start = self._backward(key)[0]
            changes += [(start, 1), (last, -1)]
            if key in self.away[rank]:
                changes += [(self.out[key][1], -1), (self.back[key][0], 1)]
        held = most = 0
        for _, change in sorted(changes):  # what ends goes before what starts at the same time
            held += change
            most = max(most, held)
        return most

    def _backward(self, key: Key) -> tuple[float, float]:
        action = next(a for kind in (Kind.I, Kind.B) if (a := Action(key[0], kind, key[1])) in self.start)
        return self.start[action], self.end[action]

    def _last_end(self, key: Key) -> float:
        return max(self.end[a] for kind in (Kind.W, Kind.B) if (a := Action(key[0], kind, key[1])) in self.end)

    # What it takes

    def _takes(self, action: Action) -> float:
        costs, total = self.costs, 0.0
        for stage, kind, _, _ in action.each:
            if kind is Kind.F:
                total += costs.forward[stage]
            if kind in (Kind.I, Kind.B):
                total += costs.input_gradient[stage]
                if stage in self.plan.recomputed:
                    total += (costs.forward if costs.recompute is None else costs.recompute)[stage]
            if kind in (Kind.W, Kind.B):
                total += costs.weight_gradient[stage]
        return total * (costs.overlap if action.parts else 1)

    def _message(self, part: Action) -> float | None:
        """When what the part needs from another stage is there; None: not yet known."""
        stage, kind, m, _ = part
        if kind is Kind.W:
            return 0.0
        name, source = ("activation", stage - 1) if kind is Kind.F else ("gradient", stage + 1)
        if not any(source in pipe and stage in pipe for pipe in self.plan.placement.pipes):
            return 0.0
        makers = (Kind.F,) if kind is Kind.F else (Kind.I, Kind.B)
        ends = [self.end[a] for k in makers if (a := Action(source, k, m)) in self.end]
        if not ends:
            return None
        rank_of = self.plan.placement.rank_of
        hop = self.costs.hop[Edge(source, stage, name)] if rank_of(source) != rank_of(stage) else 0.0  # type: ignore[arg-type]
        return ends[0] + hop

    def _run(self) -> None:
        at = [0 for _ in self.ranks]
        free = [0.0 for _ in self.ranks]
        moved = True
        while moved:
            moved = False
            for rank in self.ranks:
                while at[rank] < len(self.plan.orders[rank]):
                    action = self.plan.orders[rank][at[rank]]
                    messages = [self._message(part) for part in action.each]
                    if None in messages:
                        break
                    self._step(rank, at[rank], action, free, max(m for m in messages if m is not None))
                    at[rank] += 1
                    moved = True
        assert all(at[rank] == len(self.plan.orders[rank]) for rank in self.ranks), "the ranks wait for ever"

    def _step(self, rank: int, position: int, action: Action, free: list[float], message: float) -> None:
        away = self.away[rank]
        # Until it is certain that there is room, this action and the copies back that begin with it wait.
        ready = max([free[rank], *(self.out[key][1] for key, gap in away.items() if gap[0] == position)])
        for key in sorted(
            (k for k, gap in away.items() if gap[-1] + 1 == position), key=lambda k: self.where(rank, k)[1]
        ):
            begin = max(ready, self.back_free[rank])
            self.back_free[rank] = begin + self._copy(key)
            self.back[key] = begin, self.back_free[rank]
        own = [(part.stage, part.microbatch) for part in action.each if part.kind in (Kind.I, Kind.B)]
        needed = [self.back[key][1] for key in own if key in away]
        start = max([ready, message, *needed])
        free[rank] = start + self._takes(action)
        for part in action.each:
            self.start[part], self.end[part] = start, free[rank]
            key = part.stage, part.microbatch
            if part.kind is Kind.F and key in away:
                begin = max(free[rank], self.out_free[rank])
                self.out_free[rank] = begin + self._copy(key)
                self.out[key] = begin, self.out_free[rank]

    def _copy(self, key: Key) -> float:
        return 0.0 if self.costs.offload is None else self.costs.offload[key[0]]
