"""Faults of ranks that exchange tensors through device memory, on the simulated driver: as named as over host memory.

Copies are slow here, so that a rank dies or stops with some of them under way and others behind them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import sampled

from pipex.errors import PeerFailed, PeerLost, PeerStalled
from pipex.transport.interface import Phase
from tests.faults.conftest import (
    RANKS,
    SCHEDULES,
    STEPS,
    Aftermath,
    Place,
    complain,
    expected,
    orders,
    sigkill,
    sigstop,
)  # fmt: skip

pytestmark = pytest.mark.timing

Run = Callable[..., Aftermath]
LIMIT = 1.5

PLACES: list[tuple[int, Place]] = [
    (1, ("join",)),
    (0, ("at", STEPS, 3)),
    (1, ("at", STEPS, 2)),
    (2, ("forward", 2, 1)),
    (3, ("backward", 1, 0)),
    (3, ("at", STEPS, Phase.REDUCE)),
    (0, ("at", STEPS, Phase.OPTIMIZER)),
    (2, ("at", 0, Phase.CLOSING)),
]


@pytest.fixture(autouse=True)
def _slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_CUDA", "seed=1,delay=3000,poison=1")


def test_without_a_fault_no_bit_is_lost(run: Run, simulated_cuda: Path, boundaries: list[list[str]]) -> None:
    aftermath = run(0, ("nowhere",), sigkill, library=simulated_cuda)
    assert aftermath.error is None
    assert aftermath.result == boundaries[STEPS]
    assert aftermath.exits == [0] * RANKS


@pytest.mark.parametrize(("victim", "place"), PLACES, ids=str)
def test_a_killed_rank_is_named_within_a_second(run: Run, simulated_cuda: Path, victim: int, place: Place) -> None:
    aftermath = run(victim, place, sigkill, library=simulated_cuda)
    assert aftermath.exits[victim] == -signal.SIGKILL
    aftermath.assert_all_name(PeerLost, expected("zb-h1", victim, place))


@pytest.mark.parametrize(
    ("victim", "place"),
    sampled(
        [(0, ("at", STEPS, 3)), (3, ("backward", 2, 3)), (1, ("between", 1))], 1,
        name="stop on devices", others=pytest.mark.long,
    ),
    ids=str,
)  # fmt: skip
def test_a_stopped_rank_is_named_after_the_limit(
    run: Run, monkeypatch: pytest.MonkeyPatch, simulated_cuda: Path, victim: int, place: Place
) -> None:
    monkeypatch.setattr("pipex.runtime.launch.GRACE", 0.5)  # the victim will not end by itself
    aftermath = run(victim, place, sigstop, timeout=LIMIT, library=simulated_cuda)
    aftermath.assert_all_name(PeerStalled, expected("zb-h1", victim, place), within=LIMIT + 0.8)
    for survivor in aftermath.survivors:
        assert "is stopped: no heartbeat for" in survivor["text"]


EVERY_ACTION = [(s, r, p) for s in SCHEDULES for r, p, _ in orders(s)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "victim", "position"),
    sampled(EVERY_ACTION, 3, name="kill on devices", stratum=lambda case: case[:2]),
)
def test_killed_at_every_action(run: Run, simulated_cuda: Path, schedule: str, victim: int, position: int) -> None:
    place = ("at", STEPS, position)
    aftermath = run(victim, place, sigkill, schedule=schedule, library=simulated_cuda)
    aftermath.assert_all_name(PeerLost, expected(schedule, victim, place))


def test_an_exception_reaches_every_rank(run: Run, simulated_cuda: Path) -> None:
    aftermath = run(2, ("forward", 2, 1), complain, library=simulated_cuda)
    aftermath.assert_all_name(PeerFailed, expected("zb-h1", 2, ("forward", 2, 1)))
    for survivor in aftermath.survivors:
        assert "ArithmeticError: the loss is not finite" in survivor["text"]
