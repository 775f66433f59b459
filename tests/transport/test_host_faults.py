"""What ranks of one host see when one of them dies, raises, or stops. Ranks are forked processes."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from orders import forwards

from pipex.errors import OutOfSharedMemory, PeerFailed, PeerLost, PeerStalled
from pipex.transport.host import HostRun, HostWorld
from pipex.transport.interface import EdgeSpec, Phase

pytestmark = pytest.mark.timing

Body = Callable[[HostWorld], Any]


def ring_of(ranks: int) -> list[EdgeSpec]:
    """Every rank sends to the next one."""
    return [EdgeSpec(r, r + 1, "activation", r, (r + 1) % ranks, 1, 1) for r in range(ranks)]


def receive_from(world: HostWorld, ranks: int) -> None:
    """Waits for a message of the rank before this one, which never comes."""
    links = world.open(ring_of(ranks), bytes(16), forwards(ranks))
    world.at(3, world.rank)
    (receiver,) = links.receivers.values()
    receiver.receive(3, 0)


def rank_main(run: HostRun, rank: int, body: Body, timeout: float) -> Any:
    world = run.join(rank, timeout=timeout)
    try:
        return body(world)
    except BaseException as error:
        world.fail(error)
        raise


class Ranks(Forked):
    """Forked ranks of one run; all are gone when the block ends."""

    def __init__(self, bodies: list[Body], *, timeout: float = 20.0) -> None:
        self.run = HostRun.create(len(bodies))
        super().__init__([partial(rank_main, self.run, rank, body, timeout) for rank, body in enumerate(bodies)])

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.run.close()


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_named_by_all_others_within_a_second(victim: int) -> None:
    def die_at(world: HostWorld) -> float:
        world.open(ring_of(3), bytes(16), forwards(3))
        world.at(3, 5)
        os.write(told, json.dumps(time.monotonic()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    tells, told = os.pipe()
    bodies: list[Body] = [die_at if r == victim else lambda world: receive_from(world, 3) for r in range(3)]
    with Ranks(bodies) as ranks:
        seen = [ranks.outcome(rank) for rank in range(3) if rank != victim]
        killed = json.loads(os.read(tells, 100))
    os.close(tells)
    os.close(told)
    for report in seen:
        assert report["error"] == PeerLost.__name__, report
        assert report["at"] - killed < 1.0
        assert (report["rank"], report["step"], report["action"]) == (victim, 3, f"{victim}F5")
        assert (report["stage"], report["microbatch"]) == (victim, 5)
        assert f"rank {victim} is gone" in report["text"]


def test_a_rank_killed_in_set_up_is_named_with_its_phase() -> None:
    def die_early(world: HostWorld) -> None:
        world.at(0, Phase.SETUP)
        os.kill(os.getpid(), signal.SIGKILL)

    with Ranks([lambda world: world.open([], bytes(16)) and None, die_early]) as ranks:
        report = ranks.outcome(0)
    assert (report["error"], report["rank"], report["action"]) == ("PeerLost", 1, "setup")
    assert report["step"] is None


def test_a_rank_that_exits_without_leaving_is_lost_even_with_exit_code_0() -> None:
    with Ranks([lambda world: world.exchange(b"") and None, lambda _: os._exit(0)]) as ranks:
        assert ranks.outcome(0)["error"] == "PeerLost"


def test_the_launcher_tells_of_a_rank_that_never_joined() -> None:
    run = HostRun.create(2)
    world = run.join(0, timeout=20)
    run.lost(1, "killed by SIGKILL")
    run.lost(0, "also")
    with pytest.raises(PeerLost, match="rank 1 is gone: killed by SIGKILL"):
        world.exchange(b"")
    world.close()


def test_an_exception_reaches_every_rank_with_its_type_and_first_line() -> None:
    def fail(world: HostWorld) -> None:
        world.open(ring_of(4), bytes(16))
        world.at(7, Phase.OPTIMIZER)
        raise ZeroDivisionError("a loss of 0\nwith more lines")

    with Ranks([fail if rank == 2 else lambda world: receive_from(world, 4) for rank in range(4)]) as ranks:
        for rank in (0, 1, 3):
            report = ranks.outcome(rank)
            assert (report["error"], report["rank"]) == (PeerFailed.__name__, 2)
            assert report["text"] == "rank 2 failed: ZeroDivisionError: a loss of 0 (step 7, action optimizer)"


def test_the_first_failure_wins_when_all_ranks_fail_at_once() -> None:
    def fail(world: HostWorld) -> None:
        world.open([], bytes(16))
        world.fail(RuntimeError(f"of rank {world.rank}"))
        world.exchange(b"")

    with Ranks([fail] * 5) as ranks:
        reports = [ranks.outcome(rank) for rank in range(5)]
    assert {report["error"] for report in reports} == {PeerFailed.__name__}
    assert len({report["text"] for report in reports}) == 1


def test_a_rank_without_progress_is_named_through_a_chain_of_waits() -> None:
    def stop(world: HostWorld) -> None:
        world.open(ring_of(4), bytes(16), forwards(4))
        world.at(3, 2)
        signal.pause()

    with Ranks(
        [stop if rank == 0 else lambda world: receive_from(world, 4) for rank in range(4)], timeout=0.5
    ) as ranks:
        for rank in (1, 2, 3):
            report = ranks.outcome(rank)
            assert (report["error"], report["rank"], report["action"]) == (PeerStalled.__name__, 0, "0F2")
            assert "alive but made no progress for 0.5 s" in report["text"]


def test_a_stopped_process_is_told_from_a_busy_one() -> None:
    def stop(world: HostWorld) -> None:
        world.open(ring_of(2), bytes(16))
        os.kill(os.getpid(), signal.SIGSTOP)

    with Ranks([stop, lambda world: receive_from(world, 2)], timeout=1.5) as ranks:
        report = ranks.outcome(1)
    assert (report["error"], report["rank"]) == (PeerStalled.__name__, 0)
    assert "is stopped: no heartbeat" in report["text"]


def test_ranks_that_wait_for_each_other_name_the_circle() -> None:
    with Ranks([lambda world: receive_from(world, 3)] * 3, timeout=0.4) as ranks:
        reports = [ranks.outcome(rank) for rank in range(3)]
    for report in reports:
        assert (report["error"], report["rank"]) == (PeerStalled.__name__, 0)
        assert "0 → 2 → 1 → 0" in report["text"]


def test_progress_of_the_awaited_rank_keeps_a_wait_alive() -> None:
    def work(world: HostWorld) -> None:
        links = world.open(ring_of(2), bytes(16))
        end = time.monotonic() + 1.2
        position = 0
        while time.monotonic() < end:
            world.at(3, position := position + 1)
        links.senders[0, 1, "activation"].send(3, 0, [torch.zeros(256)])
        world.close()

    def wait(world: HostWorld) -> None:
        receive_from(world, 2)
        world.close()

    with Ranks([work, wait], timeout=0.4) as ranks:
        assert [ranks.outcome(rank)["result"] for rank in range(2)] == [None, None]


def test_ctrl_c_ends_a_wait() -> None:
    def wait(world: HostWorld) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
        os.write(told, b"!")
        world.exchange(b"")

    tells, told = os.pipe()
    with Ranks([wait, lambda _: signal.pause()], timeout=1000) as ranks:
        os.read(tells, 1)
        os.kill(ranks.pids[0], signal.SIGINT)
        assert ranks.outcome(0)["error"] == "KeyboardInterrupt"
    os.close(tells)
    os.close(told)


def test_a_process_that_inherits_nothing_opens_the_run_by_its_address() -> None:
    def open_by_address(world: HostWorld) -> int:
        (address, _) = world.exchange(b"")
        run = HostRun.open(address)
        world.exchange(b"")
        return run.ranks

    def offer(world: HostWorld) -> None:
        run = HostRun.create(7)
        world.exchange(run.address)
        world.exchange(b"")

    with Ranks([offer, open_by_address]) as ranks:
        assert ranks.outcome(1)["result"] == 7


def test_too_little_memory_for_a_message_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    size = 1 << 42

    def send_huge(world: HostWorld) -> None:
        links = world.open(ring_of(2)[:1], bytes(16))
        (sender,) = links.senders.values()
        sender.send(1, 0, [torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.uint8)])

    def wait(world: HostWorld) -> None:
        links = world.open(ring_of(2)[:1], bytes(16))
        (receiver,) = links.receivers.values()
        receiver.receive(1, 0)

    with Ranks([send_huge, wait]) as ranks:
        owner, other = ranks.outcome(0), ranks.outcome(1)
    assert owner["error"] == OutOfSharedMemory.__name__
    assert f"needed {size}"[:12] in owner["text"]  # and some for headers
    assert (other["error"], other["rank"]) == (PeerFailed.__name__, 0)


def test_a_first_message_of_a_rank_that_died_since_names_that_rank() -> None:
    def send_and_die(world: HostWorld) -> None:
        links = world.open(ring_of(2)[:1], bytes(16))
        links.senders[0, 1, "activation"].send(1, 0, [torch.zeros(256)])  # into memory that its receiver has not mapped
        os.kill(os.getpid(), signal.SIGKILL)

    def receive_late(world: HostWorld) -> None:
        links = world.open(ring_of(2)[:1], bytes(16))
        time.sleep(0.3)
        links.receivers[0, 1, "activation"].receive(1, 0)

    with Ranks([send_and_die, receive_late]) as ranks:
        survivor = ranks.outcome(1)
    assert (survivor["error"], survivor["rank"]) == (PeerLost.__name__, 0)


def test_a_forked_child_does_not_give_its_parents_tensors_back() -> None:
    def consumer(world: HostWorld) -> None:
        links = world.open(ring_of(2)[:1], bytes(16))
        (receiver,) = links.receivers.values()
        held = list(receiver.receive(1, 0))
        pid = os.fork()
        if pid == 0:  # such as a data loader's worker
            held.clear()
            os._exit(0)
        os.waitpid(pid, 0)
        world.exchange(b"")
        for microbatch in range(1, 9):
            receiver.receive(1, microbatch)
        assert torch.equal(held[0], torch.zeros(256))
        world.close()

    def producer(world: HostWorld) -> None:
        links = world.open(ring_of(2)[:1], bytes(16))
        (sender,) = links.senders.values()
        sender.send(1, 0, [torch.zeros(256)])
        world.exchange(b"")
        for microbatch in range(1, 9):
            sender.send(1, microbatch, [torch.full((256,), float(microbatch))])
        world.close()

    with Ranks([producer, consumer]) as ranks:
        assert [ranks.outcome(rank)["result"] for rank in range(2)] == [None, None]
