"""Who failed: one verdict that all ranks share, and the two threads that wait for it.

The first rank that writes the key ``verdict`` of the run's store decides it, whoever else fails in its wake. A rank
breaks its own connections only after the key is there, so a peer that sees a broken connection and finds no verdict
has found the culprit at the other end.

Two threads of every rank wait, and neither needs the main thread:

    poll       looks every 100 ms for a verdict, and breaks this rank's connections when there is one, which wakes the
               main thread from whatever it waits for. It also calls and answers roll calls. Nobody else talks to the
               store about failures, so nobody else can hang on it.
    lifeline   waits for the next rank's goodbye, and reports that rank if its connection breaks first. The ranks form
               a ring, so each is watched by one other, even when nobody expects a tensor from it.

A roll call finds the culprit of a stall, which is rarely the rank that was waited for: that one may wait itself. Every
rank writes down whom it waits for, and the chain ends at a rank that waits for nobody, or does not answer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import Store, Work

from pipex.errors import Ending, PeerError, headline
from pipex.transport.interface import Phase, World
from pipex.transport.places import Places

VERDICT, ROLL_CALL = "verdict", "roll-call"
POLL_SECONDS = 0.1
ANSWER_SECONDS = 0.5  # five polls: a live rank has answered a roll call by then, even on a busy machine
STORE_SECONDS = 10.0  # a store that takes longer is on a stopped host
FOREVER = timedelta(days=365)
EVERYBODY = -1


def joined_key(rank: int) -> str:
    """The key that a rank sets when it joins."""
    return f"joined/{rank}"


class Verdict(NamedTuple):
    """What ended the run; ``step`` and ``position`` as in ``World.at``, None where unknown."""

    kind: Ending
    rank: int
    step: int | None
    position: int | None
    text: str


STORE_GONE = Verdict("lost", 0, None, None, "or the launcher, whichever hosts the run's store, is gone or stopped")


class Wait(NamedTuple):
    """What the main thread waits for: a rank or ``EVERYBODY``, on what, and since when."""

    peer: int
    subject: object
    since: float


class Answer(NamedTuple):
    """A rank's answer to a roll call; ``peer`` is None when it waits for nobody."""

    peer: int | None
    step: int
    position: int


