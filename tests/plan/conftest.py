"""Plans to test with, and a slow model of a pipeline that shares no code with the one under test."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field

import pytest

from pipex.errors import PlanError
from pipex.plan.actions import Action, Kind
from pipex.plan.families import FAMILIES, build
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan

Step = tuple[str, Edge | None, int]
"""("send" | "receive" | "compute", edge, micro-batch)"""


@dataclass
class Explorer:
    """Visits every state that the ranks of a plan can reach, whoever is fast or slow.

    Attributes:
        deadlock: some state has ranks that are not at their end and none that can go on.
        under_way: per edge the most messages sent but not received in any state.
    """

    plan: Plan
    slots: dict[Edge, int] | None = None
    deadlock: bool = False
    under_way: dict[Edge, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.programs = [self._program(rank) for rank in range(self.plan.placement.ranks)]
        start = (0,) * len(self.programs)
        seen, todo = {start}, deque([start])
        while todo:
            state = todo.popleft()
            going = [rank for rank in range(len(state)) if self._can_go(state, rank)]
            if not going and any(at < len(program) for at, program in zip(state, self.programs, strict=True)):
                self.deadlock = True
            for rank in going:
                after = (*state[:rank], state[rank] + 1, *state[rank + 1 :])
                if after not in seen:
                    seen.add(after)
                    todo.append(after)

    def _program(self, rank: int) -> list[Step]:
        steps: list[Step] = []
        for action in self.plan.orders[rank]:
            receives: list[Step] = []
            sends: list[Step] = []
            for stage, kind, microbatch, _ in action.parts or (action,):
                if kind in (Kind.W, Kind.UPDATE):
                    continue
                name, ahead = ("activation", 1) if kind is Kind.F else ("gradient", -1)
                if self._is_edge(stage - ahead, stage):
                    receives.append(("receive", Edge(stage - ahead, stage, name), microbatch))  # type: ignore[arg-type]
                if self._is_edge(stage, stage + ahead):
                    sends.append(("send", Edge(stage, stage + ahead, name), microbatch))  # type: ignore[arg-type]
            steps += [*receives, ("compute", None, action.microbatch), *sends]
        return steps

    def _is_edge(self, source: int, destination: int) -> bool:
        placement = self.plan.placement
        first = max(source, destination)
        if min(source, destination) < 0 or first >= placement.stages:
            return False
        if placement.name == "bidirectional" and first == placement.ranks:
            return False  # the other pipe begins here
        return placement.rank_of(source) != placement.rank_of(destination)

    def _can_go(self, state: tuple[int, ...], rank: int) -> bool:
        if state[rank] == len(self.programs[rank]):
            return False
        what, edge, _ = self.programs[rank][state[rank]]
        if edge is None:
            return True
        waiting = sum(
            (step[0] == "send") - (step[0] == "receive")
            for at, program in zip(state, self.programs, strict=True)
            for step in program[:at]
            if step[1] == edge
        )
        self.under_way[edge] = max(self.under_way.get(edge, 0), waiting)
        if what == "receive":
            return waiting > 0
        if self.slots is not None and waiting >= self.slots[edge]:
            return False
        self.under_way[edge] = max(self.under_way[edge], waiting + 1)
        return True


def random_plan(seed: int) -> Plan:
    """A legal plan that no one would want: at each turn any action that is possible, micro-batches rising."""
    rng = random.Random(seed)
    name, chunks = rng.choice([("loop", 1), ("loop", 2), ("v", 2)])
    placement = Placement(name, rng.randint(1, 3), chunks)  # type: ignore[arg-type]
    last, microbatches = placement.stages - 1, rng.randint(1, 4)
    splits = {stage: rng.random() < 0.5 for stage in range(last + 1)}
    done = {(stage, kind): 0 for stage in range(last + 1) for kind in "FIW"}
    orders: list[list[Action]] = [[] for _ in range(placement.ranks)]
    while True:
        possible = []
        for stage in range(last + 1):
            f, i, w = (done[stage, kind] for kind in "FIW")
            if f < (microbatches if stage == 0 else done[stage - 1, "F"]):
                possible.append(Action(stage, Kind.F, f))
            if i < (f if stage == last else min(f, done[stage + 1, "I"])):
                possible.append(Action(stage, Kind.I if splits[stage] else Kind.B, i))
            if w < i and splits[stage]:
                possible.append(Action(stage, Kind.W, w))
        if not possible:
            break
        action = rng.choice(possible)
        orders[placement.rank_of(action.stage)].append(action)
        done[action.stage, "I" if action.kind is Kind.B else action.kind.value] += 1
    peaks = (microbatches * chunks,) * placement.ranks
    return Plan("random", placement, microbatches, tuple(map(tuple, orders)), peaks)


def legal(family: str, ranks: int, microbatches: int) -> Plan | None:
    """The family's plan; None where it has none of this size."""
    try:
        return build(family, ranks, microbatches)
    except PlanError:
        return None


@pytest.fixture(scope="session")
def small_plans() -> list[Plan]:
    """Of every family the plans that are small enough to visit all their states."""
    sizes = [(1, 2), (2, 1), (2, 2), (2, 4), (2, 6), (3, 2), (3, 4), (4, 2)]
    plans = [plan for family in FAMILIES for size in sizes if (plan := legal(family, *size))]
    small = [plan for plan in plans if math.prod(map(len, plan.orders)) <= 2000]
    assert {plan.family for plan in small} == set(FAMILIES)
    return small


@pytest.fixture(scope="session")
def explore() -> type[Explorer]:
    return Explorer


@pytest.fixture(scope="session")
def random_plans() -> list[Plan]:
    return [random_plan(seed) for seed in range(300)]
