"""Tensors through device memory between processes that share a GPU; all of it runs on the simulated driver, too.

What ranks do, and what it would mean if an assertion failed, stands in tests/support (transport_bodies, fault_bodies).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from fault_bodies import FATES, read, send_more_than_there_is, stand_still
from transport_bodies import BODIES, run_bodies

from pipex.errors import PeerError, PeerFailed, PeerLost, PeerStalled
from tests.gpu.conftest import Site

STALLED = 1.5  # seconds without progress
SPARE = 8 << 20  # bytes that come and go on a GPU without anybody's doing


@dataclass
class Ended:
    """How a body ended: "" if well; and what it noted, its time first."""

    problem: str
    note: str = ""


@pytest.fixture(scope="module")
def outcomes(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Of all bodies. They run in one launch; after one that fails, the rest run in another."""
    notes = tmp_path_factory.mktemp("notes")
    left, ended, failures = list(BODIES), {}, 0
    while left and failures < 4:
        problem = ""
        try:
            misuses = site.launch(run_bodies, 2, args=(left, str(notes), site.simulator), limit=100.0)
            problem = "\n".join(what for rank in misuses for what in rank)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        while left and all((notes / f"{left[0]}.{rank}").exists() for rank in range(2)):
            body = left.pop(0)
            ended[body] = Ended("", (notes / f"{body}.0").read_text())
        if not left and problem:
            ended[body] = Ended(problem)  # it shows at the end only: nobody knows which body it was
        elif left:
            failed = [path.read_text()[-1500:] for path in sorted(notes.glob(f"{left[0]}.*.failed"))]
            ended[left.pop(0)] = Ended("\n".join([problem, *failed]))
            failures += 1
    return ended | {body: Ended("not run: too many others have failed") for body in left}


@pytest.mark.parametrize("body", BODIES)
def test_two_ranks(outcomes: dict[str, Ended], body: str, record_property: Callable[[str, object], None]) -> None:
    record_property("note", outcomes[body].note)
    assert outcomes[body].problem == ""


@pytest.mark.parametrize(
    ("bug", "body"),
    [
        ("dropped-data-wait", "messages_on_the_default_stream_are_neither_stale_nor_torn"),
        ("dropped-credit-wait", "messages_on_a_side_stream_are_neither_stale_nor_torn"),
        ("early-release", "messages_are_right_while_streams_change"),
        ("flag-before-data", "messages_are_right_while_streams_change"),
        ("dropped-computed-wait", "messages_on_a_side_stream_are_neither_stale_nor_torn"),
        ("short-copy", "payloads_of_every_dtype_and_size_arrive"),
        ("wrong-slot", "tensors_that_autograd_saved_stay_right"),
    ],
)
def test_a_transport_with_a_bug_does_not_pass(
    simulated_cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str, body: str
) -> None:
    monkeypatch.setenv("SIMULATED_CUDA", f"bug={bug},delay=300,poison=1")
    with pytest.raises(
        PeerError, match=r"AssertionError|is gone"
    ):  # the simulator's device memory is the process's own
        Site(str(simulated_cuda)).launch(run_bodies, 2, args=([body], str(tmp_path), str(simulated_cuda)))


class Aftermath:
    """What was left of a run whose rank 1 has met its fate."""

    def __init__(self, site: Site, fate: str, notes: Path) -> None:
        before = site.free_memory()
        self.error: BaseException | None = None
        with pytest.MonkeyPatch.context() as patch:
            if fate == "stopped" and site.simulator is not None:
                patch.setattr("pipex.runtime.launch.GRACE", 1.0)  # it will not end by itself
            try:
                site.launch(stand_still, 3, args=(fate, str(notes), site.simulator), timeout=STALLED)
            except (PeerError, TimeoutError) as error:
                self.error = error
        self.exits = site.exits
        self.notes = [read(notes, rank) for rank in range(3)]
        until = time.monotonic() + 5.0  # a driver tidies up behind a dead process in its own time
        while (lost := before - site.free_memory()) > SPARE and time.monotonic() < until:
            time.sleep(0.05)
        self.lost = lost


@pytest.fixture(scope="module")
def aftermath(site: Site, tmp_path_factory: pytest.TempPathFactory, outcomes: Any) -> Callable[[str], Aftermath]:
    """``aftermath(fate)``. ``outcomes`` comes first: a GPU keeps some memory from its first processes on."""
    return lru_cache(lambda fate: Aftermath(site, fate, tmp_path_factory.mktemp(fate)))


@pytest.mark.parametrize("rank", [0, 2], ids=["0, waiting", "2, with a full queue"])
@pytest.mark.parametrize("fate", FATES)
def test_a_rank_whose_stream_waits_is_told_of(
    aftermath: Callable[[str], Aftermath], fate: str, rank: int, record_property: Callable[[str, object], None]
) -> None:
    """Else its stream is not freed (no note), or not by the rescue but by the culprit's GPU (too late)."""
    after = aftermath(fate)
    kind, limit = {"killed": (PeerLost, 2.0), "stopped": (PeerStalled, STALLED + 0.8), "raises": (PeerFailed, 2.0)}[
        fate
    ]
    note, deed = after.notes[rank], after.notes[1]["at"]
    assert (note.get("error"), note.get("of")) == (kind.__name__, 1), after.notes
    record_property("told_after_s", f"{note['at'] - deed:.3f}")
    record_property("drained_after_s", f"{note['drained'] - deed:.3f}")
    assert note["at"] - deed < limit, after.notes
    assert note["drained"] - deed < limit + 0.2, "its stream did not drain"
    assert note["works"], "its GPU does not work any more"
    if fate == "raises":
        assert "ArithmeticError: the loss is not finite" in note["text"]


@pytest.mark.parametrize("fate", FATES)
def test_a_run_that_failed_leaves_the_right_exit_codes_and_no_memory(
    aftermath: Callable[[str], Aftermath], fate: str, record_property: Callable[[str, object], None]
) -> None:
    after = aftermath(fate)
    record_property("lost_bytes", after.lost)
    assert isinstance(after.error, PeerError), after.error
    assert after.error.rank == 1
    assert sorted(after.exits) == ([1, 1, 1] if fate == "raises" else [-9, 1, 1])
    assert after.lost <= SPARE, f"{after.lost >> 20} MiB of the GPU are still used"


def test_a_message_larger_than_the_free_memory_goes_over_host_memory(site: Site, tmp_path: Path) -> None:
    site.launch(send_more_than_there_is, 2, args=(str(tmp_path), site.simulator))
    sender, receiver = (read(tmp_path, rank) for rank in range(2))
    assert sender == {"told": [], "right": []}
    assert receiver["right"] == [True]
    (told,) = receiver["told"]
    assert "go over host memory" in told
    assert "bytes free; needed" in told
