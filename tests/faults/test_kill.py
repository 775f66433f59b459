"""SIGKILL of any rank anywhere: within a second every other rank names it and what it was doing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import sampled

from pipex.errors import PeerLost
from pipex.transport.interface import Phase
from tests.faults.conftest import ALL_SCHEDULES, RANKS, STEPS, Aftermath, Place, expected, orders, sigkill

pytestmark = pytest.mark.timing

Run = Callable[..., Aftermath]


def assert_named(run: Run, schedule: str, victim: int, place: Place, **options: Any) -> None:
    aftermath = run(victim, place, sigkill, schedule=schedule, **options)
    assert aftermath.exits[victim] == -signal.SIGKILL
    aftermath.assert_all_name(PeerLost, expected(schedule, victim, place))


def covering(schedule: str) -> list[tuple[str, int, int]]:
    """The first action of every kind on every rank, and every rank's last action."""
    found: dict[tuple[int, str], int] = {}
    for rank, position, kind in orders(schedule):
        found.setdefault((rank, kind), position)
        found[rank, "last"] = position
    return [(schedule, rank, position) for (rank, _), position in found.items()]


COVERING = [case for schedule in ALL_SCHEDULES for case in covering(schedule)]


@pytest.mark.parametrize(
    ("schedule", "victim", "position"),
    sampled(COVERING, 2, name="kill, kinds", stratum=lambda case: case[:2], others=pytest.mark.long),
)
def test_at_every_kind_of_action(run: Run, schedule: str, victim: int, position: int) -> None:
    assert_named(run, schedule, victim, ("at", STEPS, position))


EVERY_ACTION = [(s, r, p, n) for s in ALL_SCHEDULES for r, p, _ in orders(s) for n in range(1, STEPS + 1)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("schedule", "victim", "position", "step"),
    sampled(EVERY_ACTION, 3, name="kill", stratum=lambda case: (case[0], case[1], case[3])),
)
def test_at_every_action(run: Run, schedule: str, victim: int, position: int, step: int) -> None:
    assert_named(run, schedule, victim, ("at", step, position))


OUTSIDE: list[Place] = [
    ("join",),
    ("factory",),
    ("at", 1, Phase.START),
    ("at", STEPS, Phase.REDUCE),
    ("at", STEPS, Phase.OPTIMIZER),
    ("optimizer", STEPS),
    ("between", 1),
    ("at", STEPS, Phase.SAVING),
    ("saving", STEPS),
    ("at", 0, Phase.CLOSING),
]
OF_ALL_RANKS = [(place, victim) for place in OUTSIDE for victim in range(RANKS)]


@pytest.mark.parametrize(
    ("place", "victim"),
    sampled(OF_ALL_RANKS, 1, name="kill outside", stratum=lambda case: case[0], others=pytest.mark.long),
    ids=str,
)
def test_outside_the_actions(run: Run, tmp_path: Path, victim: int, place: Place) -> None:
    checkpoint = tmp_path / "checkpoint"
    assert_named(run, "zb-h1", victim, place, checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("schedule", "victim", "place"),
    [
        ("1f1b", 0, ("forward", 2, 3)),
        ("1f1b", 2, ("backward", 2, 1)),
        ("zb-h1", 3, ("forward", 1, 0)),
        ("zb-h1", 1, ("backward", 2, 3)),
        ("zb-h1", 3, ("loss", 2, 2)),
    ],
    ids=str,
)
def test_in_the_middle_of_user_code(run: Run, schedule: str, victim: int, place: Place) -> None:
    assert_named(run, schedule, victim, place)


def test_the_checkpoint_before_a_killed_save_stays(run: Run, tmp_path: Path, boundaries: list[list[str]]) -> None:
    checkpoint = tmp_path / "checkpoint"
    assert run(0, ("nowhere",), sigkill, checkpoint=checkpoint).result == boundaries[STEPS]
    before = sorted(checkpoint.iterdir())
    assert_named(run, "zb-h1", 1, ("saving", STEPS), checkpoint=checkpoint)
    assert set(before) <= set(checkpoint.iterdir())
    assert run(0, ("nowhere",), sigkill, checkpoint=checkpoint).result == boundaries[STEPS]
    assert len(list(checkpoint.iterdir())) == len(before)


def test_the_next_run_starts_at_once(run: Run, boundaries: list[list[str]]) -> None:
    for victim in range(RANKS):
        assert_named(run, "zb-h1", victim, ("at", 2, 5))
        assert run(0, ("nowhere",), sigkill).result == boundaries[STEPS]
