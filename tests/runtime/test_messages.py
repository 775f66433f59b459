"""What travels between stages, beside plain torch in one process: any shapes, their strides, gradients where wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import host_world
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex
from pipex.runtime.stage_runner import StageRunner

Batches = Sequence[tuple[Any, Tensor]]


def near_mean(output: Tensor, target: Tensor) -> Tensor:
    """A loss for outputs of any shape."""
    return F.mse_loss(output, target.mean().expand_as(output))


def in_one_process(
    build: Callable[[], list[nn.Module]], batches: Batches, microbatches: int
) -> tuple[list[float], list[Tensor]]:
    """Losses and parameters of training by SGD, micro-batch by micro-batch."""
    torch.manual_seed(0)
    stages = build()
    parameters = [p for stage in stages for p in stage.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for batch, target in batches:
        total = torch.zeros(())
        tensors = batch if isinstance(batch, tuple) else (batch,)
        for m in range(microbatches):
            values: Any = tuple(t.tensor_split(microbatches)[m] for t in tensors)
            for stage in stages:
                values = stage(*values) if isinstance(values, tuple) else stage(values)
            piece = target.tensor_split(microbatches)[m]
            loss = near_mean(values, piece) * (len(piece) / len(target))
            loss.backward()
            total = loss.detach() if m == 0 else total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses, [p.detach() for p in parameters]


def over_ranks(
    build: Callable[[], list[nn.Module]], batches: Batches, microbatches: int, family: str
) -> tuple[list[float], list[Tensor], bool, list[Any]]:
    """The same of this rank; whether its edges' buffers stayed in the last step; and what its stages noted."""
    torch.manual_seed(0)
    pipe = pipex.Pipeline(
        build(), pipex.build(family, pipex.current_world().ranks, microbatches),
        near_mean, optimizer=lambda parameters: torch.optim.SGD(parameters or [torch.zeros(1)], lr=0.1),
    )  # fmt: skip
    losses: list[float] = []
    grown: dict[str, int] = {}
    for batch, target in batches:
        grown = {edge: buffers.grown for edge, buffers in pipe.buffers.items()}
        losses.append(pipe.step(batch, target))
    notes = [getattr(stage.layers[0], "noted", None) for stage in pipe.local_stages]
    last = {edge: buffers.grown for edge, buffers in pipe.buffers.items()}
    return losses, [p.detach() for stage in pipe.local_stages for p in stage.parameters()], last == grown, notes


def assert_same(
    build: Callable[[], list[nn.Module]], batches: Batches, microbatches: int, family: str, ranks: int = 2
) -> list[Any]:
    """Returns each rank's notes. In the last step no buffer may have grown."""
    losses, parameters = in_one_process(build, batches, microbatches)
    results = host_world.launch(over_ranks, ranks, args=(build, batches, microbatches, family))
    assert [result[0] for result in results] == [losses] * ranks
    found = [p for result in results for p in result[1]]
    assert len(found) == len(parameters)
    assert all(map(torch.equal, found, parameters))
    assert all(result[2] for result in results)
    return [result[3] for result in results]


class Picks(nn.Module):
    """Hands over as many rows as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y[x[:, 0] > 0]


def picking() -> list[nn.Module]:
    return [Picks(), nn.Linear(4, 4)]


@pytest.mark.parametrize("family", ["1f1b", "zb-h1", "gpipe"])
def test_shapes_may_depend_on_the_data(family: str) -> None:
    torch.manual_seed(1)
    batches = [(torch.randn(12, 4), torch.randn(12, 4)) for _ in range(4)]
    batches[0][0].abs_()  # the largest message comes first
    assert len({int((x.tensor_split(3)[m][:, 0] > 0).sum()) for x, _ in batches for m in range(3)}) > 3
    assert_same(picking, batches, 3, family)


def sequence_model() -> list[nn.Module]:
    return [nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 4))]


def test_buffers_stay_once_the_longest_sequence_has_passed() -> None:
    torch.manual_seed(2)
    lengths = [*range(1, 51), *torch.randint(1, 51, (150,)).tolist()]
    batches = [(torch.randn(4, length, 4), torch.randn(4, length, 4)) for length in lengths]
    assert_same(sequence_model, batches, 2, "1f1b")


READY = [torch.randn(2, length, 4, generator=torch.Generator().manual_seed(length)) for length in range(1, 51)]


def ready_in_one_process(steps: int) -> tuple[list[float], list[Tensor]]:
    torch.manual_seed(0)
    stages = sequence_model()
    parameters = [p for stage in stages for p in stage.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for step in range(steps):
        total = torch.zeros(())
        for m, piece in enumerate(turned_round(step)):
            loss = near_mean(stages[1](stages[0](piece)), piece) * (len(piece) / (2 * len(READY)))
            loss.backward()
            total = loss.detach() if m == 0 else total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses, [p.detach() for p in parameters]


def turned_round(step: int) -> list[Tensor]:
    """In each step the lengths come in another order."""
    begin = 7 * step % len(READY)
    return READY[begin:] + READY[:begin]


def ready_over_ranks(steps: int) -> tuple[list[float], list[Tensor], set[tuple[int, ...]], set[int]]:
    """Also how often each edge has grown, and this process's mappings, after every step from the second on."""
    torch.manual_seed(0)
    pipe = pipex.Pipeline(sequence_model(), pipex.build("1f1b", 2, len(READY)), near_mean,
                          optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))  # fmt: skip
    losses, grown, resident = [], set(), set()
    for step in range(steps):
        pieces = turned_round(step)
        losses.append(pipe.step(pieces, pieces))
        if step:
            grown.add(tuple(buffers.grown for buffers in pipe.buffers.values()))
            resident.add(sum(buffers.nbytes for buffers in pipe.buffers.values()))
    return losses, [p.detach() for stage in pipe.local_stages for p in stage.parameters()], grown, resident


