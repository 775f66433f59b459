"""One rank fails, in any way: every other rank raises the same error, naming it, within a second."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from orders import forwards
from torch.distributed import TCPStore

from pipex.transport.group import GroupWorld
from pipex.transport.group.watch import EVERYBODY, Answer, culprit
from pipex.transport.interface import EdgeSpec

pytestmark = pytest.mark.timing

CHAIN = [EdgeSpec(s, s + 1, "activation", s, s + 1, 1, 1) for s in range(3)]
RANKS = 4


def wait_down_the_chain(world: GroupWorld) -> None:
    """Every rank waits for the one before it, rank 0 for all in an exchange."""
    links = world.open(CHAIN, bytes(16), forwards(RANKS))
    if world.rank == 0:
        world.exchange(b"")
    else:
        links.receivers[world.rank - 1, world.rank, "activation"].receive(1, 0)


def until_verdict(world: GroupWorld) -> None:
    """Stands for long computing: returns when the verdict is there, and talks to nobody."""
    assert world._watch._decided.wait(30.0)


def all_waiting(path: Path) -> None:
    """Returns when every rank has left a file; what it does next, it does at once."""
    while len(list(path.glob("waiting*"))) < RANKS:
        time.sleep(0.005)


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_killed_rank_is_named_by_all_others(start: Callable[..., Any], tmp_path: Path, victim: int) -> None:
    def body(world: GroupWorld) -> None:
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank == victim:
            threading.Event().wait()
        wait_down_the_chain(world)

    ranks = start(body, RANKS)
    all_waiting(tmp_path)
    killed = ranks.kill(victim)
    outcomes = ranks.outcomes()
    assert outcomes[victim].exit_code == -signal.SIGKILL
    for outcome in (outcome for rank, outcome in enumerate(outcomes) if rank != victim):
        assert (outcome.error, outcome.place[0], outcome.exit_code) == ("PeerLost", victim, 0)
        assert outcome.at - killed < 1.0
    assert len({outcome.text for rank, outcome in enumerate(outcomes) if rank != victim}) == 1


@pytest.mark.parametrize("victim", range(RANKS))
def test_an_exception_reaches_all_ranks_with_its_place(start: Callable[..., Any], tmp_path: Path, victim: int) -> None:
    def body(world: GroupWorld) -> None:
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank != victim:
            return wait_down_the_chain(world)
        world.open(CHAIN, bytes(16), forwards(RANKS))
        world.at(3, 7)
        all_waiting(tmp_path)
        raise ValueError("the loss is not finite\nsecond line")

    outcomes = start(body, RANKS).outcomes()
    assert (outcomes[victim].error, outcomes[victim].text) == ("ValueError", "the loss is not finite\nsecond line")
    for outcome in (outcome for rank, outcome in enumerate(outcomes) if rank != victim):
        assert outcome.error == "PeerFailed"
        assert outcome.place == (victim, 3, victim, f"{victim}F7", 7)
        assert f"rank {victim} failed: ValueError: the loss is not finite (step 3" in outcome.text
        assert outcome.at - outcomes[victim].at < 1.0


def test_a_rank_that_waits_for_nobody_learns_it_at_its_next_call(start: Callable[..., Any], tmp_path: Path) -> None:
    def body(world: GroupWorld) -> None:
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank == 0:
            all_waiting(tmp_path)
            raise KeyError("missing")
        until_verdict(world)
        world.exchange(b"")

    for outcome in start(body, RANKS).outcomes()[1:]:
        assert (outcome.error, outcome.place[0]) == ("PeerFailed", 0)


def test_a_killed_rank_is_noticed_though_nobody_waits_for_anybody(start: Callable[..., Any], tmp_path: Path) -> None:
    def body(world: GroupWorld) -> None:
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank == 2:
            threading.Event().wait()
        until_verdict(world)
        world.exchange(b"")

    ranks = start(body, RANKS)
    all_waiting(tmp_path)
    killed = ranks.kill(2)
    for outcome in (outcome for rank, outcome in enumerate(ranks.outcomes()) if rank != 2):
        assert (outcome.error, outcome.place[0]) == ("PeerLost", 2)
        assert outcome.at - killed < 1.0


def test_of_several_failures_one_is_named_by_all(start: Callable[..., Any], tmp_path: Path) -> None:
    def body(world: GroupWorld) -> None:
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank in (1, 3):
            all_waiting(tmp_path)
            raise ValueError(f"from rank {world.rank}")
        wait_down_the_chain(world)

    outcomes = start(body, RANKS).outcomes()
    assert [outcomes[rank].error for rank in (1, 3)] == ["ValueError"] * 2
    assert outcomes[0].error == outcomes[2].error == "PeerFailed"
    assert outcomes[0].text == outcomes[2].text


def test_a_stopped_process_is_named_through_the_chain_of_waits(start: Callable[..., Any], tmp_path: Path) -> None:
    def body(world: GroupWorld) -> None:
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        wait_down_the_chain(world)

    for outcome in start(body, RANKS, timeout=1.0).outcomes(skip=(0,))[1:]:
        assert (outcome.error, outcome.place[0]) == ("PeerStalled", 0)
        assert "is stopped: no answer within 0.5 s" in outcome.text


def test_a_rank_without_progress_is_named_with_what_it_does(start: Callable[..., Any], tmp_path: Path) -> None:
    def body(world: GroupWorld) -> None:
        if world.rank == 0:
            world.open(CHAIN, bytes(16), forwards(RANKS))
            world.at(2, 5)
            until_verdict(world)
        wait_down_the_chain(world)

    for outcome in start(body, RANKS, timeout=1.0).outcomes():
        assert (outcome.error, outcome.place) == ("PeerStalled", (0, 2, 0, "0F5", 5))
        assert "is alive but made no progress for 1.0 s" in outcome.text


def test_a_rank_that_is_killed_behind_a_message_under_way_is_named(start: Callable[..., Any], tmp_path: Path) -> None:
    """What the receiver waits for is the body, which goes only when the head has been read."""

    def body(world: GroupWorld) -> None:
        links = world.open(CHAIN, bytes(16), forwards(RANKS))
        if world.rank == 0:
            links.senders[0, 1, "activation"].send(1, 0, [torch.zeros(16 << 20)])
        world.exchange(b"")
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank == 0:
            threading.Event().wait()
        time.sleep(0.5)  # until the test has killed it
        links.receivers[world.rank - 1, world.rank, "activation"].receive(1, 0)

    ranks = start(body, RANKS)
    all_waiting(tmp_path)
    ranks.kill(0)
    for outcome in ranks.outcomes()[1:]:
        assert (outcome.error, outcome.place[0], outcome.exit_code) == ("PeerLost", 0, 0)


def test_a_rank_that_sends_a_head_and_no_body_is_named(start: Callable[..., Any], tmp_path: Path) -> None:
    def body(world: GroupWorld) -> None:
        links = world.open(CHAIN, bytes(16), forwards(RANKS))
        if world.rank == 0:
            sender: Any = links.senders[0, 1, "activation"]
            sender._lane = replace(sender._lane, payload_peer=2)  # where nobody receives it
            sender.send(1, 0, [torch.zeros(100)])
            world.at(1, 5)
            until_verdict(world)
        else:
            links.receivers[world.rank - 1, world.rank, "activation"].receive(1, 0)
        world.exchange(b"")

    for outcome in start(body, RANKS, timeout=1.0).outcomes():
        assert (outcome.error, outcome.place) == ("PeerStalled", (0, 1, 0, "0F5", 5))
        assert "waited for activation edge" in outcome.text


def test_a_rank_that_never_joins_is_named(start: Callable[..., Any]) -> None:
    def body(world: GroupWorld) -> None:
        raise AssertionError("joined without rank 2")

    for outcome in start(body, 3, timeout=1.0, absent=1).outcomes():
        assert (outcome.error, outcome.place[0], outcome.place[3]) == ("PeerStalled", 2, None)
        assert "has not joined within 1.0 s" in outcome.text
        assert "all ranks to join" in outcome.text


def test_a_rank_that_is_killed_while_others_leave_is_named(start: Callable[..., Any], tmp_path: Path) -> None:
    def body(world: GroupWorld) -> None:
        (tmp_path / f"waiting{world.rank}").touch()
        if world.rank == 3:
            threading.Event().wait()

    ranks = start(body, RANKS)
    all_waiting(tmp_path)
    ranks.kill(3)
    for outcome in ranks.outcomes()[:3]:
        assert (outcome.error, outcome.place[0]) == ("PeerLost", 3)


def test_rank_0_is_named_when_it_takes_the_store_along(start: Callable[..., Any], tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        def body(outer: GroupWorld) -> None:
            hosts = {"is_master": True, "master_listen_fd": os.dup(listener.fileno())} if outer.rank == 0 else {}
            listener.close()
            store = TCPStore("127.0.0.1", port, wait_for_workers=False, **hosts)  # type: ignore[arg-type]
            world = GroupWorld(store, outer.rank, RANKS, timeout=30.0)
            (tmp_path / f"waiting{world.rank}").touch()
            if world.rank == 0:
                threading.Event().wait()
            try:
                wait_down_the_chain(world)
            except Exception as error:
                world.fail(error)
                raise

        ranks = start(body, RANKS)
    all_waiting(tmp_path)
    killed = ranks.kill(0)
    for outcome in ranks.outcomes()[1:]:
        assert (outcome.error, outcome.place[0]) == ("PeerLost", 0)
        assert outcome.at - killed < 1.0


def waits(peer: int | None) -> Answer:
    return Answer(peer, 1, 0)


BUSY, ALL = waits(None), waits(EVERYBODY)


@pytest.mark.parametrize(
    ("peer", "answers", "expected", "circle"),
    [
        (0, [BUSY, waits(0), waits(1), waits(2)], 0, []),
        (2, [BUSY, waits(0), waits(1), waits(2)], 0, []),
        (2, [BUSY, None, waits(1), waits(2)], 1, []),
        (0, [waits(1), None], 1, []),
        (EVERYBODY, [ALL, ALL, None, ALL], 2, []),
        (EVERYBODY, [ALL, BUSY, ALL, waits(1)], 1, []),
        (2, [ALL, waits(0), waits(1), None], 3, []),
        (EVERYBODY, [ALL, ALL], 0, []),
        (0, [waits(1), waits(0)], 0, [0, 1]),
        (1, [waits(1), waits(0)], 0, [0, 1]),
        (1, [waits(2), waits(0), waits(1)], 0, [0, 2, 1]),
        (0, [waits(1), waits(2), waits(1)], 1, [1, 2]),  # a circle that rank 0 only waits for
        (1, [waits(1), waits(2), waits(3), waits(2)], 2, [2, 3]),
        (3, [waits(1), waits(2), waits(3), waits(2)], 2, [2, 3]),
    ],
)
def test_the_culprit_of_a_stall_is_at_the_end_of_the_chain_or_first_in_its_circle(
    peer: int, answers: list[Answer | None], expected: int, circle: list[int]
) -> None:
    assert culprit(peer, answers) == (expected, circle)
