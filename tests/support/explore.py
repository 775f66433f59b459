"""Visits every state that a model can reach, breadth-first: what it finds first is a shortest way there."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

State = TypeVar("State", bound=Hashable)


class Violation(Exception):
    """A move breaks a property that must always hold."""


class Model(Protocol[State]):
    def start(self) -> State: ...

    def moves(self, state: State) -> Iterable[tuple[object, State]]:
        """Everything that can happen next, each with a name for people. Raises Violation."""

    def faults(self, state: State) -> Iterable[tuple[object, State]]:
        """What may happen besides, but need not: a state with faults alone is one in which nothing goes on."""

    def left_over(self, state: State) -> str | None:
        """What is wrong with a state in which nothing goes on; None if it is a proper end."""


@dataclass(frozen=True)
class Course(Generic[State]):
    """What was found.

    Attributes:
        states: visited states; all that can be reached where ``problem`` is None.
        ends: those of them in which nothing goes on, as should be.
        problem: the broken property.
        trace: the names of the moves that lead to it.
    """

    states: int
    ends: frozenset[State]
    problem: str | None = None
    trace: tuple[object, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.states} states: {self.problem or 'no violation'}", *map(str, self.trace)]
        return "\n    ".join(lines)


def explore(model: Model[State]) -> Course[State]:
    """All states, or those up to the first violation."""
    start = model.start()
    came_from: dict[State, State | None] = {start: None}  # exact: no hash stands for a state
    todo = deque([start])
    ends = []
    while todo:
        state = todo.popleft()
        try:
            following = [after for _, after in model.moves(state)]
            if not following:
                if problem := model.left_over(state):
                    raise Violation(problem)
                ends.append(state)
        except Violation as violation:
            return Course(len(came_from), frozenset(ends), str(violation), _trace(model, came_from, state))
        following += (after for _, after in model.faults(state))
        for after in following:
            if after not in came_from:
                came_from[after] = state
                todo.append(after)
    return Course(len(came_from), frozenset(ends))


def _trace(model: Model[State], came_from: dict[State, State | None], end: State) -> tuple[object, ...]:
    names = []
    before = came_from[end]
    while before is not None:
        choices = [*model.moves(before), *model.faults(before)]
        names.append(next(name for name, after in choices if after == end))
        end, before = before, came_from[before]
    return tuple(reversed(names))