@pytest.mark.parametrize("steps", [8, pytest.param(200, marks=pytest.mark.long)])
def test_ready_micro_batches_of_fifty_lengths(steps: int) -> None:
    """Once the longest has passed no edge grows any more, and the bytes of its buffers are bounded by its slots."""
    losses, parameters = ready_in_one_process(steps)
    results = host_world.launch(ready_over_ranks, 2, args=(steps,))
    assert [result[0] for result in results] == [losses] * 2
    assert all(map(torch.equal, [p for result in results for p in result[1]], parameters))
    largest = 2 * 50 * 6 * 4  # bytes of the longest activation or its gradient
    for _, _, grown, nbytes in results:
        assert len(grown) == 1
        assert largest <= max(nbytes) < 6 * (1.5 * largest + 4096)


class Masked(nn.Module):
    """Notes of its floating inputs whether a gradient is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.noted: list[bool] = []

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            self.noted.append(mask.requires_grad)
        return self.linear(x) + mask.mean(-1, keepdim=True), mask


class First(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x


def masked() -> list[nn.Module]:
    return [Masked(), Masked(), First()]


def test_what_needs_no_gradient_gets_none() -> None:
    torch.manual_seed(3)
    batches = [((torch.randn(4, 4), torch.randn(4, 1000)), torch.randn(4, 4)) for _ in range(3)]
    notes = assert_same(masked, batches, 2, "zb-h1", ranks=3)
    assert notes == [[[False] * 6], [[False] * 6], [None]]


def gradient_bytes() -> dict[str, int]:
    pipe = pipex.Pipeline(
        [Masked(), First()], pipex.build("1f1b", 2, 2), F.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters or [torch.zeros(1)], lr=0.1),
    )  # fmt: skip
    pipe.step((torch.randn(4, 4), torch.randn(4, 1000)), torch.randn(4, 4))
    return {edge: buffers.nbytes for edge, buffers in pipe.buffers.items()}


def test_no_gradient_of_a_mask_is_sent() -> None:
    first, second = host_world.launch(gradient_bytes, 2)
    assert first["activation 0→1"] > 2 * 1000 * 4
    assert second["gradient 1→0"] < 2000


def images() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 4)),
    ]


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def turned() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(6, 6), Turned()), nn.Sequential(Turned(), nn.Linear(6, 3), Turned())]


@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_strides_and_so_bits_are_those_of_one_process(family: str) -> None:
    torch.manual_seed(4)
    pictures = [
        (torch.randn(6, 3, 6, 6).contiguous(memory_format=torch.channels_last), torch.randn(6, 4)) for _ in range(3)
    ]
    assert_same(images, pictures, 3, family)
    assert_same(turned, [(torch.randn(6, 5, 6), torch.randn(6, 3, 5)) for _ in range(3)], 3, family)


class Counting(nn.Module):
    """Keeps what it has seen in every way that a module has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))
        self.last = torch.zeros(4)
        self.calls = 0
        self.noise = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(0)
        self.last = y.detach()[0]
        noise = torch.randn(4, generator=self.noise)
        return y + self.average / self.calls + 0.1 * self.last + noise


def counting() -> list[nn.Module]:
    return [Counting(), Counting()]


@pytest.mark.parametrize("family", ["1f1b", "zb-h1"])
def test_nothing_of_the_user_s_runs_twice(family: str) -> None:
    torch.manual_seed(6)
    batches = [(torch.randn(6, 4), torch.randn(6, 4)) for _ in range(3)]
    assert_same(counting, batches, 3, family)


def step_with_a_gradient_missing() -> str:
    pipe = pipex.Pipeline([nn.Linear(4, 4), nn.Linear(4, 4)], pipex.build("1f1b", 2, 2), F.mse_loss,
                          optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if pipe.world.rank == 1:  # as another version of pipex might do
            patch.setattr(StageRunner, "backward", lambda runner, microbatch, _: runner.live.pop(microbatch) and ())
        with pytest.raises(pipex.PipexError) as error:
            pipe.step(torch.randn(4, 4), torch.randn(4, 4))
    return str(error.value)


def test_a_gradient_that_does_not_come_is_named() -> None:
    first, second = host_world.launch(step_with_a_gradient_missing, 2)
    assert first.startswith(
        "stage 0 received other gradients than its outputs need; got no tensors; needed 1 tensors: float32[2, 4]"
    )
    assert second.startswith("rank 0 failed: MessageMismatch: stage 0 received other gradients")
