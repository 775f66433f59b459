"""What fails, is interrupted or killed in a fused pair: who is named, and that nothing runs on."""

from __future__ import annotations

import operator
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_pairs import Seen, batch, core_to_spare, cores, one_rank
from torch import Tensor

import pipex
from pipex.errors import PeerLost
from pipex.runtime import pairs
from pipex.runtime.pairs import TwoThreads


@pytest.fixture(autouse=True)
def _one_core_to_spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from core_to_spare(monkeypatch)


class Broken(Exception):
    pass


def test_a_rank_is_named_by_what_it_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every forward and in every hook of a backward the place that the world was told last is theirs."""
    world = pipex.current_world()
    told: list[int] = []
    monkeypatch.setattr(type(world), "at", lambda self, step, position: told.append(position))
    found: list[str] = []
    plan = pipex.build("dualpipev", 1, 4)
    parts = [str(part) for action in plan.orders[0] for part in action.each]

    def doing(*_: object) -> None:
        found.append(parts[told[-1]])

    torch.manual_seed(0)
    one_rank(Seen(doing, doing), Seen(doing, doing)).step(*batch())
    assert found == [part for part in parts if "W" not in part]


def fail(when: Callable[[], bool], error: type[BaseException] = Broken) -> Callable[..., None]:
    def run(*_: object) -> None:
        if when():
            raise error("as asked for")

    return run


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_part_that_fails_ends_the_other(
    part: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = pipex.current_world()
    told: list[int] = []
    monkeypatch.setattr(type(world), "at", lambda self, step, position: told.append(position))
    calls: list[int] = []
    failing = fail(lambda: calls.append(1) or len(calls) == 2, error)
    before = threading.active_count()
    torch.manual_seed(0)
    later: list[Tensor] = []
    first = Seen(backward=failing if part == "backward" else lambda dy: later.append(dy))
    pipeline = one_rank(first, Seen(failing if part == "forward" else int))
    with pytest.raises(error, match="as asked for"):
        pipeline.step(*batch())
    parts = [str(p) for action in pipeline.layout.plan.orders[0] for p in action.each]
    assert parts[told[-1]] == ("1F1" if part == "forward" else "0B1")
    assert threading.active_count() == before
    if part == "forward":
        assert later == []  # what waited for the forward's end did not begin


def both(
    monkeypatch: pytest.MonkeyPatch, forward: Callable[[Any], Any], backward: Callable[[], Any]
) -> tuple[BaseException, list[str]]:
    """What ``TwoThreads`` raises, and whether it said that the backward was left. ``forward`` gets the other part."""
    jobs: list[Any] = []

    class Noted(pairs._Backward):
        def __init__(self, run: Any) -> None:
            super().__init__(run)
            jobs.append(self)

    monkeypatch.setattr(pairs, "_Backward", Noted)
    way, said, before = TwoThreads(), [], threading.active_count()
    with pytest.raises((Exception, KeyboardInterrupt)) as raised:
        way.run(lambda: forward(jobs[0]), backward, (0, 1), lambda: said.append("left"))
    way.end()
    assert threading.active_count() == before
    assert jobs[0].ended.is_set()
    return raised.value, said


DIVIDES = partial(operator.truediv, 1, 0)
"""No Python function: it does not wait for the forward."""


def raise_broken() -> None:
    raise Broken


def test_the_first_failure_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def later(job: Any) -> None:
        job.ended.wait()
        raise Broken

    error, said = both(monkeypatch, later, DIVIDES)
    assert isinstance(error, ZeroDivisionError)
    assert said == ["left"]
    error, said = both(monkeypatch, lambda job: raise_broken(), raise_broken)
    assert isinstance(error, Broken)
    assert said == []
    error, said = both(monkeypatch, lambda job: (), DIVIDES)
    assert isinstance(error, ZeroDivisionError)
    assert said == ["left"]


def test_ctrl_c_while_the_backward_is_waited_for_is_raised_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    def backward() -> tuple[()]:  # begins when the forward has ended: the main thread waits for this one
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)
        ended.append(True)
        return ()

    error, _ = both(monkeypatch, lambda job: (), backward)
    assert isinstance(error, KeyboardInterrupt)
    assert ended == [True]


def rank_dies(stage: int, part: str, call: int) -> None:
    """At this call of a stage's code."""
    calls: list[object] = []

    def die(*what: object) -> None:
        calls.append(what)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    with cores(lambda rank: 2):
        torch.manual_seed(0)
        stages = [Seen() for _ in range(4)]
        stages[stage] = Seen(die) if part == "F" else Seen(backward=die)
        plan = pipex.build("dualpipev", 2, 4)
        pipeline = pipex.Pipeline(stages, plan, F.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1))
        pipeline.step(*batch())


@pytest.mark.parametrize(("stage", "part", "call", "action"), [(2, "F", 3, "2F2"), (1, "B", 1, "1B0")])
def test_a_rank_that_is_killed_in_a_pair_is_named_by_the_part_that_it_was_in(
    stage: int, part: str, call: int, action: str
) -> None:
    """Rank 1 runs (2F2;1B0)OVERLAP_F_B."""
    with pytest.raises(PeerLost) as lost:
        pipex.launch(rank_dies, 2, args=(stage, part, call))
    assert (lost.value.rank, lost.value.action, lost.value.stage) == (1, action, stage)
