"""The device ring's protocol as a model of which every state can be visited (``explore``).

Two processes. Each has a host, a program that enqueues, and streams, queues whose operations complete in order but at
any later time. What a stream writes at the peer travels on a wire of its own and arrives in the order of writing. A
copy is two halves, so that a torn message shows. Memory holds the number of the message that was written to it:

    producer   compute stream   writes the source of message m
               send stream      waits for that, waits for the slot's credit, copies, writes the flag, frees the source
    consumer   compute stream   waits for the flag, reads, writes the credit

The consumer drops its messages in any order, at any time, from any thread; the last read of each is enqueued then.
Either process may be killed before any move; what it wrote and has not arrived arrives later or is lost. Or it fails:
its host stops, its streams go on, and it may exit at any time. Until the abort is recorded every message must be right;
afterwards the survivor's host must end with the error and its streams must run empty, whatever they hold.

A message that does not fit goes through the host memory of its slot, with neither flag nor credit: the producer's host
waits until it is computed and copies it there; the consumer's host copies it from there and gives the slot back.

Host steps that only enqueue are one move together: nothing sees them but their own stream, so any order of events is
that of one in which they follow each other. A move ends where the other process can look: at a pushed slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from explore import Violation
from ring_rules import (
    COMPUTE,
    CONSUMER,
    DEAD,
    DEVICE,
    DONE,
    ERROR,
    FAILED,
    FREED,
    HOST,
    LIVE,
    NOTHING,
    ON_DATA,
    OWNER,
    PRODUCER,
    READ,
    SEND,
    Move,
    Operation,
    Protocol,
    State,
    put,
)  # fmt: skip


class Ring:
    """One ring with ``under_way + alive`` slots, through which ``messages`` go.

    Args:
        faults: what may end a process before its time: subset of ("kill", "fail").
        through_host: the messages that do not fit.
        premise: whether it is a violation that a stream wait is enqueued before what satisfies it.
        protocol: the rules.
        first: picks from a state one move that may go before all others (``ring_order``); None: no such choice.
    """

    def __init__(
        self, under_way: int, alive: int, messages: int, *, faults: tuple[str, ...] = (), premise: bool = True,
        through_host: frozenset[int] = frozenset(),
        protocol: Protocol | None = None, first: Callable[[Ring, State], Move | None] | None = None,
    ) -> None:  # fmt: skip
        self.slots, self.alive, self.messages = under_way + alive, alive, messages
        self.through_host = through_host
        self.faulty, self.premise, self.rules, self.first = faults, premise, protocol or Protocol(), first
        # Under right rules nobody reads a slot or a source that was given back: what it held need not be told apart.
        self.forgets = self.rules == Protocol()
        self.steps: dict[str, Callable[[State], State]] = {
            "compute": self._compute, "take": self._take, "enqueue": self._enqueue, "header": self._header,
            "push": self._push, "free source": self._free_source, "to host": self._to_host,
        }  # fmt: skip
        self._start = self._first_state()

    def start(self) -> State:
        return self._start

    def _first_state(self) -> State:
        zeros, nothing = (0,) * self.slots, (NOTHING,) * self.slots
        return State(
            sent=0, step=0, slot=NOTHING, stack=tuple(range(self.slots))[::-1], uses=zeros,
            held=(NOTHING,) * self.messages, source=(NOTHING,) * self.messages, computed=0, credit=zeros,
            ready=(), free=(), headers=nothing, got=0, place=0, arrived=zeros, lent=nothing, returning=None,
            data=nothing * 2, flag=zeros, streams=((),) * 4, wires=((),) * 4, lives=(LIVE, LIVE), aborted=False,
            let_go=(0, 0), flags=zeros, credits=zeros,
        )  # fmt: skip

    def moves(self, s: State) -> Iterator[Move]:
        if self.first is not None and (move := self.first(self, s)) is not None:
            yield move
            return
        if s.lives[PRODUCER] == LIVE and s.step >= 0:
            yield from self.send(s)
        if s.lives[CONSUMER] == LIVE and s.place >= 0:
            yield from self._receive(s)
        if s.lives[CONSUMER] == LIVE:
            yield from self._give_back(s)
        if s.sent == s.got == self.messages and s.step == s.place == 0 and not s.aborted and max(s.held) < 0:
            yield "the ranks agree on the end of the step", s._replace(step=DONE, place=DONE)
        for stream, queue in enumerate(s.streams):
            if queue and (after := self.complete(s, stream)) is not None:
                yield ("stream", stream, *queue[0]), after
        for stream in range(len(s.wires)):
            yield from self.arrive(s, stream)
        for process in (PRODUCER, CONSUMER):
            yield from self._abort(s, process)

    def faults(self, s: State) -> Iterator[Move]:
        for process, life in enumerate(s.lives):
            if life == FAILED:
                yield ("exit", process), self._die(s, process)
            elif s.lives == (LIVE, LIVE) and not s.aborted and s.step != DONE:
                if "kill" in self.faulty:
                    yield ("kill", process), self._die(s, process)
                if "fail" in self.faulty:
                    failed = self._record(s._replace(lives=put(s.lives, process, FAILED)))
                    yield ("fail", process), self._end(failed, process)

    def left_over(self, s: State) -> str | None:
        waiting = [f"stream {stream} at {queue[0]}" for stream, queue in enumerate(s.streams) if queue]
        for process, (name, place) in enumerate((("producer", s.step), ("consumer", s.place))):
            if s.lives[process] == LIVE and place != (ERROR if s.aborted else DONE):
                waiting.append(f"the {name}'s host")
        return f"stuck: {', '.join(waiting)}" if waiting else None

    # The producer's host.

    def send(self, s: State) -> Iterator[Move]:
        if s.sent < self.messages:
            program = self.rules.to_host if s.sent in self.through_host else self.rules.producer
            group = program[s.step]
            if self._ready(s, group[0]):
                for step in group:
                    s = self.steps[step](s)
                last = s.step + 1 == len(program)
                yield ("producer", *group), s._replace(sent=s.sent + last, step=0 if last else s.step + 1)
            elif s.aborted and group[0] == "take":
                yield "the producer's wait for a slot ends", self._end(s, PRODUCER)
        elif s.aborted:
            yield "the producer's wait for the end ends", self._end(s, PRODUCER)

    def _ready(self, s: State, step: str) -> bool:
        match step:
            case "take":
                return bool(s.stack or s.free)
            case "to host":
                return not self.rules.to_host_waits or bool(s.computed >> s.sent & 1)
        return True

    def _to_host(self, s: State) -> State:
        if s.aborted:
            return s
        piece = s.held.index(s.sent)
        if s.source[piece] != s.sent:
            raise Violation(f"the host copies message {s.source[piece]} instead of {s.sent}")
        return s._replace(held=put(s.held, piece, NOTHING), source=put(s.source, piece, NOTHING))

    def _compute(self, s: State) -> State:
        if s.aborted:
            return self._on(s, COMPUTE, ("compute", NOTHING, s.sent))
        piece = s.held.index(NOTHING)  # the allocator gives again what was given back to it
        return self._on(s._replace(held=put(s.held, piece, s.sent)), COMPUTE, ("compute", piece, s.sent))

    def _take(self, s: State) -> State:
        *stack, slot = *s.stack, *s.free
        s = s._replace(stack=tuple(stack), free=(), slot=slot)
        if s.sent in self.through_host and not self.rules.to_host_counts:
            return s
        return s._replace(uses=put(s.uses, slot, s.uses[slot] + 1))

    def _enqueue(self, s: State) -> State:
        slot, use = s.slot, s.uses[s.slot]
        piece = NOTHING if s.aborted else s.held.index(s.sent)
        credit = use - 1 - self.rules.late
        for what in self.rules.send:
            match what:
                case "computed":
                    s = self._on(s, SEND, ("computed?", s.sent))
                case "credit" if credit > 0:
                    if self.premise and s.credits[slot] < credit and not s.aborted:
                        raise Violation(f"premise: the wait for credit {credit} of slot {slot} is enqueued before it")
                    s = self._on(s, SEND, ("credit?", slot, self._value(credit)))
                case "first half" | "second half":
                    s = self._on(s, SEND, ("copy", 2 * slot + (what == "second half"), piece, s.sent))
                case "flag":
                    s = self._on(s, self.rules.flag_on, ("write", "flag", slot, self._value(use)))
                    s = s if s.aborted else s._replace(flags=put(s.flags, slot, use))
                case "source free":
                    s = self._on(s, SEND, ("source free", piece))
        return s

    def _header(self, s: State) -> State:
        return s._replace(headers=put(s.headers, s.slot, s.sent))

    def _push(self, s: State) -> State:
        return s._replace(ready=(*s.ready, s.slot))

    def _free_source(self, s: State) -> State:
        return s if s.aborted else s._replace(held=put(s.held, s.held.index(s.sent), NOTHING))

    # The consumer's host.

    def _receive(self, s: State) -> Iterator[Move]:
        if s.got == self.messages or not s.ready:
            if s.aborted:
                yield "the consumer's wait ends", self._end(s, CONSUMER)
            return
        copies = sum(message >= 0 for message in s.lent) == self.alive
        if copies and s.returning is not None:
            return  # the lender's lock is taken
        slot, message = s.ready[0], s.got
        if s.headers[slot] != message:
            raise Violation(f"slot {slot} announces message {s.headers[slot]}, not {message}")
        if message in self.through_host:
            if s.returning is None:
                taken = s._replace(ready=s.ready[1:], headers=put(s.headers, slot, NOTHING), got=message + 1)
                yield ("consumer copies from host memory", message), taken._replace(free=(*s.free, slot))
            return
        use = s.arrived[slot] + 1
        if self.premise and s.flags[slot] < use and not s.aborted:
            raise Violation(f"premise: the wait for message {message} is enqueued before its flag")
        s = s._replace(
            ready=s.ready[1:], headers=put(s.headers, slot, NOTHING), got=message + 1, arrived=put(s.arrived, slot, use)
        )
        if self.rules.awaits:
            s = self._on(s, READ, ("flag?", slot, self._value(use)))
        if copies:
            s = self._read(s, slot, message)._replace(returning=(slot, message, use, self.rules.copy_out))
        else:
            s = s._replace(lent=put(s.lent, slot, message))
        yield ("consumer receives", message, "and copies it out" if copies else ""), s

    def _give_back(self, s: State) -> Iterator[Move]:
        if s.returning is None:
            for slot, message in enumerate(s.lent):
                if message >= 0:
                    dropped = (slot, message, s.arrived[slot], self.rules.give_back)
                    after = s._replace(lent=put(s.lent, slot, NOTHING), returning=dropped)
                    yield ("consumer drops", message), self._read(after, slot, message)
            return
        slot, message, use, (what, *rest) = s.returning
        match what:
            case "release":
                s = self._on(s, self.rules.credit_on, ("write", "credit", slot, self._value(use)))
                s = s if s.aborted else s._replace(credits=put(s.credits, slot, use))
            case "read":
                s = self._read(s, slot, message)
            case "push":
                s = s._replace(free=(*s.free, slot))
        yield ("give back", slot, what), s._replace(returning=(slot, message, use, tuple(rest)) if rest else None)

    def _read(self, s: State, slot: int, message: int) -> State:
        return self._on(self._on(s, READ, ("read", 2 * slot, message)), READ, ("read", 2 * slot + 1, message))

    # Devices.

    def _on(self, s: State, stream: int, operation: Operation) -> State:
        if s.aborted and operation[0] in ON_DATA:
            return s
        return s._replace(streams=put(s.streams, stream, (*s.streams[stream], operation)))

    def _value(self, use: int) -> int:
        return use if self.rules.counts else 1

    def _holds(self, flag: int, needed: int) -> bool:
        return flag == needed if self.rules.compare == "EQ" else flag >= needed

    def complete(self, s: State, stream: int) -> State | None:
        """The state after the first operation of a stream; None while that waits."""
        operation, *rest = s.streams[stream]
        match operation:
            case ("computed?", message):
                if not s.computed >> message & 1:
                    return None
            case ("credit?", slot, needed):
                if not self._holds(s.credit[slot], needed):
                    return None
            case ("flag?", slot, needed):
                if not self._holds(s.flag[slot], needed):
                    return None
            case ("compute", piece, message):
                s = s._replace(computed=s.computed | 1 << message)
                s = s if s.aborted else s._replace(source=put(s.source, piece, message))
            case ("copy", half, piece, message):
                if s.source[piece] != message:
                    raise Violation(f"the copy of message {message} reads message {s.source[piece]} in its source")
                s = self._write(s, stream, ("data", half, message))
            case ("write", *what, value):
                if self.forgets and what[0] == "credit":
                    s = s._replace(data=put(put(s.data, 2 * what[1], NOTHING), 2 * what[1] + 1, NOTHING))
                s = self._write(s, stream, (*what, value))
            case ("source free", piece):
                s = s._replace(held=put(s.held, piece, NOTHING), source=put(s.source, piece, NOTHING))
            case ("read", half, message):
                if s.data[half] != message:
                    raise Violation(f"a reader of message {message} sees message {s.data[half]} in half {half}")
        return s._replace(streams=put(s.streams, stream, tuple(rest)))

    def _write(self, s: State, stream: int, effect: Operation) -> State:
        if s.lives[1 - OWNER[stream]] == DEAD:
            return s
        return s._replace(wires=put(s.wires, stream, (*s.wires[stream], effect)))

    def arrive(self, s: State, stream: int) -> Iterator[Move]:
        wire = s.wires[stream]
        for place, (what, index, value) in enumerate(wire[:1] if self.rules.in_order else wire):
            after = s._replace(wires=put(s.wires, stream, wire[:place] + wire[place + 1 :]))
            yield ("arrives", what, index, value), after._replace(**{what: put(getattr(s, what), index, value)})
        if wire and s.lives[OWNER[stream]] == DEAD:
            yield ("lost", *wire), s._replace(wires=put(s.wires, stream, ()))

    # Ends before time.

    def _abort(self, s: State, process: int) -> Iterator[Move]:
        if s.lives[process] == DEAD:
            return
        if s.lives[1 - process] == DEAD and not s.aborted:
            yield ("sees that its peer is dead", process), self._record(s)
        flags = "credit" if process == PRODUCER else "flag"
        may = {"again": True, "once": not s.let_go[process], "never": False}[self.rules.at_abort]
        if s.aborted and may and min(getattr(s, flags)) < FREED:
            let_go = put(s.let_go, process, 1) if self.rules.at_abort == "once" else s.let_go
            yield ("frees its streams", process), s._replace(let_go=let_go, **{flags: (FREED,) * self.slots})

    def _record(self, s: State) -> State:
        """The abort record. From now on no message counts: data is forgotten, and with it who reads and writes it."""
        streams = tuple(tuple(op for op in queue if op[0] not in ON_DATA) for queue in s.streams)
        wires = tuple(tuple(effect for effect in wire if effect[0] != "data") for wire in s.wires)
        forgotten = {name: getattr(self._start, name) for name in ("data", "source", "held", "flags", "credits")}
        return s._replace(aborted=True, streams=streams, wires=wires, **forgotten)

    def _end(self, s: State, process: int) -> State:
        """A host's end with the error. What it gives back now would only add writes to a stream that runs empty."""
        end = "step" if process == PRODUCER else "place"
        return s._replace(**{name: getattr(self._start, name) for name in HOST[process]}, **{end: ERROR})

    def _die(self, s: State, process: int) -> State:
        """Nothing is left of a process but what it wrote."""
        mine = [owner == process for owner in OWNER]
        streams = tuple(() if own else queue for own, queue in zip(mine, s.streams, strict=True))
        wires = tuple(wire if own else () for own, wire in zip(mine, s.wires, strict=True))
        s = self._end(s, process)._replace(streams=streams, wires=wires, lives=put(s.lives, process, DEAD))
        return s._replace(**{name: getattr(self._start, name) for name in DEVICE[process]})
