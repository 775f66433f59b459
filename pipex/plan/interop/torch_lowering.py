"""The actions that torch's runtime needs between the compute actions, placed as torch 2.11 to 2.15 place them.

torch runs a rank's row action by action. A receive is posted where it stands and waited for by the action that uses
it. Between two ranks messages have no names, so both must post them in one order: here all ranks' rows are built
together, and a message is entered in the sender's and the receiver's row at the same moment, right after the action
that makes it. So no two ranks can wait for each other, whatever the communication library buffers.

UNSHARD, RESHARD: a rank keeps the stages gathered that it uses next. They do nothing without FSDP, and torch refuses
to compute on a stage that FSDP has not gathered. REDUCE_GRAD: after a stage's last weight gradient; without it torch
does not divide the gradients by the number of micro-batches.

WAIT_SEND_F, WAIT_SEND_B, WAIT_REDUCE_GRAD, since torch 2.15, whose earlier versions wait at the end of the step: a wait
ends when the peer has posted its receive, and what was sent is freed by it. For an activation it stands after the
stage's own backward, which has used the gradient that the peer made of it; for all else that was sent, at the row's
end. One reduction at a time may be under way on a rank, so its wait follows at once.
"""

from __future__ import annotations

from collections import Counter

from pipex.plan.actions import Action, Kind
from pipex.plan.causality import SENDS
from pipex.plan.interop.torch_versions import WAIT_FOR, Versions
from pipex.plan.placement import Placement
from pipex.plan.plan import Orders, Plan

_GATHERED = 3
"""Stages that a rank keeps gathered at once: torch's figure for one in F, one in B and one being fetched."""


def with_torch_actions(plan: Plan, versions: Versions) -> Orders:
    """The orders of a valid plan of one pipe with torch's other actions, as ``compute_comms`` of these versions of
    torch has them."""
    waits = versions == ">=2.15"
    rows = [_with_reductions(_with_gathers(order), plan.microbatches, waits) for order in plan.orders]
    orders = _with_messages(plan, rows)
    return tuple(map(_with_waits, orders)) if waits else orders


def _with_gathers(order: tuple[Action, ...]) -> list[Action]:
    """Adds UNSHARD and RESHARD: before each action the rank frees the gathered stages that are not among the next
    three that it uses, and gathers those of the three that are missing."""
    upcoming: list[list[int]] = []  # per action, from the last: the stages in the order of their next use
    stages: list[int] = []
    for action in reversed(order):
        used = list(dict.fromkeys(part.stage for part in action.each))
        stages = used + [stage for stage in stages if stage not in used]
        upcoming.append(stages)
    gathered: list[int] = []
    result: list[Action] = []
    for action, stages in zip(order, reversed(upcoming), strict=True):
        near = stages[: max(_GATHERED, len(action.each))]
        result += [Action(stage, Kind.RESHARD) for stage in sorted(gathered) if stage not in near]
        result += [Action(stage, Kind.UNSHARD) for stage in near if stage not in gathered]
        result.append(action)
        gathered = near
    return result + [Action(stage, Kind.RESHARD) for stage in sorted(gathered)]


def _with_reductions(row: list[Action], microbatches: int, waits: bool) -> list[Action]:
    """Adds a stage's REDUCE_GRAD, and the wait for it, after the last of its B and W."""
    backwards: Counter[int] = Counter()
    result = []
    for action in row:
        result.append(action)
        for stage, kind, _, _ in action.each:
            if kind in (Kind.W, Kind.B):
                backwards[stage] += 1
                if backwards[stage] == microbatches:
                    result.append(Action(stage, Kind.REDUCE_GRAD))
                    if waits:
                        result.append(Action(stage, WAIT_FOR[Kind.REDUCE_GRAD]))
    return result


def _with_messages(plan: Plan, rows: list[list[Action]]) -> Orders:
    """Adds sends and receives. In turn, each rank goes one action on if what that needs has been made."""
    placement = plan.placement
    result: list[list[Action]] = [[] for _ in rows]
    done: set[tuple[int, bool, int]] = set()  # (stage, forward, micro-batch)
    cursor = [0] * len(rows)
    while any(at < len(row) for at, row in zip(cursor, rows, strict=True)):
        before = sum(cursor)
        for rank, row in enumerate(rows):
            if cursor[rank] == len(row) or not all(_ready(placement, part, done) for part in row[cursor[rank]].each):
                continue
            action = row[cursor[rank]]
            result[rank].append(action)
            for stage, kind, microbatch, _ in action.each:
                if kind not in _MESSAGES:
                    continue
                done.add((stage, kind is Kind.F, microbatch))
                send, receive = _MESSAGES[kind]
                if edge := placement.ends.get((stage, send)):
                    result[rank].append(Action(stage, send, microbatch))
                    receiver = placement.rank_of(edge.destination)
                    result[receiver].append(Action(edge.destination, receive, microbatch))
            cursor[rank] += 1
        assert sum(cursor) > before, "a valid plan cannot be stuck"
    return tuple(map(tuple, result))


def _with_waits(row: tuple[Action, ...]) -> tuple[Action, ...]:
    """Adds one wait for every send."""
    waits: dict[Action, Action] = {}  # of the sends that have none yet, in the order sent
    result = []
    for action in row:
        result.append(action)
        for stage, kind, microbatch, _ in action.each:
            if kind in SENDS:
                waits[action] = Action(stage, WAIT_FOR[kind], microbatch)
            elif kind in (Kind.I, Kind.B) and (wait := waits.pop(Action(stage, Kind.SEND_F, microbatch), None)):
                result.append(wait)
    return (*result, *waits.values())


# kind -> the message it makes, as sent and as received
_MESSAGES = {
    Kind.F: (Kind.SEND_F, Kind.RECV_F),
    Kind.I: (Kind.SEND_B, Kind.RECV_B),
    Kind.B: (Kind.SEND_B, Kind.RECV_B),
}


def _ready(placement: Placement, action: Action, done: set[tuple[int, bool, int]]) -> bool:
    """Whether the neighbouring stage has made what ``action`` needs."""
    stage, kind, microbatch, _ = action
    if kind not in _MESSAGES:
        return True
    forward = kind is Kind.F
    source = placement.before(stage) if forward else placement.after(stage)
    return source is None or (source, forward, microbatch) in done
