"""Proposes plans, replays all of them on the true costs, refines the best, and says how far it is from the bound."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Sequence
from functools import cache, partial
from math import inf
from operator import add, sub
from typing import NamedTuple

from pipex.errors import PlanError
from pipex.plan.actions import Kind
from pipex.plan.bounds import Spare
from pipex.plan.communication import unfused
from pipex.plan.costs import CostModel
from pipex.plan.families import FAMILIES
from pipex.plan.list_scheduler import Packed, Problem, Replay, Rule, improve, list_schedule, pack, replay
from pipex.plan.list_scheduler.improvement import Objective
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan
from pipex.plan.search.arguments import check_arguments, ways_to_spare
from pipex.plan.search.published import ONLY_BY_NAME, TWO_COPIES, published
from pipex.plan.search.result import Candidate, Origin, SearchResult
from pipex.plan.search.rules import STARTS, Tried, biased, varied
from pipex.plan.search.space import Space, spaces_of
from pipex.plan.search.sparing import neighbour, promising, with_copies
from pipex.plan.search.units import Units, with_whole_backward
from pipex.plan.simulator import simulate
from pipex.plan.versions import Update

_ACTIONS = 10_000_000
"""So many actions are planned by default, in all evaluations together: a second or two in the native list scheduler."""

_AT_LEAST = 60
"""Evaluations by default however long one is: the rules to begin with, the published orders, and a few more."""

_TRIALS_PER_EVALUATION = 40
"""So many small changes take as long as to plan and judge all orders once."""

_ACTIONS_PER_ROUND = 10_000_000
"""Trials of a round of improvement, times the actions: several short rounds find more than a long one."""

_FIRST = 1500
"""Evaluations before anything is improved. From thrice as many on, more evaluations only go on where fewer ended."""

_PATIENCE = 16
"""Rules are varied for at most so many times as long as a round of improvement that found nothing."""

_DRAFTS = 6
"""Orders that are under improvement at a time."""


def search(
    costs: CostModel,
    memory: float | Sequence[float] | None = None,
    *,
    ranks: int,
    microbatches: int,
    objective: Objective = "makespan",
    chunks: int = 4,
    families: Sequence[str] | None = None,
    spare: Collection[Spare] | None = None,
    evaluations: int | None = None,
    seconds: float | None = None,
) -> SearchResult:
    """The plan with the smallest makespan (or span) that was found, and how far it is from what is possible.

    Candidates are the published orders, and orders planned by due dates: on loops (under the names zb-auto with one
    chunk per rank, interleaved-zb with several), on a V (zbv), and with two copies of the model (dualpipe). Where a
    limit makes ranks wait for memory, these are also planned with stages that are recomputed or offloaded.

    Two copies hold all weights twice and add up their gradients at the end. So they are considered only where there is
    known to be room for both, as the costs have ``weights`` and a limit is given, or where ``families`` names them;
    after all else, with as many evaluations again, so that they never make the answer worse.

    Args:
        costs: the true costs, for any placement.
        memory: the most that a rank may hold, one number or one per rank, in the unit of the costs' activation:
            activations, and weights where the costs have them; None: any.
        ranks, microbatches: sizes of the step.
        objective: "makespan" for steps that end with a barrier, "span" for steps that do not.
        chunks: at most so many stages per rank; more means more messages.
        families: the names of those to consider; None: all that keep one version of the weights, as said above.
        spare: what may be done with stages to hold less: "recompute", "offload". None: both, under a limit, offloading
            where the costs say what copies take.
        evaluations: how many orders to judge, and as many again with two copies; the same number gives the same plan
            on every machine. None: what takes about a second, or with stages to spare a few.
        seconds: no evaluation begins after so long; None: no such cap.

    Raises:
        InputError: an argument is out of range, the costs fit no placement, or no plan can keep the memory limit
            (names the smallest limit that one can).
        PlanError: a family is unknown, or no plan found keeps the limit though one may exist (says the smallest limit
            that is known to be enough).
    """
    check_arguments(objective, ranks, microbatches, chunks, families, spare, evaluations, seconds)
    limit = None
    if memory is not None:
        limit = tuple(memory) if isinstance(memory, Sequence) else (memory,) * ranks
    deadline = inf if seconds is None else time.monotonic() + seconds
    spare = ways_to_spare(costs, limit, spare)
    units, spaces = spaces_of(costs, ranks, microbatches, chunks, limit, spare)
    if evaluations is None:
        evaluations = _AT_LEAST + _ACTIONS // (3 * ranks * chunks * microbatches)
        evaluations += evaluations // 2 if spare else 0
    if families is None:
        counted = limit is not None and any(space.costs.weights is not None for space in spaces)
        families = [name for name in FAMILIES if name not in ONLY_BY_NAME and (counted or name not in TWO_COPIES)]
    return _Search(units, spaces, limit, objective, tuple(families), spare, evaluations, deadline).run()


class _Draft(NamedTuple):
    """Orders worth improving."""

    value: int
    space: Space
    family: str
    packed: Packed


class _Search:
    """The state of a search.

    Attributes:
        planned: where it plans at present, of ``all_planned``: on placements with one copy of the model, or two.
        searched: placements, and when their plans change the weights: what the bound is for.
        best: per family, number of chunks, and whether stages are recomputed and offloaded, the best that keeps the
            limit, with the key of its rank.
        sparing: gives the spaces with the most promising choices of stages to spare on a placement.
        too_large: what does not keep the limit.
        drafts: the best orders, each with another value, best first.
    """

    def __init__(
        self,
        units: Units,
        spaces: list[Space],
        limit: tuple[float, ...] | None,
        objective: Objective,
        families: tuple[str, ...],
        spare: Collection[Spare],
        evaluations: int,
        deadline: float,
    ) -> None:
        self.units, self.limit, self.objective, self.families = units, limit, objective, families
        self.budget, self.deadline = evaluations, deadline
        self.evaluations, self.most_evaluations, self.capped = 0, 0, False
        self.random = random.Random(0)
        self.all_planned = [space for space in spaces if space.family in families]
        self.planned: list[Space] = []
        self.spaces = {space.placement: space for space in reversed(spaces)}  # of a placement's shares the halves
        self.searched: set[tuple[Placement, Update]] = {(space.placement, "step") for space in self.all_planned}
        self.best: dict[tuple[str, int, bool, bool], tuple[tuple[int, int, int, int], Candidate]] = {}
        self.spare, self.sparing = spare, cache(partial(promising, spare=spare))
        self.too_large: list[Candidate] = []
        self.drafts: list[_Draft] = []

    def run(self) -> SearchResult:
        for copies in (1, 2):
            names = [name for name in self.families if (name in TWO_COPIES) == (copies == 2)]
            if names:
                self._search([space for space in self.all_planned if space.copies == copies], names)
        if not self.best:
            raise self._nothing_fits()
        ranking = [candidate for _, candidate in sorted(self.best.values(), key=lambda found: found[0])]
        bounds = [self.spaces[p].least(self.objective, update, self.spare) for p, update in self.searched]
        return SearchResult(
            best=ranking[0],
            runners_up=tuple(ranking[1:]),
            costs=self.spaces[ranking[0].placement].costs,
            bound=min(bounds, key=lambda bound: bound.value),
            objective=self.objective,
            limit=self.limit,
            evaluations=self.evaluations,
            capped=self.capped,
        )

    def _search(self, planned: list[Space], families: Sequence[str]) -> None:
        """With a budget of its own, so that what comes before does not depend on it."""
        begin, self.planned, self.drafts = self.evaluations, planned, []
        self.most_evaluations = begin + self.budget
        self._try_starts()
        self._vary_rules(begin + min(self.budget // 3, _FIRST))
        self._try_published(families)
        if self.spare:
            self._try_sparing()
        self._refine()

    def _begin(self, evaluations: int = 1) -> bool:
        """Whether so much may be done; counts it. Neither budget nor clock ends a search that has found nothing."""
        if self.best:
            if self.capped or self.evaluations + evaluations > self.most_evaluations:
                return False
            self.capped = time.monotonic() >= self.deadline
        self.evaluations += 0 if self.capped else evaluations
        return not self.capped

    def _may_win(self, space: Space, whole_backward: bool = False) -> bool:
        """Whether the placement's bound leaves room below the best plan. Rounding to whole numbers may make every
        action on a critical path shorter, by half a unit."""
        bound = space.bound(self.objective, "step", whole_backward).value
        if not self.best or bound == inf:
            return not self.best
        rounding = 3 * space.placement.stages * space.microbatches
        return self.units.times([bound])[0] + rounding < min(key[0] for key, _ in self.best.values())

    def _try_starts(self) -> None:
        """On the placements with the lowest bounds first, for those who do not wait for the end."""
        for space in sorted(self.planned, key=lambda space: space.bound(self.objective).value):
            for rule in STARTS[space.placement.name]:
                for medians in (False, True) if space.median_problem else (False,):
                    if not self._begin():
                        return
                    self._plan(space, rule, medians)

    def _vary_rules(self, until: int) -> None:
        """Turns knobs of the best rules, half of the time on the best placement, else on any that may still win."""
        while self.evaluations < until:
            spaces = [space for space in self.planned if space.pool.kept and self._may_win(space)]
            if not spaces:
                return
            best = min(spaces, key=lambda space: space.pool.kept[0].value)
            space = best if self.random.random() < 0.5 else self.random.choice(spaces)
            parent = space.pool.parent(self.random)
            rule = varied(parent.rule, self.random)
            if space.pool.is_new(rule, parent.medians):
                if not self._begin():
                    return
                self._plan(space, rule, parent.medians)

    def _try_sparing(self) -> None:
        """Plans with the most promising choices of stages, then with neighbours of the best of these: a third of what
        is left of the evaluations."""
        until = self.evaluations + (self.most_evaluations - self.evaluations) // 3
        spaces = [spared for space in self.planned for spared in self.sparing(space)]
        spaces.sort(key=lambda space: space.bound(self.objective).value)
        for turn in range(max((len(STARTS[space.placement.name]) for space in spaces), default=0)):
            for space in spaces:
                rules = STARTS[space.placement.name]
                if turn < len(rules) and self.evaluations < until and self._may_win(space) and self._begin():
                    self._plan(space, rules[turn], medians=False)
        spaces = [space for space in spaces if space.pool.kept]
        while spaces and self.evaluations < until:
            spaces = sorted((s for s in spaces if s.pool.kept), key=lambda s: s.pool.kept[0].value)[:_DRAFTS]
            parent = spaces[biased(len(spaces), self.random)]
            space = parent.sparing(*neighbour(parent, self.spare, self.random))
            for known in parent.pool.kept[:2]:
                if not self._begin():
                    return
                self._plan(space, known.rule, known.medians)
            spaces.append(space)
        self.planned += [space for space in spaces if space.pool.kept]

    def _plan(self, space: Space, rule: Rule, medians: bool) -> None:
        """Plans by due dates with the true or with the median times, and judges by the true ones."""
        packed = list_schedule((space.median_problem if medians else None) or space.problem, rule)
        if packed is not None:
            origin: Origin = "planned on medians" if medians else "planned"
            value, _ = self._judge_packed(space, space.family, origin, packed)
            space.pool.add(Tried(value, rule, medians))

    def _refine(self) -> None:
        """Improves drafts until one gets no better; then varies rules for longer and longer before the next, and in the
        end begins with new drafts, as other small changes of the same orders may lead further."""
        before, patience = -1, 0
        while self.evaluations > before:
            before = self.evaluations
            if self._improve_draft():
                patience = 0
                continue
            patience = max(1, 2 * patience)
            self._vary_rules(self.evaluations + patience * max(1, self.evaluations - before))
            if patience >= _PATIENCE:
                self.drafts, patience = [], 0
                for space, tried in [(s, t) for s in self.planned if self._may_win(s) for t in s.pool.kept]:
                    if self._begin():
                        self._plan(space, tried.rule, tried.medians)

    def _improve_draft(self) -> bool:
        """One round for one of the drafts, whose place the result takes; whether it is better."""
        drafts = [draft for draft in self.drafts if self._may_win(draft.space)]
        if not drafts:
            return False
        draft = drafts[biased(len(drafts), self.random)]
        problem = draft.space.problem
        actions = 3 * problem.placement.stages * problem.microbatches
        left = (self.most_evaluations - self.evaluations) * _TRIALS_PER_EVALUATION
        trials = min(left, _TRIALS_PER_EVALUATION + _ACTIONS_PER_ROUND // actions)
        if not trials or not self._begin(-(-trials // _TRIALS_PER_EVALUATION)):
            return False
        seed = self.random.getrandbits(64)
        packed = improve(problem, draft.packed, seed=seed, trials=trials, objective=self.objective)
        better = packed != draft.packed
        if better:
            self.drafts.remove(draft)
            self._judge_packed(draft.space, draft.family, "improved", packed)
        return better

    def _try_published(self, families: Sequence[str]) -> None:
        for plan in published(self.spaces, self.limit, families, self._may_win):
            space = self.spaces[plan.placement]
            self.searched.add((plan.placement, plan.update))
            fused = any(action.parts for order in plan.orders for action in order)
            for orders in (plan, unfused(plan)) if fused and space.costs.overlap < 1 else (unfused(plan),):
                if not self._begin():
                    return
                fits = self._judge_published(space, orders)
            for spared in self.sparing(space) if self.spare and not fits else ():
                if not self._begin():
                    return
                self._judge_packed(spared, plan.family, "published", pack(spared.problem, plan.orders))

    def _judge_published(self, space: Space, plan: Plan) -> bool:
        """Whether it keeps the limit. As it is: natively where every backward is whole or every one is split. Where the
        plan has some of each, all are split, which costs no time; and little memory, or else it is judged as it is."""
        kinds = {action.kind for order in plan.orders for action in order}
        if space.copies == 1 and kinds - {Kind.UPDATE} == {Kind.F, Kind.B}:
            problem = with_whole_backward(space.problem)
            replayed = replay(problem, pack(problem, plan.orders))
            assert replayed is not None
            return self._judge(space, plan.family, "published", plan, replayed)[1]
        if space.copies == 1 and {Kind.I, Kind.W} <= kinds <= {Kind.F, Kind.I, Kind.W, Kind.B}:
            _, fits = self._judge_packed(space, plan.family, "published", pack(space.problem, plan.orders))
            if fits or Kind.B not in kinds:
                return fits
        _, fits = self._judge(space, plan.family, "published", plan, self._simulated(plan, space))
        if space.copies == 2:  # with all backwards split, another order to improve
            self._judge_packed(space, plan.family, "improved", pack(space.problem, plan.orders))
        return fits

    def _judge_packed(self, space: Space, family: str, origin: Origin, packed: Packed) -> tuple[int, bool]:
        """Judges orders with split backwards, and keeps them as a draft if they are among the best. Those that offload
        are judged with their copies if they might win without."""
        replayed = replay(space.problem, packed)
        assert replayed is not None
        replayed = Replay(replayed.makespan + space.exchange, replayed.span + space.exchange, replayed.peaks)
        if space.offloaded:
            value = replayed.makespan if self.objective == "makespan" else replayed.span
            fits = all(peak <= most for peak, most in zip(replayed.peaks, space.problem.limit, strict=True))
            if fits and value < min((key[0] for key, _ in self.best.values()), default=inf):
                plan = with_copies(space, family, packed)
                fits = self._judge(space, family, origin, plan, self._simulated(plan, space))[1]
        else:
            value, fits = self._judge(space, family, origin, (space.problem, packed), replayed)
        if fits and value not in (draft.value for draft in self.drafts):
            drafts = [*self.drafts, _Draft(value, space, family, packed)]
            self.drafts = sorted(drafts, key=lambda draft: draft.value)[:_DRAFTS]
        return value, fits

    def _simulated(self, plan: Plan, space: Space) -> Replay:
        simulation = simulate(plan, space.costs)
        makespan, span = self.units.times((simulation.makespan, simulation.span))
        return Replay(makespan, span, self.units.memories(map(sub, simulation.peak_memory, space.weights)))

    def _judge(
        self, space: Space, family: str, origin: Origin, orders: Plan | tuple[Problem, Packed], replayed: Replay
    ) -> tuple[int, bool]:
        """Keeps the orders if they keep the limit and are the best of their family; returns the time that counts, and
        whether they keep the limit."""
        times = (replayed.makespan, replayed.span)
        value, other = times if self.objective == "makespan" else times[::-1]
        key = value, space.copies, other, space.placement.chunks
        group = family, space.placement.chunks, bool(space.recomputed), bool(space.offloaded)
        fits = all(peak <= most for peak, most in zip(replayed.peaks, space.whole_limit, strict=True))
        if not fits or group not in self.best or key < self.best[group][0]:
            candidate = Candidate(
                family,
                origin,
                space.placement,
                space.microbatches,
                orders.update if isinstance(orders, Plan) else "step",
                makespan=replayed.makespan / self.units.time,
                span=replayed.span / self.units.time,
                peak_memory=tuple(map(add, (peak / self.units.memory for peak in replayed.peaks), space.weights)),
                orders=orders,
                recomputed=space.recomputed,
                offloaded=space.offloaded,
            )
            if fits:
                self.best[group] = key, candidate
            else:
                self.too_large.append(candidate)
        return value, fits

    def _nothing_fits(self) -> PlanError:
        names = ", ".join(self.families)
        if self.limit is None or not self.too_large:
            return PlanError(
                f"none of {names} fits these sizes", fix="allow other families, more chunks or more memory"
            )
        least = min(self.too_large, key=lambda candidate: max(candidate.peak_memory))
        return PlanError(
            f"found no plan of {names} within the memory limit, and cannot prove that there is none",
            got=", ".join(f"{most:g}" for most in self.limit),
            needed=f"{max(least.peak_memory):g} per rank, which is enough for {least.family}",
            fix="allow other families",
        )
