"""Building blocks: what one micro-batch does on all ranks, in slots of one length, repeated every six slots.

The slots of F and I say how long a stage holds an activation, so the block sets the memory. Two slots of every six stay
free on each rank, for the W of its two stages. Where the repetition begins and ends, more are free; there it is
squeezed: an action moves to an earlier free slot as far as what it needs and the memory of the repetition allow.

Source: Pipeline Parallelism with Controllable Memory (arXiv 2405.15362). Where the paper leaves the squeezing open, it
is done as by the authors' scheduler, with one pass less: with as much memory, the plans for P to 15 and M to 40 are as
short or, where M is small, shorter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from pipex.plan.actions import Action, Kind
from pipex.plan.placement import Placement
from pipex.plan.plan import Plan

INTERVAL = 6
"""F, I and W of two stages, one slot each."""

Block = tuple[int, int, int, int]
"""The slots in which a rank runs F of its stage on the way down, F and I on the way up, and I on the way down."""

Line = dict[int, Action]
"""What a rank runs in which slot."""


def repeated(family: str, block: Sequence[Block], microbatches: int) -> Plan:
    """The plan that repeats ``block``, which has one entry per rank, for every micro-batch."""
    placement = Placement("v", len(block), 2)
    lines: list[Line] = []
    for rank, (f_down, f_up, i_up, i_down) in enumerate(block):
        down, up = rank, placement.stages - 1 - rank
        first = {f_down: (down, Kind.F), f_up: (up, Kind.F), i_up: (up, Kind.I), i_down: (down, Kind.I)}
        assert len({slot % INTERVAL for slot in first}) == len(first), "two actions of the block share a slot"
        lines.append(
            {
                slot + INTERVAL * m: Action(stage, kind, m)
                for slot, (stage, kind) in first.items()
                for m in range(microbatches)
            }
        )
    lines = [_with_weight_gradients(line) for line in lines]
    limit = max(max(_held(line)) for line in lines)
    lines = _squeezed_beginning(lines, limit)
    lines = [{slot: a for slot, a in line.items() if a.kind is not Kind.W} for line in _compact(lines)]
    lines = [_with_weight_gradients(line) for line in _squeezed_end(lines, limit)]
    orders = tuple(tuple(line[slot] for slot in sorted(line)) for line in lines)
    return Plan(family, placement, microbatches, orders, tuple(max(_held(line)) for line in lines))


def _with_weight_gradients(line: Line) -> Line:
    """Every W in the first free slot that it can have, oldest first."""
    deferred: deque[Action] = deque()
    filled = {}
    slot = 0
    end = max(line)
    while slot <= end or deferred:
        if slot in line:
            filled[slot] = line[slot]
            if line[slot].kind is Kind.I:
                deferred.append(line[slot]._replace(kind=Kind.W))
        elif deferred:
            filled[slot] = deferred.popleft()
        slot += 1
    return filled


def _held(line: Line) -> list[int]:
    """Activations held, slot after slot."""
    change = {Kind.F: 1, Kind.I: 0, Kind.W: -1}
    held, now = [], 0
    for slot in range(max(line) + 1):
        if slot in line:
            now += change[line[slot].kind]
        held.append(now)
    return held


def _fits(line: Line, limit: int) -> bool:
    """Whether ``_held(_with_weight_gradients(line))`` stays within the limit; asked often."""
    held = deferred = 0
    for slot in range(max(line) + 1):
        action = line.get(slot)
        if action is None:
            if deferred:
                deferred -= 1
                held -= 1
        elif action.kind is Kind.I:
            deferred += 1
        elif held == limit:
            return False
        else:
            held += 1
    return True


def _squeezed_beginning(lines: Sequence[Line], limit: int) -> list[Line]:
    """Everything before the first micro-batch is back on rank 0 moves, W too."""
    lines = [dict(line) for line in lines]
    held = list(map(_held, lines))
    slots = _slots(lines)
    last = 2 * len(lines) - 1
    for slot, rank, action in _by_slot(lines):
        if action == Action(0, Kind.I, 0):
            break
        for gap in range(_ready(action, slots, last), slot):
            if gap in lines[rank] or (action.kind is Kind.F and max(held[rank][gap:slot]) == limit):
                continue
            lines[rank][gap] = lines[rank].pop(slot)
            slots[action] = gap
            if action.kind is not Kind.I:
                for between in range(gap, slot):
                    held[rank][between] += 1 if action.kind is Kind.F else -1
            break
    return lines


def _squeezed_end(lines: Sequence[Line], limit: int) -> list[Line]:
    """Everything after the last micro-batch has entered moves; W, which is not there yet, takes the slots left."""
    lines = [dict(line) for line in lines]
    slots = _slots(lines)
    last = 2 * len(lines) - 1
    entered = slots[max(action for action in slots if action[:2] == (0, Kind.F))]
    for slot, rank, action in _by_slot(lines):
        if slot < entered:
            continue
        for gap in range(_ready(action, slots, last), slot):
            if gap in lines[rank]:
                continue
            lines[rank][gap] = lines[rank].pop(slot)
            if _fits(lines[rank], limit):
                slots[action] = gap
                break
            lines[rank][slot] = lines[rank].pop(gap)
    return lines


def _compact(lines: Sequence[Line]) -> list[Line]:
    """The same orders with every action as early as what it needs allows."""
    slots: dict[Action, int] = {}
    compact: list[Line] = [{} for _ in lines]
    free = [0] * len(lines)
    last = 2 * len(lines) - 1
    for _, rank, action in _by_slot(lines):
        slot = max(_ready(action, slots, last), free[rank])
        compact[rank][slot] = action
        slots[action] = slot
        free[rank] = slot + 1
    return compact


def _ready(action: Action, slots: dict[Action, int], last: int) -> int:
    """The slot after the last of what ``action`` needs, which is the micro-batch before it on the stage, too."""
    stage, kind, microbatch, _ = action
    before = [Action(stage, kind, microbatch - 1)] if microbatch else []
    if kind is Kind.W:
        before.append(Action(stage, Kind.I, microbatch))
    elif kind is Kind.I:
        before.append(Action(stage, Kind.F, microbatch) if stage == last else Action(stage + 1, Kind.I, microbatch))
    elif stage:
        before.append(Action(stage - 1, Kind.F, microbatch))
    return max((slots[needed] for needed in before), default=-1) + 1


def _slots(lines: Iterable[Line]) -> dict[Action, int]:
    return {action: slot for line in lines for slot, action in line.items()}


def _by_slot(lines: Iterable[Line]) -> list[tuple[int, int, Action]]:
    """(slot, rank, action) of all, in order of slots."""
    return sorted(
        ((slot, rank, action) for rank, line in enumerate(lines) for slot, action in line.items()),
        key=lambda entry: entry[:2],
    )
