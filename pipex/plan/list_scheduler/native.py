"""The list scheduler in C++ where it is built, else in Python; the Python says what each function does."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from pipex.plan.list_scheduler import execution, improvement, reference
from pipex.plan.list_scheduler.execution import Replay
from pipex.plan.list_scheduler.improvement import Objective
from pipex.plan.list_scheduler.problem import Packed, Problem
from pipex.plan.list_scheduler.rule import Rule, due_dates

if TYPE_CHECKING:
    from pipex._native import SchedulingProblem


def list_schedule(problem: Problem, rule: Rule) -> Packed | None:
    """As ``reference.list_schedule``; releases the interpreter meanwhile."""
    if (native := _native_problem(problem)) is None:
        return reference.list_schedule(problem, rule)
    due = due_dates(problem, rule)
    return native.list_schedule(due.start, due.offset, due.release, due.cap, due.look, due.overrun)


def replay(problem: Problem, packed: Packed) -> Replay | None:
    """As ``execution.replay``; releases the interpreter meanwhile."""
    if (native := _native_problem(problem)) is None:
        return execution.replay(problem, packed)
    result = native.replay(packed)
    return None if result is None else Replay(*result)


def improve(problem: Problem, packed: Packed, *, seed: int, trials: int, objective: Objective = "makespan") -> Packed:
    """As ``improvement.improve``; releases the interpreter meanwhile."""
    if (native := _native_problem(problem)) is None:
        return improvement.improve(problem, packed, seed=seed, trials=trials, objective=objective)
    return native.improve(packed, seed, trials, objective == "span")


@lru_cache(maxsize=64)
def _native_problem(problem: Problem) -> SchedulingProblem | None:
    """Kept, since a search asks thousands of times about a few problems. None where pipex._native is not built."""
    try:
        from pipex._native import SchedulingProblem
    except ImportError:
        return None
    return SchedulingProblem(
        rank_of=problem.rank_of,
        passing=problem.passing or (problem.microbatches,),
        durations=problem.durations,
        activation_hop=problem.activation_hop,
        gradient_hop=problem.gradient_hop,
        activation=problem.activation,
        kept=problem.kept,
        deferred=problem.deferred,
        limit=problem.limit,
    )
