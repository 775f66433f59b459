"""What counts as beside messages, how long they are made to flow, and how ranks agree on that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu
from torch import Tensor

from pipex.bench.beside import ENOUGH, HOPELESS, MORE, PRODUCTS, SAMPLES, WARMUPS, Beside, Products, Timeline

ROUNDS = WARMUPS + SAMPLES


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu(monkeypatch)


class World:
    """Rank 0 of two; the other one answers as ``other`` says to what this one says of its sample."""

    device = torch.device("cpu")

    def __init__(self, gpu: FakeGpu, other: Callable[[bytes], bytes] = lambda answer: answer) -> None:
        self._gpu, self._other = gpu, other
        self.answers: list[bytes] = []

    def exchange(self, payload: bytes) -> list[bytes]:
        self._gpu.now += 0.25
        if payload:
            self.answers.append(payload)
        return [payload, self._other(payload)]


class Bursts:
    """Products take ``slower`` from when a burst is made until it is compared."""

    messages = 2

    def __init__(self, gpu: FakeGpu, slower: float = 1.0) -> None:
        self._gpu, self._slower = gpu, slower
        self.compared: list[tuple[str, int, Tensor | None]] = []

    def fill(self, messages: int) -> list[Tensor]:
        self._gpu.product *= self._slower
        return [torch.zeros(1)] * messages

    def compare(self, provider: str, outgoing: Sequence[Tensor], received: Tensor | None) -> None:
        self._gpu.product /= self._slower
        self.compared.append((provider, len(outgoing), received))


class End:
    """Messages of this many milliseconds each."""

    def __init__(self, gpu: FakeGpu, message: float, *, receives: bool = True) -> None:
        self._gpu, self._message, self._receives = gpu, message, receives
        self.messages: list[int] = []

    def transfer(self, outgoing: Sequence[Tensor]) -> Tensor | None:
        self.messages.append(len(outgoing))
        self._gpu.work(len(outgoing) * self._message)
        return outgoing[-1] if self._receives else None


def beside(world: Any, bursts: Any, **ends: Any) -> Beside:
    return Beside(world, Products(world), bursts, ends)


def test_products_count_that_lie_wholly_beside_messages() -> None:
    timeline = Timeline([0.0, 1.0, 2.5, 4.5, 7.0, 10.0], (1.0, 7.0))
    assert timeline.all == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert timeline.beside == [1.5, 2.0, 2.5]
    assert Timeline(timeline.ends, (1.1, 6.9)).beside == [2.0]
    assert Timeline(timeline.ends, (10.0, 20.0)).beside == []


def test_the_slowdown_is_beside_messages_over_alone(gpu: FakeGpu) -> None:
    bursts, end = Bursts(gpu, slower=1.25), End(gpu, 100.0)
    assert beside(World(gpu), bursts, slow=end).slowdowns() == {"slow": pytest.approx(0.25)}
    assert end.messages == [2] * ROUNDS
    assert [(name, count) for name, count, _ in bursts.compared] == [("slow", 2)] * ROUNDS


def test_messages_that_end_early_become_more(gpu: FakeGpu) -> None:
    """16 messages last from 0.25 to 8.25 ms, beside the 7 products that begin at 1, 2, ... 7 ms; 8 are needed."""
    world, end = World(gpu), End(gpu, 0.5)
    assert beside(world, Bursts(gpu), end=end).slowdowns() == {"end": pytest.approx(0.0)}
    assert end.messages == [2, 4, 8, 16, 32, *[32] * (ROUNDS - 1)]
    assert world.answers == [MORE] * 4 + [ENOUGH] * ROUNDS


def test_a_product_under_way_before_the_messages_does_not_count(gpu: FakeGpu) -> None:
    """The first one begins before the first message, by the time that an exchange takes."""
    timeline, _ = Products(World(gpu)).run(lambda: gpu.work(100.0))  # type: ignore[arg-type, func-returns-value]
    assert timeline.messages == (0.25, 100.25)
    assert len(timeline.all) == PRODUCTS == len(timeline.beside) + 1


def test_a_rank_goes_on_as_long_as_the_other_one_needs(gpu: FakeGpu) -> None:
    others = iter([MORE, MORE])
    world, end = World(gpu, lambda answer: next(others, answer) if answer else b""), End(gpu, 100.0)
    assert beside(world, Bursts(gpu), end=end).slowdowns() == {"end": pytest.approx(0.0)}
    assert end.messages == [2, 4, *[8] * ROUNDS]
    assert world.answers == [ENOUGH] * (2 + ROUNDS)


def test_the_first_round_does_not_count(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    class ColdStart(Bursts):
        """Products with nothing beside them take 1 ms after the first time."""

        def fill(self, messages: int) -> list[Tensor]:
            gpu.product = 1.5
            return [torch.zeros(1)] * messages

        def compare(self, provider: str, outgoing: Sequence[Tensor], received: Tensor | None) -> None:
            gpu.product = 1.0

    gpu.product = 3.0
    monkeypatch.setattr("pipex.bench.beside.SAMPLES", 1)
    assert beside(World(gpu), ColdStart(gpu), end=End(gpu, 100.0)).slowdowns() == {"end": pytest.approx(0.5)}


def test_a_rank_without_messages_has_no_slowdown_and_asks_for_none(gpu: FakeGpu) -> None:
    world, end = World(gpu), End(gpu, 0.0, receives=False)
    assert beside(world, Bursts(gpu), copy=end).slowdowns() == {"copy": None}
    assert world.answers == [ENOUGH] * ROUNDS


def test_messages_that_wait_for_the_products_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one hardware queue nothing is beside anything."""
    gpu = FakeGpu(monkeypatch, queues=1)
    world, end, copy = World(gpu), End(gpu, 1.0), End(gpu, 0.0, receives=False)
    assert beside(world, Bursts(gpu), end=end, copy=copy).slowdowns() == {"end": None, "copy": None}
    assert end.messages == [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]  # 1 s is when it stops
    assert world.answers.count(HOPELESS) == 1
    assert len(copy.messages) == ROUNDS  # the others go on


def test_the_other_rank_gives_up_for_both(gpu: FakeGpu) -> None:
    end = End(gpu, 100.0)
    world = World(gpu, lambda answer: HOPELESS if answer else b"")
    assert beside(world, Bursts(gpu), end=end).slowdowns() == {"end": None}
    assert end.messages == [2]


def test_one_round_that_was_given_up_leaves_no_figure(gpu: FakeGpu) -> None:
    others = iter([ENOUGH, ENOUGH, HOPELESS])
    end = End(gpu, 100.0)
    world = World(gpu, lambda answer: next(others) if answer else b"")
    assert beside(world, Bursts(gpu), end=end).slowdowns() == {"end": None}
    assert end.messages == [2, 2, 2]
