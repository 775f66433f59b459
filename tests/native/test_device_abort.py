"""What frees a rank whose streams wait for a peer that will never write: the rescue thread, whatever Python does."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import sampled
from device_ring import End, Traffic, form_of
from forked import Forked
from simulated_cuda import word

from pipex import _native
from pipex.transport.header import pack_table

pytestmark = pytest.mark.timing

LIMIT = 1.0


def grow(end: End) -> None:
    """A first message each way, behind which there is device memory for the others."""
    end.send(0)
    end.receive(0)
    end.member.exchange(b"")
    assert end.sender.fits(form_of_all(end), 0)


def form_of_all(end: End) -> _native.MessageForm:
    return _native.MessageForm(*pack_table(form_of([end.traffic.words])))


def send_one(end: End, stream: int | None = None, *, source: int = 0, microbatch: int = 1) -> None:
    """From device memory, and not by a host that waits."""
    stream = end.compute if stream is None else stream
    end.sender.send(form_of_all(end), [end.sources[source]], stream, 1, microbatch)


def receive_one(end: End, stream: int | None = None) -> torch.Tensor:
    _, capsules = end.receiver.receive(end.compute if stream is None else stream, 1, 1)
    assert capsules is not None
    return torch.from_dlpack(capsules[0])


class Stuck:
    """Rank ``owner`` announces a message that its GPU never sends, since its compute stream stands still; the other
    rank receives it, and ``then`` does something about it."""

    def __init__(
        self, library: Path, then: Callable[[End, torch.Tensor], Any], *, owner: int = 0, settings: str = "",
        deed: Callable[[End], None] = lambda end: None,
    ) -> None:  # fmt: skip
        control = _native.Control(2)
        traffic = Traffic(settings=settings, timeout=LIMIT)
        self.ready, self.told = os.pipe()

        def send() -> None:
            end = End(library, control, owner, traffic)
            grow(end)
            gate = end.simulator.allocate(8)
            end.simulator.call("simulated_hold", end.compute, gate, 1)
            send_one(end)
            end.member.exchange(b"")
            os.write(self.told, b"!")
            deed(end)
            signal.pause()

        def receive() -> Any:
            end = End(library, control, 1 - owner, traffic)
            grow(end)
            tensor = receive_one(end)
            end.member.at(1, 7)
            end.member.exchange(b"")
            os.write(self.told, b"!")
            return then(end, tensor)

        bodies = [send, receive] if owner == 0 else [receive, send]
        self.sender, self.receiver = owner, 1 - owner
        self.forked = Forked(bodies)

    def __enter__(self) -> Stuck:
        self.forked.__enter__()
        for _ in range(2):  # both have left the exchange: nobody is stopped in a wait that is over
            os.read(self.ready, 1)
        return self

    def __exit__(self, *arguments: object) -> None:
        self.forked.__exit__(*arguments)
        os.close(self.ready)
        os.close(self.told)

    def signal(self, number: int) -> float:
        os.kill(self.forked.pids[self.sender], number)
        return time.monotonic()

    def outcome(self, seconds: float = 30.0) -> dict[str, Any]:
        return self.forked.outcome(self.receiver, seconds)


def synchronize_with_the_lock(end: End, _: torch.Tensor) -> None:
    """The main thread inside a call of the driver that does not know of Python's lock."""
    assert end.simulator.holding_the_lock.cuStreamSynchronize(ctypes.c_uint64(end.compute)) == 0
    end.control.raise_if_aborted()


def flush(end: End, _: torch.Tensor) -> None:
    """What is sent on behind the message that never comes does not leave either."""
    send_one(end)
    end.rank.flush()


@pytest.mark.parametrize("then", [synchronize_with_the_lock, flush])
@pytest.mark.parametrize("owner", [0, 1])
def test_a_killed_peer_frees_a_stream_that_waits_for_it(
    simulated_cuda: Path, owner: int, then: Callable[..., None]
) -> None:
    with Stuck(simulated_cuda, then, owner=owner) as stuck:
        killed = stuck.signal(signal.SIGKILL)
        seen = stuck.outcome()
    assert (seen["error"], seen["text"][:10]) == ("Aborted", f"('lost', {owner}"), seen
    assert seen["at"] - killed < 1.0


