"""What stages hand on more than once, in parts, or keep and change later, beside plain torch in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import group_world
import host_world
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipex
from pipex.errors import MessageMismatch, PeerFailed, UnsupportedModule
from pipex.runtime.aliases import fold, unfold
from pipex.runtime.memory import overlap
from pipex.transport.header import copied

SIZE = 6


class Hands(nn.Module):
    """Makes a tensor of its input, and of that one what it returns."""

    def __init__(self, of: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.linear, self.of = nn.Linear(SIZE, SIZE), of

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.of(self.linear(x))


class Takes(nn.Module):
    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.use = nn.Linear(SIZE, SIZE), use

    def forward(self, *tensors: Tensor) -> Tensor:
        y: Tensor = self.linear(self.use(*tensors))
        return y


class PassesOn(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors


class Keeps(nn.Module):
    """Counts its micro-batches in a tensor that is no buffer, and hands it on."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.linear = None if alone else nn.Linear(SIZE, SIZE)
        self.kept = [torch.zeros(1 << 22)]  # larger than what a socket takes at once

    def forward(self, x: Tensor) -> Any:
        self.kept[0].add_(1)
        return self.kept[0] if self.linear is None else (self.linear(x), self.kept[0])


class Averages(nn.Module):
    """Keeps its output without a copy, and writes to it in its next forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.average = nn.Linear(SIZE, SIZE), torch.zeros(2, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9)
        y: Tensor = self.linear(x)
        self.average = y.detach()
        return y


def changes_one(x: Tensor, other: Tensor) -> Tensor:
    return F.relu_(x) + other.sum()


def uses_each_often(x: Tensor, other: Tensor) -> Tensor:
    return x.tanh() * other + other.sin() + x


def stages(name: str) -> list[nn.Module]:
    torch.manual_seed(0)
    made: dict[str, Callable[[], list[nn.Module]]] = {
        "twice, changed": lambda: [Hands(lambda y: (y, y)), Takes(changes_one)],
        "twice, and on, changed": lambda: [Hands(lambda y: (y, y)), PassesOn(), Takes(changes_one)],
        "twice, used often": lambda: [Hands(lambda y: (y, y)), Takes(uses_each_often)],
        "halves, one changed": lambda: [
            Hands(lambda y: (y[:, :3], y[:, 3:])), Takes(lambda a, b: torch.cat([F.relu_(a), b], 1))
        ],
        "part, changed": lambda: [Hands(lambda y: (y, y[:1])), Takes(changes_one)],
        "part, whole changed": lambda: [Hands(lambda y: (y[:1], y)), Takes(lambda a, b: changes_one(b, a))],
        "part, and on, changed": lambda: [Hands(lambda y: (y, y[:1])), PassesOn(), Takes(changes_one)],
        "detached, changed": lambda: [Hands(lambda y: (y, y.detach())), Takes(changes_one)],
        "part, read": lambda: [Hands(lambda y: (y, y[:1])), Takes(lambda a, b: a.tanh() + b.sum())],
        "part, changed by the loss": lambda: [Hands(lambda y: (y, y[:1])), PassesOn()],
        "kept with a graph": lambda: [Averages(), Takes(torch.tanh)],
        "kept": lambda: [Keeps(False), Takes(lambda x, count: x * (count.min() + count.max()))],
        "kept, alone": lambda: [Keeps(True), Takes(lambda count: count[: 2 * SIZE].view(2, SIZE))],
    }  # fmt: skip
    return made[name]()


def loss_fn(output: Any, target: Tensor) -> Tensor:
    if isinstance(output, tuple):
        return F.mse_loss(F.relu_(output[0]) + output[1].sum(), target)
    return F.mse_loss(output, target)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, SIZE, generator=generator), torch.randn(6, SIZE, generator=generator)


def optimizer(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters) or [torch.zeros(1)], lr=0.1)


def plain(name: str) -> list[float]:
    """Losses of three steps, and of an evaluation."""
    model = stages(name)
    update, losses = optimizer([p for stage in model for p in stage.parameters()]), []

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        values: Any = x
        for stage in model:
            values = stage(*values) if isinstance(values, tuple) else stage(values)
        return loss_fn(values, y) * (2 / 6)

    for step in range(4):
        total = torch.zeros(())
        for x, y in zip(*(t.split(2) for t in batch(step)), strict=True):
            with torch.set_grad_enabled(step < 3):
                loss = loss_of(x, y)
            if step < 3:
                loss.backward()
            total = total + loss.detach()
        losses.append(total.item())
        update.step()
        update.zero_grad()
    return losses


def train(name: str, family: str, chunks: int) -> list[float]:
    plan = pipex.build(family, pipex.current_world().ranks, 3, chunks=chunks)
    pipe = pipex.Pipeline(stages(name), plan, loss_fn, optimizer=optimizer)
    return [pipe.step(*batch(step)) for step in range(3)] + [pipe.evaluate(*batch(3))]


CELLS = ["1f1b", "zb-h1", "looped-bfs"]


def launch(name: str, family: str, world: Any = host_world) -> list[list[float]]:
    number = len(stages(name))
    ranks = 1 if family == "looped-bfs" else number
    found: list[list[float]] = world.launch(train, ranks, args=(name, family, number // ranks))
    return found


@pytest.mark.parametrize("family", CELLS)
@pytest.mark.parametrize(
    "name",
    ["twice, changed", "twice, and on, changed", "twice, used often", "halves, one changed", "part, read"],
)
def test_tensors_of_one_memory_have_the_bits_of_one_process(name: str, family: str) -> None:
    expected = plain(name)
    for found in launch(name, family):
        assert found == expected


@pytest.mark.parametrize("family", CELLS)
@pytest.mark.parametrize(
    "name",
    [
        "part, changed", "part, whole changed", "part, and on, changed", "detached, changed",
        "part, changed by the loss",
    ],
)  # fmt: skip
def test_a_change_of_one_that_others_would_have_to_see_is_refused_by_name(name: str, family: str) -> None:
    with pytest.raises(
        (PeerFailed, UnsupportedModule), match=r"stage \d works in place on a tensor that shares memory"
    ):
        launch(name, family)


@pytest.mark.parametrize("name", ["kept", "kept, alone"])
@pytest.mark.parametrize("family", CELLS)
def test_what_a_stage_keeps_is_handed_on_as_it_is_now(name: str, family: str) -> None:
    assert launch(name, family)[0] == plain(name)


def test_an_output_that_is_changed_before_the_next_stage_has_read_it_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModule, match=r"activation edge 0→1 .* was changed in place after it was handed on"):
        launch("kept with a graph", "looped-bfs")


@pytest.mark.parametrize("name", ["kept", "kept, alone", "twice, changed"])
def test_over_torch_distributed_too(name: str) -> None:
    """A message of one tensor is sent from where it is."""
    assert launch(name, "gpipe", group_world)[0] == plain(name)


def test_a_message_is_noted_only_where_it_has_to_be() -> None:
    y = torch.arange(12.0).view(3, 4)
    for apart in (
        (y, y.clone()),
        (y[:1], y[1:]),
        (y[:, :2], y[:, 2:]),
        (torch.view_as_complex(y.view(6, 2)).real, y[:0]),
    ):
        assert fold(apart, ()) is apart
    for tensors, sent, places, overlapping in (
        ((y, y, y[1:]), 2, [0, 0, 1], {0, 1}),
        ((y, torch.ones(1), y), 2, [0, 1, 0], set()),
        ((y[:2], y[1:], torch.ones(1)), 3, [0, 1, 2], {0, 1}),
    ):
        message = fold(tensors, ())
        found = unfold(message)
        assert found is not None
        assert len(found[0]) == sent == len(message) - 1
        assert (found[1], found[2]) == (places, overlapping)
        assert all(found[0][place] is tensor for place, tensor in zip(places, tensors, strict=True))


def test_a_tensor_that_looks_like_a_note_is_none() -> None:
    note = fold((torch.ones(1),) * 2, ())[-1]
    tensors = (torch.zeros(1), note)
    found = unfold(fold(tensors, ()))
    assert found is not None
    assert all(map(torch.equal, found[0], tensors))


@pytest.mark.parametrize("sent", [(torch.ones(1),), (torch.ones(1),) * 2])
def test_a_note_of_other_tensors_is_named(sent: tuple[Tensor, ...]) -> None:
    note = fold((torch.ones(1),) * 2, ())[-1]  # of one tensor that is two
    with pytest.raises(MessageMismatch, match="says of its tensors what cannot be; got places"):
        unfold((torch.zeros(1), *sent, note))


def test_overlap_is_told_by_elements() -> None:
    y = torch.zeros(30)
    views = [y.as_strided(shape, strides, begin) for shape, strides, begin in (
        ((4,), (1,), 0), ((4,), (1,), 3), ((4,), (6,), 1), ((4,), (6,), 2), ((2, 3), (12, 6), 2), ((3, 4), (0, 1), 20),
    )]  # fmt: skip
    for one in views:
        for other in views:
            y.zero_()
            for index in torch.cartesian_prod(*map(torch.arange, one.shape)).view(-1, one.dim()):
                one[tuple(index)] = 1
            assert overlap(one, other) == bool(other.any())


def test_a_copy_has_the_strides_and_its_own_memory() -> None:
    for tensor in (
        torch.randn(3, 4).t(), torch.randn(4).expand(3, 4), torch.randn(2, 4, 4, 1).permute(0, 3, 1, 2),
        torch.randn(3, 5)[:, :4], torch.empty(0, 3),
    ):  # fmt: skip
        found = copied(tensor)
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
        assert found.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not tensor.numel()
