"""Replays packed orders in Python: what the native twin must repeat, number for number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipex.plan.list_scheduler.problem import FORWARD, INPUT_GRADIENT, Packed, Problem, code, rows


class Replay(NamedTuple):
    """Orders run as early as they allow.

    Attributes:
        makespan: last end minus first start.
        span: the largest over the ranks of last end minus first start.
        peaks: per rank the most memory held at once.
    """

    makespan: int
    span: int
    peaks: tuple[int, ...]


def replay(problem: Problem, packed: Packed) -> Replay | None:
    """The course of packed orders. None: ranks wait for each other for ever."""
    execution = Execution(problem)
    orders = rows(problem, packed)
    if not execution.run(orders):
        return None
    spans = map(execution.span, range(len(orders)))
    return Replay(max(execution.finish), max(spans), tuple(peak(problem, order) for order in orders))


class Execution:
    """Orders while all ranks run them as early as they allow.

    Attributes:
        end: the end of each action that has run.
        start, finish: per rank the start of its first action and the end of its last.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.end: dict[int, int] = {}
        self.start: list[int] = []
        self.finish: list[int] = []

    def span(self, rank: int) -> int:
        """From a rank's first start to its last end; of two copies of a model, to that of both ranks which hold the
        same layers, as they have their gradients to add up."""
        return max(self.finish[rank], self.finish[self.problem.placement.twin_of(rank)]) - self.start[rank]

    def duration(self, action: int) -> int:
        """The time that a packed action takes."""
        kind, stage = meaning(self.problem, action)
        return self.problem.durations[kind][stage]

    def source(self, action: int) -> tuple[int | None, int]:
        """The action whose message a packed action needs, None where it needs none; and the hop of the message."""
        problem = self.problem
        kind, stage = meaning(problem, action)
        microbatch = action % problem.microbatches
        if kind == FORWARD and (before := problem.placement.before(stage)) is not None:
            return code(problem, kind, before, microbatch), problem.activation_hop[before]
        if kind == INPUT_GRADIENT and (after := problem.placement.after(stage)) is not None:
            return code(problem, kind, after, microbatch), problem.gradient_hop[stage]
        return None, 0

    def run(self, orders: Sequence[Sequence[int]]) -> bool:
        """Whether the ranks come to the end of these orders."""
        table = self.problem.placement.stages * self.problem.microbatches
        self.end, self.start, self.finish = {}, [0] * len(orders), [0] * len(orders)
        position = [0] * len(orders)
        waiting: dict[int, int] = {}  # the rank that needs the message of an action
        todo = list(range(len(orders)))
        while todo:
            rank = todo.pop()
            for action in orders[rank][position[rank] :]:
                if action in self.end or (action >= table and action - table not in self.end):
                    return False
                source, hop = self.source(action)
                if source is not None:
                    if source not in self.end:
                        waiting[source] = rank
                        break
                    self.finish[rank] = max(self.finish[rank], self.end[source] + hop)
                if position[rank] == 0:
                    self.start[rank] = self.finish[rank]
                position[rank] += 1
                self.finish[rank] += self.duration(action)
                self.end[action] = self.finish[rank]
                if action in waiting:
                    todo.append(waiting.pop(action))
        return len(self.end) == self.problem.actions


def meaning(problem: Problem, action: int) -> tuple[int, int]:
    """Kind and stage of a packed action."""
    return divmod(action // problem.microbatches, problem.placement.stages)


def peak(problem: Problem, order: Sequence[int]) -> int:
    """The most memory that one rank holds at once."""
    held = most = 0
    for action in order:
        kind, stage = meaning(problem, action)
        if kind == FORWARD:
            held += problem.kept[stage]
        elif kind == INPUT_GRADIENT:
            held -= problem.kept[stage]
            most = max(most, held + problem.activation[stage])
            held += problem.deferred[stage]
        else:
            held -= problem.deferred[stage]
        most = max(most, held)
    return most
