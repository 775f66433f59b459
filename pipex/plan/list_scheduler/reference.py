"""The list scheduler in Python: what the native twin must repeat, number for number."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from pipex.plan.list_scheduler.problem import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Packed,
    Problem,
    code,
)
from pipex.plan.list_scheduler.rule import DueDates, Rule, due_dates

_NEVER = 2**63 - 1


class _Candidate(NamedTuple):
    """An action that a rank could run next; the first three fields decide which is more urgent."""

    due: int
    kind: int
    stage: int
    ready: int


def list_schedule(problem: Problem, rule: Rule) -> Packed | None:
    """Orders by due dates, as the package says. None: some rank had no memory left for what had to come next."""
    return Scheduler(problem, due_dates(problem, rule)).run()


class Scheduler:
    """The state of all ranks while the time goes on.

    Attributes:
        next: per kind and stage the next micro-batch; those before it have started.
        end: per kind and stage the ends of the actions that have started.
        held: per stage the memory of its micro-batches, an F that has no I yet taken at its charge.
        wake: per rank when it decides next.
        idle: per rank whether it waits; only then can news make it decide earlier.
    """

    def __init__(self, problem: Problem, due: DueDates) -> None:
        placement = problem.placement
        self.problem, self.due = problem, due
        self.next = [[at.start for at in problem.microbatches_at] for _ in problem.durations]
        self.end: list[list[dict[int, int]]] = [[{} for _ in range(placement.stages)] for _ in problem.durations]
        self.held = [0] * placement.stages
        self.wake = [0] * placement.ranks
        self.idle = [False] * placement.ranks
        self.orders = [array("q") for _ in range(placement.ranks)]

    def run(self) -> Packed | None:
        left = self.problem.actions
        while left:
            now = min(self.wake)
            if now == _NEVER:
                return None
            rank = self.wake.index(now)
            candidates = self._candidates(rank, now)
            if chosen := self._choose(candidates, now):
                self._start(rank, now, chosen)
                left -= 1
            else:
                self.wake[rank] = min((c.ready for c in candidates if c.ready > now), default=_NEVER)
                self.idle[rank] = True
        return b"".join(order.tobytes() for order in self.orders)

    def _candidates(self, rank: int, now: int) -> list[_Candidate]:
        """Per stage and kind the next micro-batch, where it is known when it will be ready and where there is memory.
        What lacks memory lends its due date to the most urgent W, which will free some."""
        problem, due, placement = self.problem, self.due, self.problem.placement
        next_f, next_i, next_w = self.next
        end_f, end_i, _ = self.end
        candidates: list[_Candidate] = []
        blocked = _NEVER
        first_w: _Candidate | None = None
        left = problem.limit[rank] - sum(self.held[stage] for stage in problem.stages_of[rank])
        for stage, room in zip(self.problem.stages_of[rank], self._rooms(rank), strict=True):
            before, after = placement.before(stage), placement.after(stage)
            m = next_f[stage]
            if m < (problem.microbatches_at[stage].stop if before is None else next_f[before]):
                ready = due.release[m] if before is None else end_f[before][m] + problem.activation_hop[before]
                date = due.start[m] + due.offset[FORWARD][stage]
                if problem.charge[stage] <= room:
                    candidates.append(_Candidate(date, FORWARD, stage, ready))
                elif ready - now <= due.look:
                    blocked = min(blocked, date)
            m = next_i[stage]
            if m < (next_f[stage] if after is None else min(next_f[stage], next_i[after])):
                ready = end_f[stage][m]
                if after is not None:
                    ready = max(ready, end_i[after][m] + problem.gradient_hop[stage])
                date = due.start[m] + due.offset[INPUT_GRADIENT][stage]
                if problem.surge[stage] == 0 or problem.surge[stage] <= left:
                    candidates.append(_Candidate(date, INPUT_GRADIENT, stage, ready))
                elif ready - now <= due.look:
                    blocked = min(blocked, date)
            m = next_w[stage]
            if m < next_i[stage]:
                date = due.start[m] + due.offset[WEIGHT_GRADIENT][stage]
                w = _Candidate(date, WEIGHT_GRADIENT, stage, end_i[stage][m])
                first_w = min(first_w or w, w)
                candidates.append(w)
        if first_w is not None and blocked < first_w.due:
            candidates[candidates.index(first_w)] = first_w._replace(due=blocked)
        return candidates

    def _rooms(self, rank: int) -> list[int]:
        """Per chunk what its F may still take without exceeding its own cap or that of a deeper chunk; of two pipes,
        its own cap or what both may hold together."""
        stages = self.problem.stages_of[rank]
        if len(self.problem.placement.pipes) > 1:
            surge = max(self.problem.surge[stage] for stage in stages)
            left = self.problem.limit[rank] - surge - sum(self.held[stage] for stage in stages)
            return [min(self.due.cap[stage] - self.held[stage], left) for stage in stages]
        rooms = []
        held = 0
        for stage in stages:
            held += self.held[stage]
            rooms.append(self.due.cap[stage] - held)
        for chunk in range(len(rooms) - 1, 0, -1):
            rooms[chunk - 1] = min(rooms[chunk - 1], rooms[chunk])
        return rooms

    def _choose(self, candidates: list[_Candidate], now: int) -> _Candidate | None:
        """The action to start now: the most urgent, or while that is not ready the most urgent that fits before it."""
        horizon = now + self.due.look
        urgent = min((c for c in candidates if c.ready <= horizon), default=None)
        if urgent is None or urgent.ready <= now:
            return urgent
        gap = (urgent.ready - now) * 1000
        return min((c for c in candidates if c.ready <= now and self._thousandths(c) <= gap), default=None)

    def _thousandths(self, candidate: _Candidate) -> int:
        """What has to fit into a gap."""
        part = 1000 - self.due.overrun if candidate.kind == WEIGHT_GRADIENT else 1000
        return self.problem.durations[candidate.kind][candidate.stage] * part

    def _start(self, rank: int, now: int, chosen: _Candidate) -> None:
        _, kind, stage, _ = chosen
        problem = self.problem
        microbatch = self.next[kind][stage]
        self.next[kind][stage] += 1
        end = now + problem.durations[kind][stage]
        self.orders[rank].append(code(problem, kind, stage, microbatch))
        self.end[kind][stage][microbatch] = end
        self.wake[rank] = end
        self.idle[rank] = False
        if kind == FORWARD:
            self.held[stage] += problem.charge[stage]
            user = problem.placement.after(stage)
        elif kind == INPUT_GRADIENT:
            self.held[stage] += problem.deferred[stage] - problem.charge[stage]
            user = problem.placement.before(stage)
        else:
            self.held[stage] -= problem.deferred[stage]
            return
        # A rank that waits decides again when it learns of another action that will be ready.
        if user is not None and self.idle[problem.rank_of[user]]:
            self.wake[problem.rank_of[user]] = min(self.wake[problem.rank_of[user]], now)
