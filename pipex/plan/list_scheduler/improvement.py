"""Improves orders step by step in Python: what the native twin must repeat, number for number.

Only a change on a critical path can shorten a step. A trial takes an action from a block of one (a run of actions of
one rank without a gap) and puts it before the block, behind it, or a few places away. Late acceptance (Burke, Bykov
2017) decides whether the change stays: when it is no worse than what stood now, or some trials ago.
"""

from __future__ import annotations

from array import array
from typing import Literal, NamedTuple

from pipex.plan.list_scheduler.execution import Execution, peak
from pipex.plan.list_scheduler.problem import Packed, Problem, rows

Objective = Literal["makespan", "span"]


def improve(problem: Problem, packed: Packed, *, seed: int, trials: int, objective: Objective = "makespan") -> Packed:
    """Orders no worse than these after so many trials; a trial takes as long as a replay.

    Micro-batches come in rising order in every stage and kind, unless the given orders are returned as they are. No
    rank whose order changes exceeds its limit.

    Args:
        seed: 0 … 2^64 - 1; other seeds find other orders.
    """
    return _Improver(problem, packed, seed, objective).run(trials)


class _Random:
    """SplitMix64 (Steele, Lea, Flood 2014)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, limit: int) -> int:
        """0 to limit - 1."""
        mask = 2**64 - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        mixed = (self.state ^ (self.state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
        mixed ^= mixed >> 31
        return (mixed >> 32) * limit >> 32


class _Block(NamedTuple):
    """Actions of a rank, first to last, that run without a gap on the critical path."""

    rank: int
    first: int
    last: int


class _Improver:
    def __init__(self, problem: Problem, packed: Packed, seed: int, objective: Objective) -> None:
        self.problem, self.given, self.objective = problem, packed, objective
        self.orders = [array("q", order) for order in rows(problem, packed)]
        self.execution = Execution(problem)
        self.random = _Random(seed)

    def run(self, trials: int) -> Packed:
        execution, orders = self.execution, self.orders
        if not execution.run(orders):
            return self.given
        given = self._value()
        for rank in range(len(orders)):
            self._number(rank)
        if not execution.run(orders) or self._value() > given:
            return self.given
        current = least = self._value()
        best = self._packed() if current < given else self.given
        history = [current] * max(1, trials // 20)
        blocks = self._blocks()
        for trial in range(trials):
            rank, source, target = self._propose(blocks)
            if self._token(orders[rank][source]) == self._token(orders[rank][target]):
                continue
            self._move(rank, source, target)
            earlier = history[trial % len(history)]
            legal = peak(self.problem, orders[rank]) <= self.problem.limit[rank] and execution.run(orders)
            if legal and self._value() <= max(current, earlier):
                current = self._value()
                if current < least:
                    least, best = current, self._packed()
                blocks = self._blocks()
            else:
                self._move(rank, target, source)
            history[trial % len(history)] = min(earlier, current)
        return best

    def _packed(self) -> Packed:
        return b"".join(order.tobytes() for order in self.orders)

    def _token(self, action: int) -> int:
        """Kind and stage of an action in one number."""
        return action // self.problem.microbatches

    def _values(self) -> list[int]:
        ranks = range(len(self.orders))
        return [
            self.execution.span(rank) if self.objective == "span" else self.execution.finish[rank] for rank in ranks
        ]

    def _value(self) -> int:
        return max(self._values())

    def _number(self, rank: int) -> None:
        """Gives the actions of each kind and stage their micro-batches in rising order."""
        following: dict[int, int] = {}
        order = self.orders[rank]
        for position, action in enumerate(order):
            token = self._token(action)
            microbatch = following.get(token, self.problem.microbatches_at[token % self.problem.placement.stages].start)
            following[token] = microbatch + 1
            order[position] = token * self.problem.microbatches + microbatch

    def _move(self, rank: int, source: int, target: int) -> None:
        self.orders[rank].insert(target, self.orders[rank].pop(source))
        self._number(rank)

    def _propose(self, blocks: list[_Block]) -> tuple[int, int, int]:
        """A rank, and which of its actions goes where."""
        below = self.random.below
        rank, first, last = blocks[below(len(blocks))]
        source = first + below(last - first + 1)
        earlier, near, distance = below(2), below(2), below(4)
        before, behind = (source - 1, source + 1) if near else (first, last)
        target = before - distance if earlier else behind + distance
        return rank, source, min(max(target, 0), len(self.orders[rank]) - 1)

    def _blocks(self) -> list[_Block]:
        """The blocks of one critical path of the execution, from its end to time 0."""
        execution, orders = self.execution, self.orders
        place = {action: (rank, position) for rank, order in enumerate(orders) for position, action in enumerate(order)}
        values = self._values()
        rank = values.index(max(values))
        rank = max(rank, self.problem.placement.twin_of(rank), key=execution.finish.__getitem__)  # who ends the span
        first = last = len(orders[rank]) - 1
        blocks: list[_Block] = []
        while True:
            action = orders[rank][first]
            start = execution.end[action] - execution.duration(action)
            if start == 0:
                return [*blocks, _Block(rank, first, last)]
            source, hop = execution.source(action)
            by_message = source is not None and execution.end[source] + hop == start
            by_rank = first > 0 and execution.end[orders[rank][first - 1]] == start
            if by_rank and not (by_message and self.random.below(2) == 0):
                first -= 1
                continue
            assert source is not None  # an action that starts late has waited for something
            blocks.append(_Block(rank, first, last))
            rank, first = place[source]
            last = first
