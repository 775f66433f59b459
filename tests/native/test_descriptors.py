"""A process without a file descriptor left is told so; to nobody does it, or a living peer, look as if it had ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from few_descriptors import descriptors
from forked import Forked, outcomes

from pipex import _native

FULL = "no file descriptor left: Too many open files; needed more than the"


def message(call: Callable[[], Any], spare: int) -> Any:
    def body() -> Any:
        with descriptors(spare):
            try:
                call()
            except Exception as error:
                return [type(error).__name__, str(error)]
        return None

    (outcome,) = outcomes([body])
    return outcome["result"]


@pytest.mark.parametrize("spare", [0, 1])
def test_an_address_that_cannot_be_opened_is_not_said_to_be_of_an_ended_process(spare: int) -> None:
    control = _native.Control(2)
    address = control.address
    kind, said = message(lambda: _native.Control.open(address), spare)
    assert kind == "InputError"
    assert "shared memory of another rank cannot be opened; got " + FULL in said
    assert message(lambda: _native.Control.open(address), 2) is None


def test_memory_that_cannot_be_made_for_want_of_a_descriptor_is_told_so() -> None:
    kind, said = message(lambda: _native.Control(2), 0)
    assert kind == "InputError"
    assert "shared memory between ranks cannot be made; got " + FULL in said


def test_a_member_without_a_descriptor_is_told_so() -> None:
    control = _native.Control(2)
    kind, said = message(lambda: _native.Member(control, 0, 1.0, False), 0)
    assert kind == "InputError"
    assert FULL in said


def test_a_living_peer_is_not_lost_to_a_process_whose_descriptors_are_all_in_use() -> None:
    control = _native.Control(2)
    fd = control.fd
    go, going = os.pipe()

    def peer() -> None:
        os.read(go, 1)
        member = _native.Member(_native.Control.attach(os.dup(fd)), 1, 10.0, False)
        member.exchange(b"")
        threading.Event().wait()

    with Forked([peer]) as forked:
        member = _native.Member(control, 0, 10.0, False)
        with descriptors(0):
            os.write(going, b"x")
            member.exchange(b"")  # it has joined, and the watch cannot get hold of it
            threading.Event().wait(0.3)  # three beats of the watch
            assert not control.aborted
        os.kill(forked.pids[0], signal.SIGKILL)
        with pytest.raises(_native.Aborted) as caught:  # the watch is at work all the same
            member.exchange(b"")
    assert caught.value.args[:2] == ("lost", 1)
    os.close(go)
    os.close(going)
