"""Device rings between two processes, on the simulated driver."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cases import sampled
from device_ring import WELL, Traffic, converse
from forked import outcomes

from pipex import _native


def exchange(library: Path, traffic: Traffic) -> list[dict[str, Any]]:
    control = _native.Control(2)
    bodies = [partial(converse, library, control, rank, traffic) for rank in range(2)]
    return outcomes(bodies, seconds=30 + 2 * traffic.timeout)  # who waits for ever says first for whom


def assert_all_well(library: Path, traffic: Traffic) -> list[dict[str, Any]]:
    """What both ranks say of how their messages went."""
    seen = exchange(library, traffic)
    for outcome in seen:
        assert outcome.get("result", {}).items() >= WELL.items(), outcome
    return [outcome["result"] for outcome in seen]


@pytest.mark.parametrize("queues", range(1, 9))
def test_messages_cross_whole_and_in_order_on_any_number_of_hardware_queues(simulated_cuda: Path, queues: int) -> None:
    settings = f"seed={queues},queues={queues},shared=1,delay=200,poison=1"
    assert_all_well(simulated_cuda, Traffic(seed=queues, settings=settings))


@pytest.mark.parametrize(("under_way", "alive", "keep"), [(1, 1, 1), (1, 1, 4), (4, 2, 3), (3, 5, 0)])
def test_any_number_of_slots_and_of_kept_tensors(simulated_cuda: Path, under_way: int, alive: int, keep: int) -> None:
    traffic = Traffic(under_way=under_way, alive=alive, keep=keep, settings="seed=5,delay=200,poison=1")
    assert_all_well(simulated_cuda, traffic)


def growing(seed: int, **more: Any) -> Traffic:
    """Messages of several tensors, ever larger ones and smaller ones between them; more are kept than planned."""
    settings = f"seed={seed},queues={1 + seed % 8},shared={seed % 2},delay=200,poison=1"
    return Traffic(words=4096, tensors=5, varied=True, under_way=1 + seed % 3, alive=1 + seed % 2, keep=4, seed=seed,
                   settings=settings, **more)  # fmt: skip


@pytest.mark.parametrize("seed", sampled(range(64), 8, name="growing edges"))
def test_edges_grow_in_the_middle_of_traffic(simulated_cuda: Path, seed: int) -> None:
    for rank in assert_all_well(simulated_cuda, growing(seed)):
        assert rank["grown"] > 1
        assert rank["on device"] > 10


@pytest.mark.long
@pytest.mark.parametrize("seed", sampled(range(100), 10, name="device ring"))
def test_messages_cross_at_length(simulated_cuda: Path, seed: int) -> None:
    """Random sizes, slots and queues; 400 messages each way."""
    chance = random.Random(seed)
    assert_all_well(simulated_cuda, Traffic(
        messages=400, words=chance.choice([1, 7, 512, 20_000]), under_way=chance.randint(1, 4),
        alive=chance.randint(1, 4), sources=chance.randint(1, 6), keep=chance.randint(0, 5), seed=seed, timeout=60.0,
        settings=f"seed={seed},queues={chance.randint(1, 8)},shared={seed % 2},delay={chance.choice([50, 300, 1000])},"
                 "poison=1", varied=chance.random() < 0.5, tensors=chance.randint(1, 5),
    ))  # fmt: skip


CORRUPT, STALL = "wrong words arrive", "the run stalls"

SEEDED = {
    "dropped-data-wait": CORRUPT,
    "dropped-credit-wait": CORRUPT,
    "dropped-computed-wait": CORRUPT,
    "flag-without-generation": CORRUPT,
    "stale-lap": CORRUPT,
    "flag-before-data": CORRUPT,
    "unordered": CORRUPT,
    "wrong-slot": CORRUPT,
    "short-copy": CORRUPT,
    "early-release": CORRUPT,
    "source-free-at-once": CORRUPT,
    "dropped-release": STALL,
    "late-enqueue": STALL,
}


@pytest.mark.parametrize("bug", SEEDED)
def test_a_seeded_bug_of_the_protocol_is_caught(simulated_cuda: Path, bug: str) -> None:
    """The same traffic that is all well without the bug. Slow copies and checks leave every early operation time."""
    traffic = Traffic(settings="seed=7,delay=300,poison=1")
    if bug == "late-enqueue":  # shows only where waits and what they wait for share a queue
        traffic.settings += ",queues=1,shared=1"
    if bug == "source-free-at-once":  # nothing else may keep the source from being filled again
        traffic.sources, traffic.both_ways = 1, False
    assert_all_well(simulated_cuda, traffic)
    traffic.settings += f",bug={bug}"
    if SEEDED[bug] == STALL:
        traffic.timeout = 1.0
    seen = exchange(simulated_cuda, traffic)
    if SEEDED[bug] == CORRUPT:
        assert sum(outcome["result"]["mismatches"] for outcome in seen) > 0, seen
    else:
        assert all(outcome["error"] == "Aborted" and "stalled" in outcome["text"] for outcome in seen), seen