@pytest.mark.parametrize(
    ("owner", "then"),
    sampled([(0, flush), (1, synchronize_with_the_lock)], 1, name="no progress", others=pytest.mark.long),
)
@pytest.mark.parametrize(("number", "how"), [(signal.SIGSTOP, "is stopped: no heartbeat"), (0, "is alive but made no")])
def test_a_peer_without_progress_ends_the_run_though_no_host_waits_for_it(
    simulated_cuda: Path, owner: int, then: Callable[..., None], number: int, how: str
) -> None:
    with Stuck(simulated_cuda, then, owner=owner) as stuck:
        stopped = stuck.signal(number)
        seen = stuck.outcome()
    assert (seen["error"], seen["text"][:13]) == ("Aborted", f"('stalled', {owner}"), seen
    assert how in seen["text"]
    assert seen["at"] - stopped < LIMIT + 1.0


def test_a_peer_that_failed_frees_it_too(simulated_cuda: Path) -> None:
    deed = lambda end: end.member.fail("ZeroDivisionError: a loss of 0")  # noqa: E731
    with Stuck(simulated_cuda, synchronize_with_the_lock, deed=deed) as stuck:
        seen = stuck.outcome()
    assert "('failed', 0" in seen["text"]
    assert "ZeroDivisionError" in seen["text"]


@pytest.mark.parametrize("bug", sampled(["dropped-abort", "equal-wait"], 1, name="no release", others=pytest.mark.long))
def test_without_the_release_of_all_waits_it_would_hang(simulated_cuda: Path, bug: str) -> None:
    """Two seeded bugs, which the tests above catch."""
    with Stuck(simulated_cuda, synchronize_with_the_lock, settings=f"bug={bug}") as stuck:
        stuck.signal(signal.SIGKILL)
        assert stuck.outcome(seconds=1.5) == {"hung": True}


def test_a_release_that_a_late_peer_writes_over_is_repeated(simulated_cuda: Path) -> None:
    def write_over(end: End, tensor: torch.Tensor) -> int:
        end.simulator.synchronize(end.compute)  # freed once
        flag = end.simulator.waited  # the word that its stream waited for
        assert word(flag) == 1 << 62
        for value in range(3):
            ctypes.c_uint64.from_address(flag).value = value
            end.simulator.wait(end.compute, flag, value + 1)
            end.simulator.synchronize(end.compute)
        return word(flag)

    with Stuck(simulated_cuda, write_over) as stuck:
        stuck.signal(signal.SIGKILL)
        assert stuck.outcome(seconds=5)["result"] == 1 << 62


@pytest.mark.parametrize("dying", ["producer", "consumer"])
def test_what_cannot_be_mapped_since_its_owner_has_died_is_a_lost_rank(simulated_cuda: Path, dying: str) -> None:
    """The memory of a first message, or what is offered for the next ones: neither is mapped before it is needed."""
    control = _native.Control(2)
    traffic = Traffic(timeout=LIMIT)
    tells, told = os.pipe()
    waits, go = os.pipe()

    def die() -> None:
        end = End(simulated_cuda, control, 0, traffic)
        end.send(0) if dying == "producer" else end.receive(0)
        os.write(told, b"!")
        signal.pause()

    def live() -> None:
        end = End(simulated_cuda, control, 1, traffic)
        if dying == "consumer":
            end.send(0)
        os.read(waits, 1)
        end.receive(0) if dying == "producer" else end.sender.fits(form_of_all(end), 0)

    with Forked([die, live]) as forked:
        os.read(tells, 1)
        os.kill(forked.pids[0], signal.SIGKILL)
        os.waitid(os.P_PID, forked.pids[0], os.WEXITED | os.WNOWAIT)
        os.write(go, b"!")
        seen = forked.outcome(1)
    assert (seen["error"], seen["text"][:10]) == ("Aborted", "('lost', 0"), seen
    for pipe in (tells, told, waits, go):
        os.close(pipe)


