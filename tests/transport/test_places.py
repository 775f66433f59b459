"""What published positions mean, where several plans share a world."""

from __future__ import annotations

import pytest
from orders import forwards

from pipex.errors import PeerError, PeerFailed, PeerLost, PeerStalled
from pipex.plan import build, communicate
from pipex.transport.interface import Phase
from pipex.transport.places import Places


def name(error: PeerError) -> tuple[str | None, int | None, int | None]:
    return error.action, error.stage, error.microbatch


def test_every_position_of_every_plan_is_its_action() -> None:
    places = Places()
    plans = [build("zb-h1", 2, 8), build("gpipe", 2, 2), build("interleaved", 2, 4), build("zb-h1", 2, 3)]
    firsts = [places.add(plan.digest, communicate(plan)) for plan in plans]
    for plan, first in zip(plans, firsts, strict=True):
        for rank, order in enumerate(communicate(plan)):
            for position, action in enumerate(order, first):
                error = places.error("failed", "ValueError", rank, 1, position)
                assert name(error) == (str(action), action.stage, action.microbatch)


def test_a_plan_that_is_opened_again_keeps_its_positions() -> None:
    places, plan, other = Places(), build("1f1b", 2, 2), build("gpipe", 2, 2)
    first = places.add(plan.digest, communicate(plan))
    second = places.add(other.digest, communicate(other))
    assert places.add(plan.digest, communicate(plan)) == first != second
    assert places.add(other.digest, communicate(other)) == second


def test_what_has_no_name_is_left_out() -> None:
    places = Places()
    first = places.add(b"a", [*forwards(1, 3), [], *forwards(1, 2)])
    assert name(places.error("lost", "is gone", 0, 1, first + 2)) == ("0F2", 0, 2)
    for rank, position in [(0, first + 3), (1, first), (2, first + 2), (3, first), (0, None)]:
        error = places.error("lost", "is gone", rank, 1, position)
        assert (name(error), str(error)) == ((None, None, None), f"rank {rank} is gone (step 1)")


@pytest.mark.parametrize("phase", Phase)
def test_a_phase_is_named_whatever_is_open(phase: Phase) -> None:
    assert Places().error("stalled", "is alive", 2, 0, phase).action == phase.name.lower()


def test_each_ending_has_its_error() -> None:
    endings = {"lost": PeerLost, "stalled": PeerStalled, "failed": PeerFailed}
    for ending, kind in endings.items():
        assert type(Places().error(ending, "text", 0, None, None)) is kind  # type: ignore[arg-type]
