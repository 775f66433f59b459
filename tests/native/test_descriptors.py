"""A process without a file descriptor left is told so; to nobody does it, or a living peer, look as if it had ended."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built import ROOT, compiled
from few_descriptors import descriptors
from forked import Forked, outcomes

from pipex import _native
from pipex.errors import InputError
from pipex.transport import header

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


def test_a_full_table_of_the_host_is_not_said_to_be_the_limit_of_this_process() -> None:
    source = ROOT / "tests" / "native" / "full_file_table.cpp"
    full = compiled([os.environ.get("CXX", "g++"), "-shared", "-fPIC"], [source], ".so")
    program = "from pipex import _native; _native.Control(2)"
    environment = {**os.environ, "LD_PRELOAD": str(full)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (
        "shared memory between ranks cannot be made; got no file descriptor left: Too many open files in system; "
        in (done.stderr)
    )
    assert "needed fewer open files in all processes of this host; end some, or raise fs.file-max" in done.stderr
    assert "ulimit" not in done.stderr


def test_a_member_without_a_descriptor_is_told_so() -> None:
    control = _native.Control(2)
    kind, said = message(lambda: _native.Member(control, 0, 1.0, False), 0)
    assert kind == "InputError"
    assert FULL in said


def test_an_edge_needs_one_descriptor_to_grow_and_says_where_there_is_none() -> None:
    member = _native.Member(_native.Control(1), 0, 1.0, False)
    edge = header.Header(bytes(16), 0, 1, "activation", 0, 0, 0, 0, 0).pack()
    receiver = _native.RingReceiver(member, 0, 1, 1, edge)
    sender = _native.RingSender(member, 0, receiver.address, 1, 1, edge)
    nothing = _native.MessageForm(b"", 0)
    with pytest.raises(InputError, match="shared memory between ranks cannot be made; got " + FULL), descriptors(0):
        sender.send(nothing, [], 1, 0)
    with descriptors(1):
        sender.send(nothing, [], 1, 0)
    assert receiver.receive(1, 0) == ((b"", 0), ())


def test_the_start_time_of_a_forked_child_is_its_own() -> None:
    control = _native.Control(1)
    address = bytes.fromhex(outcomes([lambda: _native.Control(1).address.hex()])[0]["result"])
    own, child = (struct.unpack_from("<iiQ", each) for each in (control.address, address))
    assert own[0] == os.getpid() != child[0]
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    assert own[2] == started < child[2]


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
