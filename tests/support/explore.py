"""Visits every state that a model can reach, breadth-first: what it finds first is a shortest way there.

A visited state is remembered by 128 bits of BLAKE2b, about a third of the memory that it takes itself (hash compaction;
Wolper and Leroy, CAV 1993). Two states of n get the same bits with a probability below n² / 2^129, and the second of
them would be left out: 2e-25 for 11 million states, which is less than that of a wrong bit in memory.
"""

from __future__ import annotations

import hashlib
import marshal
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

State = TypeVar("State", bound=tuple[Any, ...])
"""Of numbers, strings and tuples of them."""


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


def digest(state: State) -> int:
    data = marshal.dumps(tuple(state), 2)  # the last version in which equal states are equal bytes, shared parts or not
    return int.from_bytes(hashlib.blake2b(data, digest_size=16).digest(), "little")


def explore(model: Model[State]) -> Course[State]:
    """All states, or those up to the first violation."""
    start = model.start()
    came_from: dict[int, int | None] = {digest(start): None}
    todo = deque([(start, digest(start))])
    ends = []
    while todo:
        state, number = todo.popleft()
        try:
            following = [after for _, after in model.moves(state)]
            if not following:
                if problem := model.left_over(state):
                    raise Violation(problem)
                ends.append(state)
        except Violation as violation:
            return Course(len(came_from), frozenset(ends), str(violation), _trace(model, came_from, number))
        following += (after for _, after in model.faults(state))
        for after in following:
            reached = digest(after)
            if reached not in came_from:
                came_from[reached] = number
                todo.append((after, reached))
    return Course(len(came_from), frozenset(ends))


def _trace(model: Model[State], came_from: dict[int, int | None], end: int) -> tuple[object, ...]:
    """The moves to a state: its ancestors are known by their digests, so the way is walked from the start."""
    way = []
    before: int | None = end
    while before is not None:
        way.append(before)
        before = came_from[before]
    names, state = [], model.start()
    for number in reversed(way[:-1]):
        choices = [*model.moves(state), *model.faults(state)]
        name, state = next((name, after) for name, after in choices if digest(after) == number)
        names.append(name)
    return tuple(names)
