"""Proves, before anything runs, that a plan is complete, in order, free of deadlock and as frugal as it promises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from pipex.errors import PlanError
from pipex.plan.actions import COMPUTE, IN_ORDERS, Action, Kind
from pipex.plan.causality import RECEIVES, SENDS, Event, causal_order
from pipex.plan.communication import communicate
from pipex.plan.memory import Form, changes
from pipex.plan.placement import Edge, Placement
from pipex.plan.plan import Plan


def validate(plan: Plan, slots: Mapping[Edge, int] | None = None) -> None:
    """Returns if the plan can run to its end with ``slots`` slots per edge (None: any number), else raises.

    Positions in errors count a rank's actions from 0; those of a DeadlockError count its sends and receives too, as
    ``communicate`` places them.

    Raises:
        PlanError: an action is missing, doubled, on the wrong rank, out of range or before one that it needs; a
            gradient is too late or too early for its update, or weights are used that no update has made yet; messages
            of an edge are not received in the order sent; a rank holds more than promised; an edge has no slots given.
        DeadlockError: ranks would wait for each other for ever.
    """
    if slots is not None and (missing := [edge for edge in plan.edges if edge not in slots]):
        raise PlanError(f"no slots given for the {missing[0]}", needed="a number of slots for every edge")
    events = [
        Event(rank, position, part)
        for rank, order in enumerate(plan.orders)
        for position, action in enumerate(order)
        for part in action.each
    ]
    _check_joined(plan)
    for event in events:
        _check_place(plan, event)
    where = _index(events)
    _check_complete(plan, where)
    for event in events:
        _check_order_on_rank(plan.placement, event, where)
    if plan.update in ("microbatch", "delayed"):
        _check_updates_complete(plan, where)
        for rank in range(plan.placement.ranks):
            _check_updates_on_rank(plan, rank, where)
    _check_message_order(plan)
    for _ in causal_order(communicate(plan), plan.placement, slots):
        pass  # to reach the end is the proof
    _check_promise(plan)


def _check_joined(plan: Plan) -> None:
    """Forwards come first: what they hold, they hold beside what the backwards free."""
    for rank, order in enumerate(plan.orders):
        for position, action in enumerate(order):
            kinds = [part.kind for part in action.parts]
            forwards = kinds.count(Kind.F)
            joined = 0 < forwards < len(kinds) and set(kinds[:forwards]) == {Kind.F} and Kind.UPDATE not in kinds
            if kinds and not joined:
                problem = f"{Event(rank, position, action)} does not join a forward with a backward"
                raise PlanError(problem, needed="F first, then I, W or B")


def _check_place(plan: Plan, event: Event) -> None:
    rank, _, (stage, kind, microbatch, _) = event
    if kind is Kind.UPDATE and plan.update in ("step", "never"):
        got = f"update={plan.update}"
        raise PlanError(f"{event} is in a plan without updates of its own", got=got, needed="microbatch or delayed")
    if kind not in IN_ORDERS:
        raise PlanError(f"{event} is no compute action", got=kind.value, needed="F, I, W or B")
    if not 0 <= stage < plan.placement.stages:
        needed = f"0 to {plan.placement.stages - 1}"
        raise PlanError(f"{event} names a stage that is not there", got=stage, needed=needed)
    if not 0 <= microbatch < plan.microbatches:
        needed = f"0 to {plan.microbatches - 1}"
        raise PlanError(f"{event} names a micro-batch that is not there", got=microbatch, needed=needed)
    if (right := plan.placement.rank_of(stage)) != rank:
        raise PlanError(f"{event} is on the wrong rank", got=f"rank {rank}", needed=f"rank {right}")


def _index(events: list[Event]) -> dict[Action, Event]:
    where: dict[Action, Event] = {}
    for event in events:
        if (first := where.setdefault(event.action, event)) is not event:
            raise PlanError(f"{event} was done before, at position {first.position}", needed="every action once")
    return where


def _check_complete(plan: Plan, where: Mapping[Action, Event]) -> None:
    """Stops at the first gap, so a text that promises a huge M and has few actions is refused at once."""
    for microbatch in range(plan.microbatches):
        pipe = plan.pipe_of(microbatch)
        for stage in range(plan.placement.stages):
            rank = plan.placement.rank_of(stage)
            has = {kind: Action(stage, kind, microbatch) in where for kind in COMPUTE}
            found = next((kind for kind in Kind if has.get(kind)), None)
            if stage not in pipe:
                if found is not None:
                    event = where[Action(stage, found, microbatch)]
                    raise PlanError(f"{event} is of a micro-batch that passes the other pipe", needed="one pipe each")
                continue
            if not has[Kind.F]:
                raise PlanError(f"rank {rank} never runs {stage}F{microbatch}", needed="every action once")
            if plan.update == "never":
                if backward := next((kind for kind in (Kind.I, Kind.W, Kind.B) if has[kind]), None):
                    event = where[Action(stage, backward, microbatch)]
                    raise PlanError(f"{event} is a backward in a plan without one", needed="F only")
                continue
            if has[Kind.B] and (has[Kind.I] or has[Kind.W]):
                event = where[Action(stage, Kind.B, microbatch)]
                raise PlanError(f"{event} computes a gradient that I or W computes too", needed="B, or I and W")
            if not has[Kind.B] and not (has[Kind.I] and has[Kind.W]):
                got = next((kind.value for kind in (Kind.I, Kind.W) if has[kind]), "none")
                problem = f"rank {rank} lacks a backward of stage {stage}, micro-batch {microbatch}"
                raise PlanError(problem, got=got, needed="B, or I and W")


def _check_order_on_rank(placement: Placement, event: Event, where: Mapping[Action, Event]) -> None:
    for needed in _needs(placement, event.action):
        first = where.get(needed)
        if first is not None and first.rank == event.rank and first.position >= event.position:
            before = "comes before" if first.position > event.position else "runs together with"
            raise PlanError(f"{event} {before} what it needs, {needed} at position {first.position}")


def _needs(placement: Placement, action: Action) -> Iterator[Action]:
    """What must have run before ``action``, as far as it exists in the plan."""
    stage, kind, microbatch, _ = action
    match kind:
        case Kind.F:
            if (before := placement.before(stage)) is not None:
                yield Action(before, Kind.F, microbatch)
        case Kind.I | Kind.B:
            yield Action(stage, Kind.F, microbatch)
            if (after := placement.after(stage)) is not None:
                yield Action(after, Kind.I, microbatch)
                yield Action(after, Kind.B, microbatch)
        case Kind.W:
            yield Action(stage, Kind.I, microbatch)


def _check_updates_complete(plan: Plan, where: Mapping[Action, Event]) -> None:
    if len(plan.placement.pipes) > 1:
        problem = "two copies of a model cannot change apart from each other within a step"
        raise PlanError(problem, got=f"update={plan.update} on placement {plan.placement.name}", needed="update=step")
    last = plan.microbatches - 1
    updates: Sequence[int] = range(plan.microbatches)
    needed = "an update after every micro-batch"
    if plan.update == "delayed":
        updates = sorted({last, *(action.microbatch for action in where if action.kind is Kind.UPDATE)})
        needed = "the same updates on all stages, and one after the last micro-batch"
    for stage in range(plan.placement.stages):
        for update in (Action(stage, Kind.UPDATE, microbatch) for microbatch in updates):
            if update not in where:
                raise PlanError(f"rank {plan.placement.rank_of(stage)} never runs {update}", needed=needed)


def _check_updates_on_rank(plan: Plan, rank: int, where: Mapping[Action, Event]) -> None:
    """All gradients of an update are made before it, and none of a later one; a forward finds the version that it uses.

    No I of a later micro-batch may come first either: what cannot wait for W, such as the gradients of norms, the
    runtime makes there.
    """
    latest: dict[int, Event] = {}  # per stage: the backward of its largest micro-batch so far
    gradients: Counter[int] = Counter()
    updates: Counter[int] = Counter()
    for position, part in (
        (position, part) for position, action in enumerate(plan.orders[rank]) for part in action.each
    ):
        event = Event(rank, position, part)
        stage, kind, microbatch, _ = part
        if kind is Kind.F:
            if updates[stage] < (version := plan.versions[stage, microbatch]):
                got, needed = f"{updates[stage]} updates of stage {stage} before it", f"{version}"
                raise PlanError(f"{event} uses weights that are not made yet", got=got, needed=needed)
        elif kind is not Kind.UPDATE:
            if stage not in latest or latest[stage].action.microbatch < microbatch:
                latest[stage] = event
            gradients[stage] += kind is not Kind.I
        else:
            updates[stage] += 1
            if stage in latest and latest[stage].action.microbatch > microbatch:
                early = latest[stage]
                problem = f"{event} comes after {early.action} at position {early.position}"
                raise PlanError(
                    problem, needed="all backwards of later micro-batches after it: their gradients are not its own"
                )
            if gradients[stage] <= microbatch:
                own = (Action(stage, k, m) for m in range(microbatch + 1) for k in (Kind.B, Kind.W))
                late = next(where[a] for a in own if a in where and where[a].position > position)
                raise PlanError(f"{event} comes before what it needs, {late.action} at position {late.position}")


def _check_message_order(plan: Plan) -> None:
    """An edge hands messages over in the order sent; the receiver must want them in that order."""
    ends = plan.placement.ends
    sent: dict[Edge, list[int]] = {edge: [] for edge in plan.edges}
    wanted: dict[Edge, list[tuple[Event, int]]] = {edge: [] for edge in plan.edges}
    for rank, order in enumerate(communicate(plan)):
        position = 0
        for action in order:
            if action.kind in SENDS:
                sent[ends[action.stage, action.kind]].append(action.microbatch)
            elif action.kind in RECEIVES:
                event = Event(rank, position, plan.orders[rank][position])
                wanted[ends[action.stage, action.kind]].append((event, action.microbatch))
            else:
                position += 1
    for edge in plan.edges:
        for microbatch, (event, wants) in zip(sent[edge], wanted[edge], strict=True):
            if wants != microbatch:
                problem = f"{event} is out of order on the {edge}"
                raise PlanError(problem, got=f"the message of micro-batch {microbatch} next", needed="the order sent")


def _check_promise(plan: Plan) -> None:
    for rank, promised in enumerate(plan.peak_activations):
        held = 0
        for position, part, _, by in changes(plan, rank):
            held += sum(more for form, _, more in by if form is not Form.INPUT)
            if held > promised:
                problem = f"rank {rank} holds more activations than promised"
                raise PlanError(problem, got=f"{held} at position {position} ({part})", needed=promised)
