"""Fused pairs in two streams, of a device that is not there: what was given to which, and what waits for what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fused_pairs import ORDER, Seen, batch, core_to_spare, cores, one_rank

import pipex
from pipex.plan import Placement, Plan
from pipex.plan.actions import parse_action
from pipex.runtime import pairs
from pipex.runtime.pairs import Pairs, TwoStreams
from pipex.transport.local import LocalEdge


@pytest.fixture(autouse=True)
def _one_core_to_spare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from core_to_spare(monkeypatch)


class Stream:
    """Knows the work that comes before what it is given next: its own, and that of streams that it has waited for."""

    def __init__(self, device: object = None) -> None:
        self.before: set[int] = set()

    def wait_stream(self, other: Stream) -> None:
        self.before |= other.before


class Streams:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = Stream()
        self.work: list[tuple[str, Stream, frozenset[int]]] = []
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(pairs, "way_of", lambda device, stages: TwoStreams(device, stages))

    @contextmanager
    def on(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        yield
        self.current = before

    def take(self, name: str) -> None:
        """Work of this name, for the stream that is current."""
        self.work.append((name, self.current, frozenset(self.current.before)))
        self.current.before.add(len(self.work) - 1)


def test_a_pair_goes_to_two_streams_that_part_before_it_and_meet_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)
    send = LocalEdge.send

    def sending(edge: LocalEdge, step: int, microbatch: int, tensors: Any) -> None:
        streams.take(f"{edge._spec.source}SEND{microbatch}")
        send(edge, step, microbatch, tensors)

    monkeypatch.setattr(LocalEdge, "send", sending)
    microbatches: dict[str, Iterator[int]] = {f"{stage}{part}": count() for stage in (0, 1) for part in "FB"}

    def taking(what: str) -> Callable[..., None]:
        return lambda *_: streams.take(f"{what}{next(microbatches[what])}")

    def trained() -> tuple[list[float], Pairs]:
        torch.manual_seed(0)
        pipeline = one_rank(*(Seen(taking(f"{stage}F"), taking(f"{stage}B")) for stage in (0, 1)))
        return [pipeline.step(*batch())], pipeline.pairs

    losses, found = trained()
    assert found == (5, 5, "")
    names = [name.replace("0B3", "0I3") for name, _, _ in streams.work]
    places = {name: place for place, name in enumerate(names)}
    own = {stage: {id(stream) for name, stream, _ in streams.work if name[0] == stage} for stage in "01"}
    assert len(own["0"]) == len(own["1"]) == 1
    assert own["0"] != own["1"]
    fused = [action.parts for action in map(parse_action, ORDER.split()) if action.parts]
    at_once = {(places[str(forward)], places[str(backward)]) for forward, backward in fused}
    for later, (_, _, before) in enumerate(streams.work):
        for earlier in range(later):
            assert (earlier in before) == ((earlier, later) not in at_once), (names[earlier], names[later])
    monkeypatch.undo()
    with cores(lambda rank: 1):
        microbatches = {what: count() for what in microbatches}
        assert trained()[0] == losses


def test_stages_that_share_a_parameter_do_not_run_in_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    Streams(monkeypatch)
    torch.manual_seed(0)
    first, last = Seen(), Seen()
    last.linear.weight = first.linear.weight
    pipeline = one_rank(first, last)
    pipeline.step(*batch())
    assert pipeline.pairs == (0, 5, "the stages 1 and 0 share modules or parameters")


def test_stages_of_one_stream_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages on a rank, of which the first and the last have the main stream."""
    Streams(monkeypatch)
    order = "0F0 1F0 2F0 (0F1;2B0)OVERLAP_F_B 1B0 (1F1;0B0)OVERLAP_F_B 2F1 2B1 1B1 0B1"
    plan = Plan("by-hand", Placement("loop", 1, 3), 2, (tuple(map(parse_action, order.split())),), (6,))
    pipeline = pipex.Pipeline([Seen(), Seen(), Seen()], plan, F.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.1))
    pipeline.step(*batch())
    assert pipeline.pairs == (1, 2, "the stages 0 and 2 have one stream")