def test_a_receive_that_only_the_rescue_has_ended_raises(simulated_cuda: Path) -> None:
    """On the legacy stream, where the simulator waits inside the call; what is in the slot then is nobody's."""
    control = _native.Control(2)
    traffic = Traffic(timeout=LIMIT)
    tells, told = os.pipe()

    def send() -> None:
        end = End(simulated_cuda, control, 0, traffic)
        grow(end)
        end.simulator.call("simulated_hold", end.compute, end.simulator.allocate(8), 1)
        send_one(end)
        os.write(told, b"!")
        signal.pause()

    def receive() -> None:
        end = End(simulated_cuda, control, 1, traffic)
        grow(end)
        receive_one(end, 0)

    with Forked([send, receive]) as forked:
        os.read(tells, 1)
        os.kill(forked.pids[0], signal.SIGKILL)
        assert forked.outcome(1)["error"] == "Aborted"
    os.close(tells)
    os.close(told)


def test_a_send_that_waits_does_not_hold_up_the_legacy_stream(simulated_cuda: Path) -> None:
    """On which torch computes: it must not wait for the send stream, which may wait for it."""

    def compute_behind_it(end: End, _: torch.Tensor) -> bool:
        send_one(end)
        end.simulator.write(0, end.own[0], 5)
        return end.control.aborted  # what would have freed it at last

    with Stuck(simulated_cuda, compute_behind_it) as stuck:
        assert stuck.outcome() | {"at": 0} == {"result": False, "at": 0}


def test_a_gpu_that_works_while_its_host_waits_makes_progress(simulated_cuda: Path) -> None:
    """Copies that together take longer than the limit, each of them less."""
    control = _native.Control(2)
    traffic = Traffic(messages=12, words=64, under_way=12, sources=12, timeout=LIMIT, settings="seed=1")
    bodies = [
        partial(_send_all, simulated_cuda, control, traffic),
        partial(_take_all, simulated_cuda, control, traffic),
    ]
    with Forked(bodies) as forked:
        sender, receiver = (forked.outcome(rank) for rank in range(2))
    assert sender["result"] > LIMIT, sender
    assert receiver["result"] == 0, receiver


def _send_all(library: Path, control: _native.Control, traffic: Traffic) -> float:
    end = End(library, control, 0, traffic)
    grow(end)
    end.simulator.set("delay", 120_000)
    begin = time.monotonic()
    for message in range(traffic.messages):
        send_one(end, 0, source=message, microbatch=message + 1)
    end.rank.flush()
    seconds = time.monotonic() - begin
    end.member.exchange(b"")
    end.member.leave()
    return seconds


def _take_all(library: Path, control: _native.Control, traffic: Traffic) -> int:
    end = End(library, control, 1, traffic)
    grow(end)
    end.member.exchange(b"")
    end.member.leave()
    return end.receiver.lent


def test_a_run_that_ended_leaves_in_time_and_frees_nothing_that_a_peer_may_use(simulated_cuda: Path) -> None:
    def leave(end: End, tensor: torch.Tensor) -> dict[str, Any]:
        del tensor
        while not end.control.aborted:
            time.sleep(0.001)
        begin = time.monotonic()
        end.sender.close()
        end.receiver.close()
        before = end.simulator.mappings
        del end.sender, end.receiver
        end.rank.free_retired()
        end.rank.close()
        end.member.leave()
        return {"seconds": time.monotonic() - begin, "kept": end.simulator.mappings == before,
                "violations": end.simulator.violations}  # fmt: skip

    with Stuck(simulated_cuda, leave) as stuck:
        stuck.signal(signal.SIGKILL)
        left = stuck.outcome()["result"]
    assert left["seconds"] < 0.5
    assert left["kept"]
    assert left["violations"] == []
