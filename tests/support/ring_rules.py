"""The rules of the device ring as data, and the state of the model that follows them (``ring_model``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

PRODUCER, CONSUMER = 0, 1

COMPUTE, SEND, READ, ASIDE = range(4)
OWNER = (PRODUCER, PRODUCER, CONSUMER, CONSUMER)
"""Of the streams: two of the producer, the consumer's compute stream, and one that only broken rules use."""

LIVE, FAILED, DEAD = range(3)
DONE, ERROR = -1, -2
"""Ends of a host's program."""

NOTHING = -1
FREED = 1 << 62
"""What the abort rule writes to a flag; every count is below."""

Operation = tuple[Any, ...]
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """The rules. The defaults are the protocol's; ``test_ring_mutations.py`` breaks one at a time.

    Attributes:
        producer: the host's program for a message; what stands together is one move.
        to_host: likewise for one through host memory.
        to_host_waits: whether its copy waits for the computation.
        to_host_counts: whether the producer counts it among the slot's messages, which have flags and credits.
        send: what ``enqueue`` enqueues.
        flag_on: the stream that writes the flag.
        awaits: whether the consumer's stream waits for the flag.
        give_back: the host's program for a lent message that is dropped, one move each.
        copy_out: likewise for one beyond ``alive``, once its copy is enqueued.
        credit_on: the stream that writes the credit.
        late: by how many laps the credit that a send waits for is too old.
        compare: when a stream wait ends.
        counts: whether flag and credit count the slot's messages; else they are 1 from the first on.
        in_order: whether the writes of one stream arrive in their order.
        at_abort: how often a process frees its own waiting streams.
    """

    producer: tuple[tuple[str, ...], ...] = (("compute",), ("take", "enqueue"), ("header", "push"))
    to_host: tuple[tuple[str, ...], ...] = (("compute",), ("to host",), ("take", "header", "push"))
    to_host_waits: bool = True
    to_host_counts: bool = False
    send: tuple[str, ...] = ("computed", "credit", "first half", "second half", "flag", "source free")
    flag_on: int = SEND
    awaits: bool = True
    give_back: tuple[str, ...] = ("release", "push")
    copy_out: tuple[str, ...] = ("release", "push")
    credit_on: int = READ
    late: int = 0
    compare: Literal["GEQ", "EQ"] = "GEQ"
    counts: bool = True
    in_order: bool = True
    at_abort: Literal["again", "once", "never"] = "again"


class State(NamedTuple):
    # Producer's host: the message at work and the step of its program, its slot; free slots, the top came back last;
    # per slot the messages so far; per piece of source memory the message that it is held for.
    sent: int
    step: int
    slot: int
    stack: Numbers
    uses: Numbers
    held: Numbers
    # Its device: source memory, computed messages (bits), credits.
    source: Numbers
    computed: int
    credit: Numbers
    # Host segment.
    ready: Numbers
    free: Numbers
    headers: Numbers
    # Consumer's host: messages received, where its program is; per slot the messages so far, and the message lent;
    # what is being given back: slot, message, its number in the slot, what is left to do.
    got: int
    place: int
    arrived: Numbers
    lent: Numbers
    returning: tuple[int, int, int, tuple[str, ...]] | None
    # Its device: two halves per slot, flags.
    data: Numbers
    flag: Numbers
    # Both.
    streams: tuple[tuple[Operation, ...], ...]
    wires: tuple[tuple[Operation, ...], ...]
    lives: Numbers
    aborted: bool
    let_go: Numbers  # processes that have freed their streams, under the rule "once"
    # Per slot the flags and credits enqueued so far. Nobody looks at them but the theorem: a wait is enqueued only
    # after the operation that satisfies it.
    flags: Numbers
    credits: Numbers


ON_DATA = ("copy", "read", "source free")
"""Operations that only matter while messages do."""

HOST = (("sent", "slot", "stack", "uses", "held", "free"), ("got", "arrived", "lent", "returning", "ready", "headers"))
DEVICE = (("source", "computed", "credit"), ("data", "flag"))
"""Fields that only this process looks at, its host or its device."""


Move = tuple[object, State]
"""a name for people, and the state after it"""


def put(values: tuple[Any, ...], index: int, value: object) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])