class Watch:
    """One rank's view of the others' fate.

    Args:
        world: the world that is watched.
        store: the run's store, for the poll alone: a wait of the main thread on a shared one would block it.
        timeout: seconds that the main thread may wait for a peer without a roll call.
        abort: breaks this rank's connections, so that every wait on them ends; called from any thread, repeatedly.
    """

    def __init__(self, world: World, store: Store, timeout: float, abort: Callable[[], None]) -> None:
        self.place: tuple[int, int] = (0, Phase.SETUP)
        self.places = Places()
        self._world, self._timeout, self._abort = world, timeout, abort
        self._wait: Wait | None = None
        self._proposal: Verdict | None = None
        self._verdict: Verdict | None = None
        self._decision = threading.Lock()
        self._decided, self._wake, self._ending = threading.Event(), threading.Event(), threading.Event()
        # Daemons: a program that ends without closing its world must not hang on them.
        self._poller = threading.Thread(target=self._poll, args=(store,), name="pipex-poll", daemon=True)
        self._holder: threading.Thread | None = None
        self._poller.start()

    def hold(self, lifeline: Work) -> None:
        """Watches the next rank; ``lifeline`` is the receive of its goodbye."""
        self._holder = threading.Thread(target=self._hold, args=(lifeline,), name="pipex-lifeline", daemon=True)
        self._holder.start()

    @contextmanager
    def waiting(self, peer: int, subject: object) -> Iterator[None]:
        """Goes around everything that talks to ``peer`` (or ``EVERYBODY``), and around nothing else.

        ``subject`` goes into messages: an edge or a phrase. A wait that lasts longer than ``timeout`` leads to a roll
        call; whatever ends the wait early is raised as the verdict's error, a child of ``PeerError``.
        """
        self.check()
        self._wait = wait = Wait(peer, subject, time.monotonic())
        try:
            yield
        except RuntimeError as error:  # the only type that torch raises for a connection
            if peer == EVERYBODY:
                self.report_failure(error)
            else:
                self._report_lost(wait)
            raise self._error() from error
        finally:
            self._wait = None

    def check(self) -> None:
        """Raises the verdict's error, if there is a verdict."""
        if self._verdict is not None:
            raise self._error()

    def report_failure(self, error: BaseException) -> None:
        """Reports that this rank ends with ``error``, at the place that it published last."""
        self._report(Verdict("failed", self._world.rank, *self.place, headline(error)))

    def wait_for_goodbye(self) -> None:
        """Waits until the next rank has left in order."""
        if self._holder is not None:
            with self.waiting((self._world.rank + 1) % self._world.ranks, "its goodbye"):
                self._holder.join()
            self.check()

    def end(self) -> None:
        """Ends the poll. Safe to repeat."""
        self._ending.set()
        self._wake.set()
        self._poller.join(STORE_SECONDS)

    def _error(self) -> PeerError:
        assert self._verdict is not None
        kind, rank, step, position, text = self._verdict
        return self.places.error(kind, text, rank, step, position)

    def _report(self, verdict: Verdict) -> None:
        """Makes ``verdict`` the run's, unless there is one already; returns when this rank knows which it is."""
        self._proposal = self._proposal or verdict
        self._wake.set()
        if not self._poller.is_alive():
            self._decide(verdict)
        elif not self._decided.wait(STORE_SECONDS):
            self._decide(STORE_GONE)

    def _report_lost(self, wait: Wait) -> None:
        text = f"is gone: its connection to rank {self._world.rank} broke ({wait.subject})"
        self._report(Verdict("lost", wait.peer, None, None, text))

    def _decide(self, verdict: Verdict) -> None:
        with self._decision:
            self._verdict = self._verdict or verdict
        self._abort()
        self._decided.set()

    def _hold(self, lifeline: Work) -> None:
        wait = Wait((self._world.rank + 1) % self._world.ranks, "the lifeline between ranks", time.monotonic())
        try:
            lifeline.wait(FOREVER)
        except RuntimeError:
            self._report_lost(wait)

    def _poll(self, store: Store) -> None:
        answered = False
        try:
            while not self._ending.is_set():
                self._wake.wait(POLL_SECONDS)
                wait = self._wait
                if self._proposal is not None:
                    return self._decide(self._first(store, self._proposal))
                if store.check([VERDICT]):
                    return self._decide(_verdict(store.get(VERDICT)))
                if not answered and store.check([ROLL_CALL]):
                    self._answer(store)
                    answered = True
                if wait is not None and time.monotonic() - wait.since > self._timeout:
                    return self._decide(self._first(store, self._call_roll(store, wait)))
        except RuntimeError:
            self._decide(STORE_GONE)

    def _first(self, store: Store, verdict: Verdict) -> Verdict:
        return _verdict(store.compare_set(VERDICT, "", json.dumps(verdict)))

    def _answer(self, store: Store) -> None:
        peer = None if self._wait is None else self._wait.peer
        store.set(f"answer/{self._world.rank}", json.dumps(Answer(peer, *self.place)))

    def _call_roll(self, store: Store, wait: Wait) -> Verdict:
        store.set(ROLL_CALL, "")
        self._answer(store)  # another rank may have called it in the same moment
        time.sleep(ANSWER_SECONDS)
        keys = [f"answer/{rank}" for rank in range(self._world.ranks)]
        answers = [Answer(*json.loads(store.get(key))) if store.check([key]) else None for key in keys]
        rank, circle = culprit(wait.peer, answers)
        answer = answers[rank]
        if circle:
            told = " → ".join(map(str, (*circle, rank)))
            state = f"is in a circle of waiting ranks ({told}) for {self._timeout:.1f} s"
        elif answer is not None:
            state = f"is alive but made no progress for {self._timeout:.1f} s"
        elif store.check([joined_key(rank)]):
            state = f"is stopped: no answer within {ANSWER_SECONDS:g} s"
        else:
            state = f"has not joined within {self._timeout:.1f} s"
        text = f"{state}; rank {self._world.rank} waited for {wait.subject}"
        step, position = (None, None) if answer is None else (answer.step, answer.position)
        return Verdict("stalled", rank, step, position, text)


def culprit(peer: int, answers: list[Answer | None]) -> tuple[int, list[int]]:
    """The rank that holds up a wait for ``peer`` (or ``EVERYBODY``), from all ranks' answers; None is no answer.

    Follows the chain of waits to a rank that waits for nobody or did not answer. Where ranks wait in a circle, which a
    validated plan excludes, it is the first rank of the circle, which comes with it, each rank before the one that it
    waits for; the list is empty where there is none.
    """
    chain: list[int] = []
    while peer != EVERYBODY and peer not in chain:
        chain.append(peer)
        answer = answers[peer]
        if answer is None or answer.peer is None:
            return peer, []
        peer = answer.peer
    if peer != EVERYBODY:
        circle = chain[chain.index(peer) :]
        first = circle.index(min(circle))
        return circle[first], circle[first:] + circle[:first]
    silent = [rank for rank, answer in enumerate(answers) if answer is None]
    busy = [rank for rank, answer in enumerate(answers) if answer is not None and answer.peer is None]
    return (silent + busy + chain + [0])[0], []


def _verdict(raw: bytes) -> Verdict:
    return Verdict(*json.loads(raw))
