"""An exception in user code on one rank: all others raise PeerFailed with its type and first line."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from cases import sampled

from pipex.errors import PeerFailed, PeerLost
from pipex.runtime.pipeline import Pipeline
from tests.faults.conftest import RANKS, Aftermath, Place, complain, expected, leave

pytestmark = pytest.mark.timing

Run = Callable[..., Aftermath]

EVERYWHERE = [
    (schedule, victim, place)
    for schedule, victims, place in [
        ("zb-h1", range(RANKS), ("factory",)),
        ("1f1b", range(RANKS), ("forward", 2, 1)),
        ("1f1b", range(RANKS), ("backward", 2, 2)),
        ("zb-h1", range(RANKS), ("backward", 1, 3)),
        ("zb-h1", [RANKS - 1], ("loss", 2, 0)),
        ("zb-h1", range(RANKS), ("optimizer", 1)),
    ]
    for victim in victims
]


@pytest.mark.parametrize(
    ("schedule", "victim", "place"),
    sampled(EVERYWHERE, 2, name="raise", stratum=lambda case: (case[0], case[2]), others=pytest.mark.long),
    ids=str,
)
def test_reaches_all_ranks(
    run: Run, capfd: pytest.CaptureFixture[str], schedule: str, victim: int, place: Place
) -> None:
    aftermath = run(victim, place, complain, schedule=schedule)
    aftermath.assert_all_name(PeerFailed, expected(schedule, victim, place))
    for text in [*(survivor["text"] for survivor in aftermath.survivors), str(aftermath.error)]:
        assert text.startswith(f"rank {victim} failed: ArithmeticError: the loss is not finite (")
        assert "micro-batch 3" not in text.partition("(")[0]
    assert aftermath.diaries[victim]["error"] == "ArithmeticError"
    assert "in complain\n    raise ArithmeticError" in capfd.readouterr().err  # the culprit's traceback


def test_a_rank_that_leaves_with_exit_code_0_is_lost(run: Run) -> None:
    aftermath = run(2, ("forward", 2, 3), leave)
    aftermath.exits[2] = signal.SIGKILL
    aftermath.assert_all_name(PeerLost, (2, 2, "2F3", 3))


def test_a_rank_without_reason_to_wait_learns_it_too(run: Run) -> None:
    """Rank 0 has handed over its last gradient long before; it is told at the end of the step."""
    aftermath = run(3, ("at", 2, -4), complain)
    aftermath.assert_all_name(PeerFailed, (2, None, "reduce", None))


def test_an_exception_that_the_program_catches_has_ended_the_run_all_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The culprit lives on and says nothing more; the others do not wait for its end."""
    monkeypatch.setattr("pipex.runtime.launch.GRACE", 0.5)

    class Lingering(Pipeline):
        def step(self, *batch: Any) -> float:
            try:
                return super().step(*batch)
            except ArithmeticError:
                threading.Event().wait()
                raise

    monkeypatch.setattr("pipex.Pipeline", Lingering)
    aftermath = run(1, ("forward", 2, 2), complain)
    aftermath.assert_all_name(PeerFailed, (2, 1, "1F2", 2))
    assert aftermath.exits[1] == -signal.SIGKILL


def test_a_rank_that_asks_to_end_has_failed(run: Run) -> None:
    aftermath = run(1, ("between", 1), lambda: exit_quietly())
    aftermath.assert_all_name(PeerFailed, (1, None, "idle", None))
    assert aftermath.survivors[0]["text"].startswith("rank 1 failed: SystemExit: 0")


def exit_quietly() -> None:
    raise SystemExit(0)
