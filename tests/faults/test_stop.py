"""A stopped or stuck rank is named by all others after the limit, whoever waits for whom; a short stop is no fault."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import sampled

from pipex.errors import PeerStalled
from tests.faults.conftest import MICROBATCHES, RANKS, STEPS, Aftermath, Place, expected, sigstop

pytestmark = pytest.mark.timing

Run = Callable[..., Aftermath]
LIMIT = 1.0
STOP_SECONDS = 0.5


def hang() -> None:
    threading.Event().wait()


STOPPED = "is stopped: no heartbeat for"
STOPS = [
    # Rank 3 waits for 2, 2 for 1, 1 for 0.
    pytest.param(0, ("at", 2, 0), sigstop, STOPPED, id="first"),
    # Rank 0 waits for 1, 1 for 2, 2 for 3.
    pytest.param(3, ("backward", 2, MICROBATCHES - 1), sigstop, STOPPED, id="last"),
    pytest.param(1, ("between", 1), sigstop, STOPPED, id="between steps"),
    pytest.param(2, ("forward", 2, 1), hang, "is alive but made no progress for 1.0 s", id="hangs"),
]


@pytest.mark.parametrize(
    ("victim", "place", "deed", "state"),
    sampled(STOPS, 1, name="stop", stratum=lambda case: case.values[2], others=pytest.mark.long),
)
def test_is_named_though_the_others_wait_for_each_other(
    run: Run, monkeypatch: pytest.MonkeyPatch, victim: int, place: Place, deed: Callable[[], None], state: str
) -> None:
    monkeypatch.setattr(
        "pipex.runtime.launch.GRACE", 1000.0
    )  # the victim will not end by itself, and need not be awaited
    aftermath = run(victim, place, deed, timeout=LIMIT)
    aftermath.assert_all_name(PeerStalled, expected("zb-h1", victim, place), within=LIMIT + 0.5)
    for survivor in aftermath.survivors:
        assert state in survivor["text"]
        assert survivor["at"] - aftermath.diaries[victim]["deed"] > LIMIT
    assert aftermath.exits[victim] == -signal.SIGKILL


@pytest.mark.parametrize(("victim", "place"), [(2, ("forward", 2, 1)), (0, ("optimizer", 1))], ids=str)
def test_a_stop_shorter_than_the_limit_changes_no_bit(
    run: Run, boundaries: list[list[str]], victim: int, place: Place
) -> None:
    aftermath = run(victim, place, pause, timeout=60.0)
    assert aftermath.error is None
    assert aftermath.result == boundaries[STEPS]
    assert aftermath.exits == [0] * RANKS
    assert "deed" in aftermath.diaries[victim]


def pause() -> None:
    """Stops this process; a child of it sees that and sends SIGCONT some time later."""
    stopped = os.getpid()
    child = os.fork()
    if child == 0:
        while Path(f"/proc/{stopped}/stat").read_text().rpartition(") ")[2][0] != "T":
            os.sched_yield()
        time.sleep(STOP_SECONDS)
        os.kill(stopped, signal.SIGCONT)
        os._exit(0)
    sigstop()
    os.waitpid(child, 0)
