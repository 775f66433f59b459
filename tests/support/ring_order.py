"""Which move of a ring may go before all others, so that fewer orders of the same events are visited.

Such a move shares nothing with any other that can come before it, so every order of events has the same end as one in
which it goes first (persistent sets; Godefroid, LNCS 1032). Each rule below says who could get before it. Faults are
visited from every state in any case. The rules lean on the right protocol: models of broken ones go without.
"""

from __future__ import annotations

from ring_model import Ring
from ring_rules import COMPUTE, DEAD, READ, SEND, Move, Operation, State

ALWAYS = {
    "computed?",  # a message stays computed
    "compute",  # its copy waits for it, and no other has its piece of memory while that is held
    "write",  # the end of a wire belongs to its stream
}
UNTIL_ABORT = ALWAYS | {
    "credit?",  # counts only grow, until FREED is overwritten
    "flag?",
    "copy",  # its piece of memory is held until the operation behind it
    "source free",  # a piece of memory on which nothing is enqueued is like any other
    "read",  # the next message for its slot waits for a credit that is behind it in the stream
}


def first(ring: Ring, s: State) -> Move | None:
    """A move that may go first; None if there is none and all must be tried."""
    for stream, queue in enumerate(s.streams):
        if queue and queue[0][0] in (ALWAYS if s.aborted else UNTIL_ABORT) and not _shared(s, queue[0]):
            after = ring.complete(s, stream)
            if after is not None:
                return ("stream", stream, *queue[0]), after
    if s.aborted or DEAD in s.lives:
        return None
    if s.step == 0 and s.sent < ring.messages:
        return next(iter(ring.send(s)))  # computes what nobody can ask for yet
    for stream, wire in enumerate(s.wires):
        # Readers of data that is on its way wait for the flag behind it. Flags only grow, unless an abort may come.
        if wire and (not _shared(s, wire[0]) if wire[0][0] == "data" else not ring.faulty):
            return next(iter(ring.arrive(s, stream)))
    if s.step == len(ring.rules.producer) - 1 and not ring.faulty:
        return next(iter(ring.send(s)))  # a pushed slot takes no move from anybody
    return None


def _shared(s: State, operation: Operation) -> bool:
    """Whether somebody else who need not wait works on the same memory; if rules are right, never."""
    match operation:
        case ("compute", piece, _):
            return any(other[0] == "copy" and other[2] == piece for other in s.streams[SEND])
        case ("copy", _, piece, _):
            return any(other[1] == piece for other in s.streams[COMPUTE])
        case ("data", half, _):
            return s.lent[half // 2] >= 0 or ("read", half) in (other[:2] for other in s.streams[READ])
        case ("read", half, _):
            if ("data", half) in (effect[:2] for effect in s.wires[SEND]):
                return True
            for other in s.streams[SEND]:
                if other[:2] == ("credit?", half // 2):
                    return False
                if other[:2] == ("copy", half):
                    return True
    return False
